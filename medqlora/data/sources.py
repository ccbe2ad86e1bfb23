"""Find the file, folder or hub dataset of a data entry, and read its records.

A record is a row as the file holds it. It comes with its source: the file and the line or row.
"""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

from medqlora.core.config import DataEntry
from medqlora.core.hub import explain_hub
from medqlora.data.examples import DataError
from medqlora.data.formats.registry import FILE, find_format, keep_records
from medqlora.data.readers import READERS, Wanted, explain_bytes, number_rows, read_lines

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
BOOKS = (".txt", ".md")
LINES = ".txt"
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def locate_file(entry: DataEntry, split: str) -> Path | None:
    """Return the entry's file, its folder of books, or None where its path is a hub id.

    In a folder that is laid out as the dataset's authors publish it, the format knows the file of a
    split. In other folders it is the file that has one of the split's names (see SPLIT_NAMES), or
    else the one whose name begins with one of them. Plain texts of other names are books, which
    are read together.

    Raises:
        DataError: There is no such file, or a folder does not hold exactly one for the split.
    """
    kind = find_format(entry.format)
    if entry.path is None:
        if kind.hub is None:
            raise DataError(f"{entry.format}: no path; give a file, folder or hub id with `path`")
        return None
    path = Path(entry.path).expanduser()
    suffixes = SUFFIXES + BOOKS if kind.scoring == "perplexity" else SUFFIXES
    if path.is_dir():
        return locate_in_folder(entry, path, split, suffixes)
    if kind.line_field is not None:
        suffixes += (LINES,)
    if path.is_file():
        if path.suffix not in suffixes:
            raise DataError(
                f"{entry.format}: {path} ends in {path.suffix or 'nothing'}; expected"
                f" {' '.join(suffixes)}"
            )
        return path
    # A misspelt file name must fail here. Asked of the hub, it would fail late and for another
    # reason.
    looks_like_a_file = path.suffix in SUFFIXES + BOOKS or entry.path.startswith((".", "/", "~"))
    if looks_like_a_file or entry.path.count("/") != 1:
        raise DataError(
            f"{entry.format}: no file or folder {entry.path}; give an existing one or a hub id"
            " (owner/name)"
        )
    return None


def locate_in_folder(entry: DataEntry, folder: Path, split: str, suffixes: tuple[str, ...]) -> Path:
    """Return the file of a split in a folder, or the folder itself if it holds books."""
    published = find_published(entry, split)
    if published is not None:
        return published
    names = SPLIT_NAMES.get(split, (split,))
    files = [file for file in sorted(folder.iterdir()) if file.suffix in suffixes]
    # Exact names go first, because train_extra.jsonl also begins with train.
    candidates = [file for file in files if file.stem.lower() in names]
    if not candidates:
        candidates = [file for file in files if file.stem.lower().startswith(names)]
    all_names = tuple(itertools.chain(*SPLIT_NAMES.values()))
    of_splits = [file for file in files if file.stem.lower().startswith(all_names)]
    books = [file for file in files if file.suffix in BOOKS]
    if books and not of_splits:
        return folder
    check_titles(entry, folder, [file for file in books if file in of_splits], books, all_names)
    if len(candidates) == 1:
        return candidates[0]
    listed = ", ".join(file.name for file in candidates) or "none"
    raise DataError(
        f"{entry.format}: folder {folder} has {listed} for split {split}; name the file in `path`"
    )


def check_titles(
    entry: DataEntry,
    folder: Path,
    of_splits: list[Path],
    books: list[Path],
    names: tuple[str, ...],
) -> None:
    """Refuse a folder whose texts may be the parts of one text, or books with such titles.

    Args:
        of_splits: The texts whose names begin with the name of a split, as training_guide.txt.
        books: All texts of the folder.
        names: The names of splits.

    Raises:
        DataError: A text has another name, beside one that only begins with the name of a split.
    """
    titled = [file for file in of_splits if file.stem.lower() not in names]
    others = [file for file in books if file not in of_splits]
    if titled and others:
        raise DataError(
            f"{entry.format}: folder {folder} holds {titled[0].name}, which may be a split, or a"
            f" book beside {others[0].name}; name the file in `path`, or rename the book, e.g. to"
            f" book_{titled[0].name}"
        )


def find_published(entry: DataEntry, split: str) -> Path | None:
    """Return the file of a split in a folder of the published layout, or None.

    Raises:
        DataError: The folder holds the split in several forms and the entry names none of them.
    """
    if entry.path is None or not Path(entry.path).expanduser().is_dir():
        return None
    names = SPLIT_NAMES.get(split, (split,))
    find = find_format(entry.format).find_published
    return find(Path(entry.path).expanduser(), names, entry.subset)


def read_records(entry: DataEntry, split: str) -> tuple[str, list[tuple[str, dict]]]:
    """Read all records of an entry.

    Returns:
        The name of the file or hub dataset, and a (source, record) for each record.

    Raises:
        DataError: The file or dataset cannot be read.
    """
    path = locate_file(entry, split)
    if path is None:
        hub, subset = find_format(entry.format).hub or (None, None)
        hub = entry.path or hub
        subset = entry.subset or subset
        return hub, read_hub(hub, subset, split, entry.revision)
    if path.is_file():
        # In a folder of the published layout, the subset has chosen the file.
        if find_published(entry, split) is not None:
            entry = entry.model_copy(update={"subset": None})
        return path.name, read_file(entry, path, split)
    records = []
    files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    for file in files:
        if file.suffix not in BOOKS:
            raise DataError(
                f"{entry.format}: {file} is no text; a folder of books holds {' and '.join(BOOKS)}"
                " files alone; convert it, or move it elsewhere"
            )
        passages = read_file(entry, file, split)
        if not passages:
            raise DataError(f"{entry.format}: {file} holds no text; fill it, or take it away")
        records += passages
    return f"{path.name} ({len(files)} texts)", records


def read_file(entry: DataEntry, path: Path, split: str) -> list[tuple[str, dict]]:
    """Read all records of one file.

    Raises:
        DataError: The file cannot be read.
    """
    kind = find_format(entry.format)
    subset = entry.subset
    # A format that selects rows by itself, as MMLU's, may take a subset for that.
    if subset is not None and kind.prepare is not keep_records:
        subset = None
    elif subset is not None and path.suffix != ".json":
        raise DataError(f"{entry.format}: {path.name} has no named sets; leave subset {subset} out")
    splits = () if split == FILE else SPLIT_NAMES.get(split, (split,))
    wanted = Wanted(subset, splits, kind.header)
    try:
        if kind.line_field is not None and path.suffix == LINES:
            return read_lines(path, kind.line_field)
        return READERS[path.suffix](path, wanted)
    except UnicodeDecodeError as error:
        if not error.encoding.startswith("utf-8"):
            raise DataError(
                f"{entry.format}: {path.name} begins as {error.encoding} text and is none; fetch it"
                " again"
            ) from None
        raise DataError(
            f"{entry.format}: {path.name} is not UTF-8 text (byte {error.start}):"
            f" {explain_bytes(path)}"
        ) from None
    except OSError as error:
        raise DataError(f"{entry.format}: cannot read {path}: {error.strerror or error}") from None
    except (csv.Error, ValueError) as error:
        # A DataError is a ValueError too, and it already says file and line.
        if isinstance(error, DataError):
            raise DataError(f"{entry.format}: {error}") from None
        raise DataError(
            f"{entry.format}: {path.name} is not a valid {path.suffix} file: {error}"
        ) from None


def read_hub(
    hub: str, subset: str | None, split: str, revision: str | None
) -> list[tuple[str, dict]]:
    """Load one split of a hub dataset.

    Raises:
        DataError: The dataset cannot be loaded.
    """
    import datasets

    try:
        table = datasets.load_dataset(hub, subset, split=split, revision=revision)
    # An unknown dataset, subset, split or revision, a private dataset and a lost connection end in
    # unrelated types (DatasetNotFoundError, ValueError, OSError, errors of httpx and fsspec). Each
    # of them means that the user cannot have this dataset, and the message keeps the reason.
    except Exception as error:  # noqa: BLE001
        reason = explain_hub(error, hub, "dataset") or explain_access(error, hub)
        reason = reason or (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"hub dataset {hub} (subset {subset}, split {split}) cannot be loaded: {reason}"
        ) from None
    return number_rows(f"{hub} {split}", map(dict, table))


def explain_access(error: Exception, hub: str) -> str | None:
    """Return why the hub does not give a dataset that the datasets library did not find.

    That library leaves out the hub's own error, so the hub is asked once more.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import HfApi

    if not isinstance(error, DatasetNotFoundError):
        return None
    try:
        HfApi().auth_check(hub, repo_type="dataset")
    # Any failure that the hub does not explain leaves the first message as it is.
    except Exception as refusal:  # noqa: BLE001
        return explain_hub(refusal, hub, "dataset")
    return None
