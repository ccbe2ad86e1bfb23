"""A journal of finished predictions, which a crash cannot damage.

Finished batches are appended to files in `FILE.parts/`, one line per batch with a hash of its rows.
A line that a crash cut short, or that has changed since, is left out when the file is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from medqlora.core.files import hash_json, write_atomic
from medqlora.evaluation.predictions import PredictionError


def hash_id(id: str) -> int:
    """Return a number of 60 bits that depends on the id alone, on every machine."""
    return int(hashlib.sha256(id.encode()).hexdigest()[:15], 16)


def split_into_batches(ids: Sequence[str], size: int) -> list[list[int]]:
    """Split examples into batches by a hash of their ids.

    A batch depends neither on the number of shards nor on what was done before a crash. Therefore
    its scores do not depend on them either, although the rounding of a forward pass depends on the
    rows that it computes.

    Args:
        ids: the examples' ids.
        size: a batch has about `size` to twice as many examples.

    Returns:
        The indices into `ids` of each batch; a batch may be empty.
    """
    count = 1 << max(0, (len(ids) // size).bit_length() - 1)
    question_batches: list[list[int]] = [[] for _ in range(count)]
    for number, id in enumerate(ids):
        question_batches[hash_id(id) % count].append(number)
    return question_batches


class Journal:
    """The finished batches of one predictions file, from all shards.

    It is a context manager. Every shard writes to a file of its own and reads the files of all.
    """

    def __init__(self, output: Path, shard: int = 0, shards: int = 1):
        """Choose the file of a shard; entering the context creates it.

        Args:
            output: the predictions file that will be written in the end.
            shard: number of this shard, from 0.
            shards: number of shards.
        """
        self.folder = output.with_name(output.name + ".parts")
        self.path = self.folder / f"{shard}-of-{shards}.jsonl"
        self.file: IO[bytes] | None = None

    def __enter__(self) -> Journal:
        """Open and lock this shard's file.

        Raises:
            PredictionError: the file cannot be written, or another process is writing it.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            self.file = self.path.open("ab")
        except OSError as error:
            raise PredictionError(
                f"{self.path} cannot be written: {error.strerror}; choose another --output"
            ) from None
        try:
            # The lock ends with its process, so one that was killed blocks nobody.
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise PredictionError(
                f"{self.path}: another process is writing this shard; wait for it, or give another"
                " --shard"
            ) from None
        # A kill or a full disk may have cut the last line short. A batch that was appended to it
        # would be lost with it.
        complete = measure_complete_lines(self.path)
        if complete < self.path.stat().st_size:
            self.file.truncate(complete)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self) -> dict[str, dict[str, Any]]:
        """Return the finished rows of all shards, by their key."""
        rows = {}
        for part in sorted(self.folder.glob("*.jsonl")):
            with part.open("rb") as file:
                for line in file:
                    rows |= parse_batch(line)
        return rows

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append a finished batch; when this returns, it is safely on disk.

        Raises:
            PredictionError: the file cannot be written, as on a full disk. Earlier batches are
                kept.
        """
        # A batch that was written in part is taken off again, or the next one would join its line.
        start = self.file.tell()
        try:
            line = {"rows": rows, "sha256": hash_json(rows)}
            self.file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
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
        """Write the finished file, and remove every part whose rows all stand in it.

        Two shards may do so at the same time.
        """
        write_atomic(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        keys = {row["key"] for row in rows}
        for part in self.folder.glob("*.jsonl"):
            # Another shard may have removed the part in the meantime.
            with contextlib.suppress(OSError):
                batches = [parse_batch(line) for line in part.read_bytes().splitlines()]
                # An empty batch stands for a line that could not be read. Another shard may still
                # be writing it, so its part is kept; in a part of our own the line is damaged, and
                # its rows were made again.
                own = part == self.path
                if all((batch or own) and batch.keys() <= keys for batch in batches):
                    part.unlink(missing_ok=True)
        # The folder stays where a part has other rows.
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def parse_batch(line: bytes) -> dict[str, dict[str, Any]]:
    """Return the rows of a journal's line by their key.

    The result is empty for a line that another shard has not finished writing, that has changed
    since it was written, or that is of a version without hashes. Such rows are made again.
    """
    try:
        batch = json.loads(line)
        rows = batch["rows"]
        # A changed digit is valid JSON and would be a wrong score, which only the hash shows.
        return {row["key"]: row for row in rows} if batch["sha256"] == hash_json(rows) else {}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def measure_complete_lines(path: Path) -> int:
    """Return the number of bytes up to the end of the last complete line."""
    content = path.read_bytes()
    return content.rfind(b"\n") + 1
