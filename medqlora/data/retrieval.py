"""Pieces of plain texts that are shown with a question, found by BM25.

The query is the question without its options, and a piece has at most 1,000 characters, as in
MedRAG (Xiong et al., Benchmarking Retrieval-Augmented Generation for Medicine, 2024).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from medqlora.core.config import DataEntry
from medqlora.core.files import hash_json
from medqlora.data.cleaning import clean
from medqlora.data.examples import (
    DataError,
    Evidence,
    Example,
    MultipleChoice,
    OpenAnswer,
    Passage,
)
from medqlora.data.reading import read_entry
from medqlora.data.sources import locate_file

CHARACTERS = 1_000
# Texts that share a run of so many words are taken to be copies (Brown et al., Language Models are
# Few-Shot Learners, 2020, appendix C).
SHARED_WORDS = 13
# A text of fewer words is too common to tell where a copy comes from.
FEWEST_WORDS = 5
# So many more pieces are looked at, in the place of those that repeat the question's own context.
SPARE = 16
SPLIT = "train"


@dataclass(frozen=True)
class Library:
    """Texts that are searched.

    Args:
        path: Where they come from.
        pieces: All pieces, in the order of the texts.
        index: BM25's index of them.
        sha256: The SHA-256 of all pieces and their ids.
        description: What was read.
    """

    path: str
    pieces: list[Evidence]
    index: Any
    sha256: str
    description: str


def open_library(path: str, lowercase: bool = False) -> Library:
    """Read plain texts and index them.

    Args:
        path: A file or folder of plain texts, as the format `text` reads it.
        lowercase: Whether texts are put in lower case, as those of the questions are.

    Raises:
        DataError: The texts cannot be read, or hold no words.
    """
    import bm25s

    try:
        # In a folder whose files have names of splits, the training split is read.
        reading = read_entry(DataEntry(format="text", path=path), SPLIT)
    except DataError as error:
        raise DataError(f"retrieval {path}: {error}") from None
    pieces = cut_passages([clean(passage, lowercase) for passage in reading.examples])
    sha256 = hash_json([[piece.id, piece.text] for piece in pieces])
    pieces = [replace(piece, library=sha256) for piece in pieces]
    words = tokenize([piece.text for piece in pieces])
    if not any(map(len, words.ids)):
        raise DataError(
            f"retrieval {path}: no words to search for in {reading.description}; give other texts"
        )
    # The package would otherwise take another library where that is installed, and order equal
    # scores otherwise.
    index = bm25s.BM25(backend="numpy")
    index.index(words, show_progress=False)
    description = f"{reading.description}, {len(pieces):,} pieces"
    return Library(path, pieces, index, sha256, description)


def locate_library(path: str) -> None:
    """Check that there are texts to search.

    Raises:
        DataError: There is no such file, folder or hub id.
    """
    try:
        locate_file(DataEntry(format="text", path=path), SPLIT)
    except DataError as error:
        raise DataError(f"retrieval {path}: {error}") from None


def tokenize(texts: list[str]) -> Any:
    """Return the words of texts in the form of bm25s, without English stop words."""
    import bm25s

    return bm25s.tokenize(texts, stopwords="en", show_progress=False)


def cut_passages(passages: Sequence[Passage]) -> list[Evidence]:
    """Cut passages into pieces of at most CHARACTERS characters that end with a sentence."""
    pieces = []
    counts: dict[str, int] = {}
    for passage in passages:
        for text in cut_text(passage.text):
            # The numbers go on through all passages of a text.
            number = counts[passage.document] = counts.get(passage.document, 0) + 1
            pieces.append(Evidence(f"{passage.document}#{number}", passage.source, text))
    return pieces


def cut_text(text: str) -> list[str]:
    """Cut a text after sentences; only a longer sentence is cut between its words."""
    pieces: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
        words = sentence.split()
        joined = " ".join(words)
        if pieces and len(pieces[-1]) + len(joined) < CHARACTERS:
            pieces[-1] = f"{pieces[-1]} {joined}".strip()
            continue
        # A sentence that fits is one piece.
        pieces.append("")
        for word in words:
            if pieces[-1] and len(pieces[-1]) + len(word) >= CHARACTERS:
                pieces.append("")
            pieces[-1] = f"{pieces[-1]} {word[:CHARACTERS]}".strip()
    return [piece for piece in pieces if piece]


def add_evidence(
    examples: Sequence[Example], library: Library, count: int
) -> tuple[list[Example], str]:
    """Give each question the pieces that are most similar to it.

    A piece that repeats the question's own context or explanation is left out: PubMedQA's question
    comes from an abstract that the texts may hold. Plain texts get none.

    Args:
        examples: The examples, which are not changed.
        library: The texts that are searched.
        count: How many pieces a question gets at most, best first.

    Returns:
        The examples in their order, and what was found, in words.

    Raises:
        DataError: No piece was found for any question.
    """
    questions = [example for example in examples if not isinstance(example, Passage)]
    asked, repeating = show_evidence(questions, library, count)
    found = [question.evidence for question in asked]
    if questions and not any(found):
        raise DataError(
            f"retrieval {library.path}: no passages found for any of the {len(questions):,}"
            " questions; give texts on their subject, in their language"
        )
    given = iter(asked)
    shown = [example if isinstance(example, Passage) else next(given) for example in examples]
    parts = [f"{sum(map(bool, found)):,} of {len(questions):,} questions get passages"]
    if repeating:
        parts.append(f"{repeating:,} passages that repeat a question's own context were left out")
    copies = count_copies(shown)
    if copies:
        parts.append(f"{copies:,} open questions are shown words of their own answer")
    return shown, "; ".join(parts)


def show_evidence(
    questions: Sequence[MultipleChoice | OpenAnswer], library: Library, count: int
) -> tuple[list[MultipleChoice | OpenAnswer], int]:
    """Return questions with their best pieces, and how many were left out as their own context."""
    if not questions:
        return [], 0
    numbers, scores = library.index.retrieve(
        tokenize([question.question for question in questions]),
        k=min(count + SPARE, len(library.pieces)),
        show_progress=False,
        n_threads=0,
        backend_selection="numpy",
    )
    shown = []
    repeating = 0
    for question, some, values in zip(questions, numbers.tolist(), scores.tolist(), strict=True):
        own = list_words(" ".join(list_own_texts(question)))
        # A piece without a word of the question scores 0. Equal scores keep the texts' order.
        ranked = sorted((-value, number) for value, number in zip(values, some, strict=True))
        best: list[Evidence] = []
        for value, number in ranked:
            if len(best) == count or value >= 0:
                break
            if share_run(own, list_words(library.pieces[number].text)):
                repeating += 1
            else:
                best.append(library.pieces[number])
        shown.append(replace(question, evidence=tuple(best)))
    return shown, repeating


def list_own_texts(question: MultipleChoice | OpenAnswer) -> list[str]:
    """Return the texts that a question brings with it, beside itself."""
    explanation = getattr(question, "explanation", None)
    return [*question.context, *([explanation] if explanation else [])]


def share_run(first: list[str], second: list[str]) -> bool:
    """Whether two lists of words have a run of SHARED_WORDS in common.

    The whole of a shorter list is such a run, unless it has less than FEWEST_WORDS.
    """
    size = min(SHARED_WORDS, len(first), len(second))
    if size < FEWEST_WORDS:
        return False
    runs = {tuple(first[start : start + size]) for start in range(len(first) - size + 1)}
    return any(
        tuple(second[start : start + size]) in runs for start in range(len(second) - size + 1)
    )


def list_words(text: str) -> list[str]:
    """Return the words of a text without case and punctuation."""
    return re.findall(r"\w+", text.casefold())


def count_copies(examples: Sequence[Example]) -> int:
    """Count open questions that are shown a piece which repeats words of their right answer."""
    copies = 0
    for example in examples:
        if isinstance(example, OpenAnswer) and example.answer and example.evidence:
            own = list_words(example.answer)
            copies += any(share_run(own, list_words(piece.text)) for piece in example.evidence)
    return copies
