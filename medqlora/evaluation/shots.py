"""Worked examples that stand before a question."""

from __future__ import annotations

import random
from collections.abc import Sequence

from medqlora.data.cleaning import decontaminate
from medqlora.data.examples import Example
from medqlora.data.formats.registry import FORMATS
from medqlora.evaluation.method import Method, ScoringError
from medqlora.prompts.chat_template import Encoder, MessageEncoder
from medqlora.prompts.styles import Prompt, render


def choose_shots(
    encoder: Encoder | MessageEncoder,
    examples: Sequence[Example],
    method: Method,
    pool: Sequence[Example],
    completion: str,
) -> list[tuple[Prompt, ...]]:
    """Return the worked examples of each question; none of them is a question that is asked.

    Raises:
        ScoringError: too few labelled examples are left.
    """
    if method.num_fewshot == 0:
        return [()] * len(examples)
    labelled = [shot for shot in pool if getattr(shot, "answer", None) is not None]
    # A worked example that is asked itself would give its answer away.
    usable, _ = decontaminate(labelled, examples)
    if len(usable) < method.num_fewshot:
        raise ScoringError(
            f"--num_fewshot {method.num_fewshot}: {len(usable)} labelled examples are left of"
            f" {len(pool)} after those that are asked are taken out; give more with --fewshot_path"
        )
    if method.fewshot == "nearest":
        chosen = find_nearest(
            [shot.question for shot in usable],
            [example.question for example in examples],
            method.num_fewshot,
        )
    elif FORMATS[examples[0].dataset].fewshot_by_subject:
        chosen = choose_by_subject(examples, usable, method.num_fewshot)
    else:
        # A generator of its own makes the draw depend on the seed and the usable examples alone.
        # All questions share one list, which an engine can then read once.
        drawn = random.Random(method.seed).sample(range(len(usable)), method.num_fewshot)
        chosen = [drawn] * len(examples)
    # A worked example is rendered once, however many questions it stands before.
    rendered = {}
    for number in sorted({number for some in chosen for number in some}):
        rendered[number] = render(usable[number], encoder.style, completion)
    return [tuple(rendered[number] for number in some) for some in chosen]


def choose_by_subject(
    examples: Sequence[Example], usable: Sequence[Example], k: int
) -> list[list[int]]:
    """Return the first k examples of each question's own subject, in their order, as MMLU has
    them.
    """
    by_subject: dict[str | None, list[int]] = {example.subject: [] for example in examples}
    for number, shot in enumerate(usable):
        if shot.subject in by_subject:
            by_subject[shot.subject].append(number)
    short = sorted(str(subject) for subject, some in by_subject.items() if len(some) < k)
    if short:
        raise ScoringError(
            f"--num_fewshot {k}: {examples[0].dataset} takes examples of the same subject; too few"
            f" of {', '.join(short)}"
        )
    return [by_subject[example.subject][:k] for example in examples]


def find_nearest(pool: list[str], questions: list[str], k: int) -> list[list[int]]:
    """Return the numbers of the k most similar texts by BM25 (Robertson & Zaragoza, 2009).

    The most similar text comes last, next to the question.
    """
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize(pool, stopwords="en", show_progress=False), show_progress=False)
    # int [questions, k], the most similar text first
    numbers, _ = index.retrieve(
        bm25s.tokenize(questions, stopwords="en", show_progress=False),
        k=k,
        show_progress=False,
        n_threads=0,
    )
    return [[int(i) for i in some[::-1]] for some in numbers]
