"""Examples -> prediction rows: what is asked of an engine, and how its numbers or texts become an
answer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from medqlora.cleaning import decontaminate
from medqlora.config import UserError
from medqlora.engines.interface import BATCH_SIZE, Engine, Request, Sampling
from medqlora.examples import LETTERS, Example, MultipleChoice, OpenAnswer, Passage
from medqlora.predictions import hash_id, make_cells
from medqlora.prompts import Prompt, candidates, parse_answer, render
from medqlora.tokens import (
    Encoder,
    cut_tokens,
    encode_candidates,
    encode_prefixes,
    encode_text,
    fingerprint,
)

MAX_PERMUTATIONS = 120


class ScoringError(UserError):
    """A way of scoring that these examples do not allow."""


@dataclass(frozen=True)
class Method:
    """How examples are asked and answers are read; one default each.

    scoring: "letters" (probability of each letter), "cloze" (of each option's text), "generate"
    (text, then parsed) or "perplexity"; permutations: orders of the options to ask in (1: as they
    stand; the number of options: cyclic; 0: all); normalization: what cloze divides an option's
    log-probability by: "raw" (nothing), "character" or "token"; temperature and samples: of
    generate, several samples vote; fewshot: "fixed" (the same for all) or "nearest" (BM25).
    """

    scoring: str = "letters"
    permutations: int = 1
    normalization: str = "character"
    num_fewshot: int = 0
    fewshot: str = "fixed"
    max_new_tokens: int = 256
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0


@dataclass
class Asked:
    """One example with all that is asked about it. Request i scores the options at the positions
    places[i], counted over all orders one after the other."""

    example: Example
    orders: list[tuple[int, ...]]
    requests: list[Request]
    truncated: bool
    places: list[list[int]] = field(default_factory=list)
    shots: tuple[Prompt, ...] = ()

    def sort(self, scores: list[list[float]]) -> list[float]:
        """Scores of each request -> scores by place."""
        flat = dict(zip(itertools.chain(*self.places), itertools.chain(*scores), strict=True))
        return [flat[place] for place in range(len(flat))]

    def key(self, run_key: str) -> str:
        ids = [[request.prefix, request.options] for request in self.requests]
        return hashlib.sha256(
            json.dumps([run_key, describe_example(self, ""), ids]).encode()
        ).hexdigest()[:32]


# ---- asking --------------------------------------------------------------------------------------


def ask(
    encoder: Encoder,
    examples: Sequence[Example],
    method: Method,
    pool: Sequence[Example] = (),
    max_length: int | None = None,
) -> tuple[list[Asked], int]:
    """Token ids of everything that is asked.

    Args: pool: labelled examples to take few-shot examples from; those that are asked themselves
        are left out. max_length: tokens that the model can read, an option or answer included.

    Returns:
        an entry per example, and how many tokens all prefixes have in common at their start.

    Raises: ScoringError: a method that does not fit the examples, a question that is too long, too
        small a pool.
    """
    check_method(examples, method, encoder.style)
    if method.scoring == "perplexity":
        return [ask_passage(encoder, example, max_length) for example in examples], 0
    completion = choose_completion(encoder, method)
    shots = choose_shots(encoder, examples, method, pool, completion)
    asked = [
        Asked(example, choose_orders(example, method), [], False, shots=some)
        for example, some in zip(examples, shots, strict=True)
    ]
    prompts = []
    variants = []
    for entry in asked:
        for order in entry.orders:
            variant = reorder(entry.example, order)
            prompt = render(variant, encoder.style, completion)
            prompts.append(replace(prompt, shots=entry.shots))
            variants.append(variant)
    prefixes = encode_prefixes(encoder, prompts)
    texts = [
        candidates(v, encoder.style, completion) if method.scoring != "generate" else []
        for v in variants
    ]
    options = (
        encode_candidates(encoder, prompts, prefixes, texts)
        if method.scoring != "generate"
        else [[[]]] * len(texts)
    )
    number = 0
    for entry in asked:
        for order in range(len(entry.orders)):
            parts, cut = fit_request(
                encoder,
                variants[number],
                prompts[number],
                prefixes[number],
                options[number],
                method,
                max_length,
            )
            for prefix, members in parts:
                entry.requests.append(Request(prefix, [options[number][i] for i in members]))
                entry.places.append([order * len(options[number]) + i for i in members])
            entry.truncated |= cut
            number += 1
    return asked, count_common([entry.requests[0].prefix for entry in asked if not entry.truncated])


def check_method(examples: Sequence[Example], method: Method, style: str) -> None:
    kinds = {type(example) for example in examples}
    wanted = {
        "letters": {MultipleChoice},
        "cloze": {MultipleChoice},
        "perplexity": {Passage},
        "generate": {MultipleChoice, OpenAnswer},
    }
    if not kinds <= wanted[method.scoring] or len(kinds) != 1:
        names = {
            MultipleChoice: "multiple-choice questions",
            OpenAnswer: "open questions",
            Passage: "texts",
        }
        raise ScoringError(
            f"--scoring {method.scoring} is for"
            f" {' or '.join(names[kind] for kind in wanted[method.scoring])}; this data holds"
            f" {' and '.join(sorted(names[kind] for kind in kinds))}: use"
            f" {' or '.join(name for name, some in wanted.items() if kinds <= some)}"
        )
    if method.permutations != 1 and (
        method.scoring != "letters" or (examples[0].dataset == "pubmedqa" and style == "lm_eval")
    ):
        raise ScoringError(
            "--permutations is for --scoring letters of questions that show their options; leave"
            " it out"
        )
    if method.scoring != "generate" and (method.samples > 1 or method.temperature > 0):
        raise ScoringError(
            f"--samples and --temperature are for --scoring generate, not {method.scoring}; leave"
            " them out"
        )
    if method.samples > 1 and kinds == {OpenAnswer}:
        raise ScoringError("--samples vote on options; open questions have none, leave it out")
    if method.scoring == "perplexity" and method.num_fewshot:
        raise ScoringError("--num_fewshot is for questions, this data holds texts; leave it out")
    if method.samples > 1 and method.temperature <= 0:
        raise ScoringError(
            f"--samples {method.samples} at temperature 0 would be {method.samples} equal answers;"
            " set --temperature, as 0.7"
        )


def choose_completion(encoder: Encoder, method: Method) -> str:
    if method.scoring == "cloze":
        return "cloze"
    if method.scoring == "letters" and encoder.completion not in ("letter", "letter_text"):
        return "letter"
    return encoder.completion


def choose_orders(example: Example, method: Method) -> list[tuple[int, ...]]:
    """Orders of the options: position -> original number, the given order first."""
    if not isinstance(example, MultipleChoice) or method.permutations == 1:
        return [tuple(range(len(getattr(example, "options", ()))))]
    n = len(example.options)
    if 1 < method.permutations <= n:  # cyclic: each option stands at each position once
        return [tuple((start + i) % n for i in range(n)) for start in range(method.permutations)]
    # whole rounds of rotations first
    wanted = (
        math.factorial(n)
        if method.permutations == 0
        else min(method.permutations, math.factorial(n))
    )
    if wanted > MAX_PERMUTATIONS:
        raise ScoringError(
            f"{example.id}: {wanted} orders of {n} options; ask for at most {MAX_PERMUTATIONS}"
        )
    starts = ((0, *rest) for rest in itertools.permutations(range(1, n)))
    return list(
        itertools.islice((order[k:] + order[:k] for order in starts for k in range(n)), wanted)
    )


def reorder(example: Example, order: tuple[int, ...]) -> Example:
    if not order or order == tuple(range(len(order))):
        return example
    answer = None if example.answer is None else order.index(example.answer)
    return replace(example, options=tuple(example.options[i] for i in order), answer=answer)


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
    elif examples[0].dataset == "mmlu":
        by_subject = {
            subject: [i for i, shot in enumerate(usable) if shot.subject == subject]
            for subject in {e.subject for e in examples}
        }
        if short := sorted(
            str(subject) for subject, some in by_subject.items() if len(some) < method.num_fewshot
        ):
            raise ScoringError(
                f"--num_fewshot {method.num_fewshot}: mmlu takes examples of the same subject; too"
                f" few of {', '.join(short)}"
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


def fit_request(
    encoder: Encoder,
    example: Example,
    prompt: Prompt,
    prefix: list[int],
    options: list[list[int]],
    method: Method,
    max_length: int | None,
) -> tuple[list[tuple[list[int], list[int]]], bool]:
    """Prefixes that fit the model, each with the options behind it, and whether something was cut.

    Style lm_eval cuts from the left what stands over `max_length`, more for a longer option, as
    lm-evaluation-harness does; other styles cut the context from its end, as in training.
    """
    every = list(range(len(options)))
    room = (
        None
        if max_length is None
        else max_length + 1 - (method.max_new_tokens + 1 if method.scoring == "generate" else 0)
    )
    longest = max(len(option) for option in options)
    if room is None or len(prefix) + longest <= room:
        return [(prefix, every)], False
    if encoder.style == "lm_eval" and longest < room:
        lengths = sorted({len(option) for option in options})
        return [
            (prefix[max(0, len(prefix) + n - room) :], [i for i in every if len(options[i]) == n])
            for n in lengths
        ], True
    context = "\n".join(getattr(example, "context", ()))
    while context and len(prefix) + longest > room:
        context = cut_tokens(encoder.tokenizer, context, len(prefix) + longest - room)
        shorter = render(
            example, encoder.style, choose_completion(encoder, method), context=context
        )
        prefix = encode_prefixes(encoder, [replace(prompt, user=shorter.user)])[0]
    if len(prefix) + longest > room:
        raise ScoringError(
            f"{example.dataset}: {example.source}: needs {len(prefix) + longest - 1} tokens without"
            f" its context, the model has room for {room - 1}; use fewer few-shot examples or new"
            " tokens, or leave the question out"
        )
    return [(prefix, every)], True


def ask_passage(encoder: Encoder, passage: Passage, max_length: int | None) -> Asked:
    """Every token of a text is asked for once, in disjoint windows; the last one reads as much
    before it as fits (lm-evaluation-harness: rolling log-likelihood). What stands before the first
    token is BOS, else the end token.
    """
    ids = encode_text(encoder.tokenizer, passage.text)
    tokens = [*(encoder.leading_ids[-1:] or (encoder.end_id,)), *ids]
    width = max_length or len(tokens)
    requests = []
    done = 1
    while done < len(tokens):
        end = min(done + width, len(tokens))
        requests.append(Request(tokens[max(0, end - 1 - width) : done], [tokens[done:end]]))
        done = end
    return Asked(passage, [()], requests, False, [[i] for i in range(len(requests))])


def count_common(prefixes: Sequence[list[int]]) -> int:
    """Tokens that all prefixes start with, at least one less than the shortest has."""
    if len(prefixes) < 2:
        return 0
    low = min(prefixes)
    high = max(prefixes)  # lists compare by their first difference
    common = next(
        (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b),
        min(len(low), len(high)),
    )
    return min(common, min(map(len, prefixes)) - 1)


# ---- answering -----------------------------------------------------------------------------------


def describe_prompt(encoder: Encoder, method: Method, shots: Sequence[Prompt] = ()) -> str:
    """The prompt's fingerprint: the training prompt's own for plain letters, one that tells also
    the way of asking and the fixed worked examples else."""
    completion = (
        encoder.completion if method.scoring == "cloze" else choose_completion(encoder, method)
    )
    digest = fingerprint(replace(encoder, completion=completion))
    if (
        method.scoring in ("letters", "generate")
        and method.num_fewshot == 0
        and method.permutations == 1
    ):
        return digest
    facts = [
        digest,
        method.scoring,
        method.permutations,
        method.num_fewshot,
        method.fewshot,
        [[shot.user, shot.completion] for shot in shots],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def predict(
    engine: Engine,
    encoder: Encoder,
    asked: Sequence[Asked],
    shared: int,
    method: Method,
    name: str,
    cells: Sequence[Sequence[int]] | None = None,
    run_key: str = "",
    done: Collection[str] = (),
) -> Iterator[list[dict[str, Any]]]:
    """Prediction rows (README), a batch at a time.

    Args: asked, shared: of `ask`; name: written as the model's name; cells: numbers of the
        questions of each batch (default: all, by predictions.make_cells); run_key: all that the
        numbers depend on besides the question, part of every row's key; done: keys of rows that
        exist.
    """
    fixed = method.fewshot == "fixed" and asked and asked[0].example.dataset != "mmlu"
    digest = describe_prompt(encoder, method, asked[0].shots if fixed else ())
    facts = {"prompt_sha256": digest, "engine": engine.name, "model": name}
    cells = (
        make_cells([entry.example.id for entry in asked], BATCH_SIZE[engine.name])
        if cells is None
        else cells
    )
    for cell in cells:
        entries = [(asked[i], asked[i].key(run_key)) for i in cell]
        entries = [(entry, key) for entry, key in entries if key not in done]
        if not entries:
            continue
        if method.scoring == "generate":
            stops = (encoder.end_id, *{encoder.tokenizer.eos_token_id} - {encoder.end_id})
            sampling = Sampling(
                method.max_new_tokens,
                stops,
                decoder(encoder),
                method.temperature,
                method.samples,
                seed_of(entries[0][0].example.id, method.seed),
            )
            found = engine.generate([entry.requests[0].prefix for entry, _ in entries], sampling)
            rows = [
                read_texts(encoder, entry, answers, method)
                for (entry, _), answers in zip(entries, found, strict=True)
            ]
        else:
            scores = iter(
                engine.score(
                    [request for entry, _ in entries for request in entry.requests], shared
                )
            )
            values = [entry.sort([next(scores) for _ in entry.requests]) for entry, _ in entries]
            read = read_passage if method.scoring == "perplexity" else read_options
            rows = [
                read(entry, some, method) for (entry, _), some in zip(entries, values, strict=True)
            ]
        yield [row | facts | {"key": key} for row, (_, key) in zip(rows, entries, strict=True)]


def answer(
    engine: Engine,
    encoder: Encoder,
    examples: Sequence[Example],
    name: str,
    max_length: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> list[dict[str, Any]]:
    """Prediction rows of multiple-choice examples by letters, in their order; part (i, n): only
    every n-th batch from the i-th, so that n processes answer all. A row does not depend on n."""
    asked, shared = ask(encoder, examples, Method(), (), max_length)
    cells = make_cells([example.id for example in examples], BATCH_SIZE[engine.name])[
        part[0] :: part[1]
    ]
    rows = {
        row["id"]: row
        for batch in predict(engine, encoder, asked, shared, Method(), name, cells)
        for row in batch
    }
    return [rows[example.id] for example in examples if example.id in rows]


def decoder(encoder: Encoder) -> Callable[[list[int]], str]:
    return lambda ids: encoder.tokenizer.decode(ids, skip_special_tokens=True)


def seed_of(id: str, seed: int) -> int:
    """A batch's own seed, the same in every run that has this batch."""
    return (hash_id(id) + seed) % (1 << 31)


def describe_example(entry: Asked, kind: str) -> dict[str, Any]:
    example = entry.example
    facts = {
        "id": example.id,
        "kind": kind,
        "dataset": example.dataset,
        "subject": getattr(example, "subject", None),
    }
    if isinstance(example, MultipleChoice):
        facts |= {
            "topic": example.topic,
            "choice_type": example.choice_type,
            "question": example.question,
            "options": list(example.options),
        }
        facts["gold"] = None if example.answer is None else LETTERS[example.answer]
    elif isinstance(example, OpenAnswer):
        facts |= {"question": example.question, "gold": example.answer}
    if entry.truncated:
        facts["truncated"] = True
    return facts


def read_options(entry: Asked, values: list[float], method: Method) -> dict[str, Any]:
    """Option log-probabilities -> row; over several orders an option's probability is the mean of
    what it gets in each.
    """
    n = len(entry.example.options)
    letters = LETTERS[:n]
    table = np.array(values).reshape(len(entry.orders), n)  # [orders, position]
    row = describe_example(entry, "choice") | {"text": None}
    by_option = np.empty_like(table)  # an option that is unknown (NaN) in one order stays unknown
    for at, order in enumerate(entry.orders):
        by_option[at, list(order)] = table[at]
    logprobs = (
        by_option[0]
        if len(table) == 1
        else np.logaddexp.reduce(by_option, axis=0) - math.log(len(table))
    )
    known = {
        letter: float(value)
        for letter, value in zip(letters, logprobs, strict=True)
        if not np.isnan(value)
    }
    row["option_logprobs"] = known
    row["prediction"] = max(known, key=known.get) if known else None
    row["letter_mass"] = (
        float(np.exp(list(known.values())).sum()) if known and method.scoring == "letters" else None
    )
    if len(entry.orders) > 1:
        row["permutations"] = {
            "".join(letters[i] for i in order): [
                None if math.isnan(value) else value for value in some
            ]
            for order, some in zip(entry.orders, table.tolist(), strict=True)
        }
    if method.scoring == "cloze":
        tokens = entry.sort(
            [[len(option) for option in request.options] for request in entry.requests]
        )
        lengths = {
            "raw": [1] * n,
            "character": [len(option) for option in entry.example.options],
            "token": tokens,
        }
        row["predictions"] = {
            name: letters[int(np.argmax(logprobs / np.array(some)))]
            for name, some in lengths.items()
        }
        row["prediction"] = row["predictions"][method.normalization]
    return row


def read_texts(encoder: Encoder, entry: Asked, texts: list[str], method: Method) -> dict[str, Any]:
    """Generated texts -> row; several samples vote, and of equal counts the answer that came first
    wins.
    """
    texts = [text.strip() for text in texts]
    if isinstance(entry.example, OpenAnswer):
        return describe_example(entry, "open") | {
            "prediction": texts[0],
            "text": texts[0],
            "option_logprobs": None,
            "letter_mass": None,
        }
    parsed = [parse_answer(text, entry.example.options, encoder.completion) for text in texts]
    votes = Counter(LETTERS[index] for index in parsed if index is not None)
    row = describe_example(entry, "choice") | {
        "text": texts[0],
        "option_logprobs": None,
        "letter_mass": None,
    }
    row["prediction"] = votes.most_common(1)[0][0] if votes else None
    if method.samples > 1:
        row |= {"samples": texts, "votes": dict(votes)}
    return row


def read_passage(entry: Asked, values: list[float], method: Method) -> dict[str, Any]:
    text = entry.example.text
    return describe_example(entry, "text") | {
        "logprob": sum(values),
        "tokens": sum(len(request.options[0]) for request in entry.requests),
        "bytes": len(text.encode()),
        "words": len(text.split()),
    }
