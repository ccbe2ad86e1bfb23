"""Solved questions that go before a question."""

from __future__ import annotations

import random
from collections.abc import Sequence

from medqlora.data.cleaning import decontaminate
from medqlora.data.examples import Example
from medqlora.data.formats.registry import FORMATS
from medqlora.evaluation.method import Method, ScoringError
from medqlora.prompts.chat_template import Encoder
from medqlora.prompts.styles import Prompt, render


def choose_shots(
    encoder: Encoder,
    examples: Sequence[Example],
    method: Method,
    pool: Sequence[Example],
    completion: str,
) -> list[tuple[Prompt, ...]]:
    """Worked examples for each question, none of them a question that is asked."""
    if method.num_fewshot == 0:
        return [()] * len(examples)
    usable, _ = decontaminate(
        [shot for shot in pool if getattr(shot, "answer", None) is not None], examples
    )
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
    # a subject's own examples, in their order, as the benchmark has them
    elif FORMATS[examples[0].dataset].fewshot_by_subject:
        by_subject = {
            subject: [i for i, shot in enumerate(usable) if shot.subject == subject]
            for subject in {e.subject for e in examples}
        }
        if short := sorted(
            str(subject) for subject, some in by_subject.items() if len(some) < method.num_fewshot
        ):
            raise ScoringError(
                f"--num_fewshot {method.num_fewshot}: {examples[0].dataset} takes examples of the"
                f" same subject; too few of {', '.join(short)}"
            )
        chosen = [by_subject[example.subject][: method.num_fewshot] for example in examples]
    else:
        chosen = [random.Random(method.seed).sample(range(len(usable)), method.num_fewshot)] * len(
            examples
        )
    needed = {
        i: render(usable[i], encoder.style, completion)
        for i in sorted({i for some in chosen for i in some})
    }
    return [tuple(needed[i] for i in some) for some in chosen]


def find_nearest(pool: list[str], questions: list[str], k: int) -> list[list[int]]:
    """Numbers of the k most similar texts by BM25 (Robertson & Zaragoza, 2009), the most similar
    one last.
    """
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize(pool, stopwords="en", show_progress=False), show_progress=False)
    found, _ = index.retrieve(
        bm25s.tokenize(questions, stopwords="en", show_progress=False),
        k=k,
        show_progress=False,
        n_threads=0,
    )
    return [[int(i) for i in some[::-1]] for some in found]
