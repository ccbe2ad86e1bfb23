"""Predictions as they come, in batches that a crash cannot damage."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from medqlora.core.files import write_atomic
from medqlora.evaluation.predictions import PredictionError


def hash_id(id: str) -> int:
    """A number of 60 bits that depends on the id alone, on every machine."""
    return int(hashlib.sha256(id.encode()).hexdigest()[:15], 16)


def split_into_batches(ids: Sequence[str], size: int) -> list[list[int]]:
    """Split examples into batches by a hash of their ids: about `size` to twice as many in each.

    A batch does not depend on the number of shards, nor on what was done before a crash. So neither
    do its numbers: floating point sums depend on what is computed together.
    """
    count = 1 << max(0, (len(ids) // size).bit_length() - 1)
    question_batches: list[list[int]] = [[] for _ in range(count)]
    for number, id in enumerate(ids):
        question_batches[hash_id(id) % count].append(number)
    return question_batches


class Journal:
    """Finished batches of one predictions file, from all shards.

    Use as a context manager; `append` is durable when it returns. Every shard writes to a file of
    its own and reads all.
    """

    def __init__(self, output: Path, shard: int = 0, shards: int = 1):
        self.folder = output.with_name(output.name + ".parts")
        self.path = self.folder / f"{shard}-of-{shards}.jsonl"
        self.file: IO[bytes] | None = None

    def __enter__(self) -> Journal:
        try:
            self.folder.mkdir(exist_ok=True)
            self.file = self.path.open("ab")
        except OSError as error:
            raise PredictionError(
                f"{self.path} cannot be written: {error.strerror}; choose another --output"
            ) from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise PredictionError(
                f"{self.path}: another process is writing this shard; wait for it, or give another"
                " --shard"
            ) from None
        size = self.path.stat().st_size
        whole = find_whole(self.path)
        if whole < size:  # a line cut short by a kill or a full disk
            self.file.truncate(whole)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self) -> dict[str, dict[str, Any]]:
        """Rows by their key, from every part."""
        rows = {}
        for part in sorted(self.folder.glob("*.jsonl")):
            with part.open("rb") as file:
                for line in file:
                    rows |= parse_batch(line)
        return rows

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Raises PredictionError where the disk is full; what was appended before stays."""
        start = self.file.tell()
        try:
            self.file.write(json.dumps(rows, ensure_ascii=False).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(start)
            raise PredictionError(
                f"{self.path} cannot be written: {error.strerror}; earlier batches are kept, free"
                " space and run the same command again"
            ) from None

    def finish(self, output: Path, rows: list[dict[str, Any]]) -> None:
        """Write the finished file and remove the parts that it holds all rows of; two shards may do
        so at once.
        """
        write_atomic(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        keys = {row["key"] for row in rows}
        for part in self.folder.glob("*.jsonl"):
            with contextlib.suppress(OSError):
                if all(
                    line.strip() and parse_batch(line).keys() <= keys and parse_batch(line)
                    for line in part.read_bytes().splitlines()
                ):
                    part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def parse_batch(line: bytes) -> dict[str, dict[str, Any]]:
    """Rows of a journal's line by their key; nothing for a line that is not whole (another shard's
    in flight) or not ours.
    """
    try:
        rows = json.loads(line)
        return {row["key"]: row for row in rows}
    except (ValueError, TypeError, KeyError):
        return {}


def find_whole(path: Path) -> int:
    """Bytes up to the end of the last complete line."""
    content = path.read_bytes()
    return content.rfind(b"\n") + 1
