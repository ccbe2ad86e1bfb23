"""What is asked and how answers are read: against transformers' own logits, and against the
reference harness's record.
"""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT, real
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from medqlora.core.config import DataEntry, Model
from medqlora.data.examples import LETTERS, MultipleChoice, OpenAnswer, Passage
from medqlora.data.reading import read_examples
from medqlora.engines.hf import HfEngine
from medqlora.engines.interface import Answer, Sampling, decode_answer
from medqlora.evaluation.answering import answer_questions, predict
from medqlora.evaluation.fitting import choose_orders, reorder
from medqlora.evaluation.method import Method, ScoringError
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.predictions import collect_rows
from medqlora.evaluation.questions import count_common, prepare_questions
from medqlora.evaluation.shots import find_nearest
from medqlora.model.base import load_base
from medqlora.prompts.answers import parse_answer
from medqlora.prompts.chat_template import encode_text, make_encoder
from medqlora.prompts.encoding import prefix_text
from medqlora.prompts.styles import PromptError, candidates, render

CPU = torch.device("cpu")
DEMO_TEST = DataEntry(format="medmcqa", path=str(DEMO / "data" / "test.jsonl"), limit=25)
DEMO_TRAIN = DataEntry(format="medmcqa", path=str(DEMO / "data" / "train.jsonl"), limit=80)


def load(path):
    return load_base(Model(base=str(path), quantization="none", dtype="float32"), CPU)


def rows_of(engine, encoder, asked, shared, method):
    rows = [row for batch in predict(engine, encoder, asked, shared, method, "m") for row in batch]
    return {row["id"]: row for row in rows}


def reference(model, prefix, options):
    """Sum of log-probabilities of each option's tokens after the prefix, one unpacked row at a
    time.
    """
    values = []
    for option in options:
        ids = torch.tensor([prefix + option])
        with torch.no_grad():
            logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        values.append(
            sum(logprobs[len(prefix) - 1 + i, token].item() for i, token in enumerate(option))
        )
    return values


@pytest.mark.parametrize("folder", ["demo", "stories260k"])
@pytest.mark.parametrize(
    "method",
    [
        Method(),
        Method(scoring="cloze"),
        Method(num_fewshot=2),
        Method(num_fewshot=2, fewshot="nearest"),
    ],
    ids=str,
)
def test_scores_equal_transformers(folder, method):
    """Letters of one and of several tokens, option texts, shared few-shot prefixes: each against a
    plain forward pass.
    """
    path = DEMO / "base" if folder == "demo" else real("models/stories260k")
    examples = read_examples(DEMO_TEST, "test")[0]
    pool = read_examples(DEMO_TRAIN, "train")[0]
    encoder = make_encoder(AutoTokenizer.from_pretrained(path), "plain")
    asked, shared = prepare_questions(encoder, examples, method, pool, 512)
    assert (shared > 40) is (method.num_fewshot > 0 and method.fewshot == "fixed")
    rows = rows_of(HfEngine(*load(path), 2048), encoder, asked, shared, method)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for entry in asked:
        (request,) = entry.requests
        expected = reference(plain, request.prefix, request.options)
        row = rows[entry.example.id]
        assert list(row["option_logprobs"].values()) == pytest.approx(expected, abs=1e-4)
        if method.scoring == "letters":
            assert row["prediction"] == LETTERS[int(np.argmax(expected))]
            assert row["letter_mass"] == pytest.approx(np.exp(expected).sum(), rel=1e-4)
        else:
            per_character = [
                value / len(option)
                for value, option in zip(expected, entry.example.options, strict=True)
            ]
            assert (
                row["prediction"]
                == row["predictions"]["character"]
                == LETTERS[int(np.argmax(per_character))]
            )
            assert row["predictions"]["raw"] == LETTERS[int(np.argmax(expected))]


@pytest.mark.parametrize(
    "task",
    [
        "medmcqa",
        pytest.param("medqa", marks=pytest.mark.full),
        pytest.param("pubmedqa", marks=pytest.mark.full),
    ],
)
def test_equal_to_the_reference_harness(task):
    """All questions of the three files in style lm_eval against what lm-evaluation-harness 0.4.13
    computed for them in float32 (bench/peers/lm_eval_scores.py --record): the same predictions,
    log-likelihoods within 1e-4. The model reads 512 tokens, so that most MedQA prompts are cut from
    the left."""
    files = {
        "medmcqa": "medmcqa/validation_part.jsonl",
        "medqa": "medqa/dev_4_options.jsonl",
        "pubmedqa": "pubmedqa/pqal_train.json",
    }
    path = real("models/stories260k")
    examples, _ = read_examples(DataEntry(format=task, path=str(real(files[task]))), "all")
    # [questions, options]
    recorded = np.load(ROOT / "tests" / "recorded" / "lm_eval_0.4.13_stories260k.npz")[task]
    encoder = make_encoder(AutoTokenizer.from_pretrained(path), "lm_eval")
    rows = answer_questions(HfEngine(*load(path)), encoder, examples, "m", 512)
    found = np.array([list(row["option_logprobs"].values()) for row in rows])
    assert abs(found - recorded).max() < 1e-4
    assert [row["prediction"] for row in rows] == [LETTERS[i] for i in recorded.argmax(1)]
    if task == "medqa":
        assert sum(row.get("truncated", False) for row in rows) > 500


def test_prompts_that_are_too_long():
    """Style lm_eval cuts from the left; other styles cut the context, never question, options or
    answer.
    """
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    example = MultipleChoice(
        "q", "Which one?", ("yes", "no"), 0, "mcq", "here", context=("word " * 400, "end")
    )
    with pytest.raises(PromptError, match="no place for a question's context"):
        prepare_questions(make_encoder(tokenizer, "lm_eval"), [example], Method(), (), 100)
    wordy = dataclasses.replace(example, question="word " * 400, context=())
    asked, _ = prepare_questions(make_encoder(tokenizer, "lm_eval"), [wordy], Method(), (), 100)
    assert asked[0].truncated
    assert len(asked[0].requests[0].prefix) == 100
    asked, _ = prepare_questions(make_encoder(tokenizer, "plain"), [example], Method(), (), 100)
    text = tokenizer.decode(asked[0].requests[0].prefix)
    assert asked[0].truncated
    assert len(asked[0].requests[0].prefix) <= 100
    assert "Context: word" in text
    assert "Which one?" in text
    assert "B. no" in text
    assert "end" not in text
    generating = Method(scoring="generate", max_new_tokens=20)
    asked, _ = prepare_questions(make_encoder(tokenizer, "lm_eval"), [wordy], generating, (), 100)
    assert len(asked[0].requests[0].prefix) == 80
    assert HfEngine(*load(DEMO / "base")).generate(
        [asked[0].requests[0].prefix], Sampling(20, (0,), str)
    )
    with pytest.raises(ScoringError, match="without its context, the model has room for 8"):
        prepare_questions(make_encoder(tokenizer, "plain"), [example], Method(), (), 8)


@pytest.mark.parametrize("permutations", [1, 2])
def test_questions_that_are_too_long_are_left_out(demo_tokenizer, permutations):
    """The other questions are asked as if the long one were not there."""
    encoder = make_encoder(demo_tokenizer, "plain")
    short, other = (
        MultipleChoice(id, "Which one?", ("yes", "no"), 0, "mcq", "here") for id in ("q", "r")
    )
    long = dataclasses.replace(short, id="long", question="word " * 400)
    method = Method(permutations=permutations)
    with pytest.raises(ScoringError, match="such questions out with --drop_too_long"):
        prepare_questions(encoder, [short, long, other], method, (), 100)
    asked, shared = prepare_questions(encoder, [short, long, other], method, (), 100, True)
    alone, alone_shared = prepare_questions(encoder, [short, other], method, (), 100)
    assert [asked[0], asked[2]] == alone
    assert shared == alone_shared
    engine = HfEngine(*load(DEMO / "base"))
    rows = rows_of(engine, encoder, asked, shared, method)
    assert rows["long"]["too_long"] > 400
    assert rows["long"]["prediction"] is None
    expected = rows_of(engine, encoder, alone, shared, method)
    assert {id: rows[id] for id in ("q", "r")} == expected
    with pytest.raises(ScoringError, match="each of the 1 questions needs"):
        prepare_questions(encoder, [long], method, (), 100, True)


@pytest.mark.parametrize("style", ["plain", "lm_eval"])
def test_option_tokens_are_those_of_the_whole_text(tokenizer, style):
    """Prompt and option encoded together, cut at the prompt's length, as the reference harness
    does.
    """
    encoder = make_encoder(tokenizer, style)
    examples = [
        MultipleChoice("q", "Is it?", ("α-blocker", "no"), 0, "medmcqa", "s"),
        MultipleChoice(
            "p", "Is it?", ("yes", "no", "maybe"), 0, "pubmedqa", "s", context=("Seen.",)
        ),
    ]
    asked, _ = prepare_questions(encoder, examples, Method(), (), None)
    for entry, example in zip(asked, examples, strict=True):
        prompt = render(example, style, "letter")
        (request,) = entry.requests
        for option, text in zip(request.options, candidates(example, style), strict=True):
            whole = [
                *encoder.leading_ids,
                *encode_text(tokenizer, prefix_text(encoder, prompt) + text),
            ]
            assert request.prefix + option == whole


@pytest.mark.parametrize("style", ["chat", "plain", "lm_eval"])
def test_few_shot_text(tokenizer, style):
    """Worked examples are whole training rows before the question, and never a question that is
    asked.
    """
    if style == "chat" and not tokenizer.chat_template:
        pytest.skip("no chat template")
    examples = read_examples(DEMO_TEST, "test")[0][:3]
    pool = read_examples(DEMO_TRAIN, "train")[0][:20]
    encoder = make_encoder(tokenizer, style)
    asked, _shared = prepare_questions(
        encoder, examples, Method(num_fewshot=2), [*pool[:2], examples[0]], None
    )
    text = tokenizer.decode(asked[1].requests[0].prefix)
    assert examples[0].question not in text
    for shot in pool[:2]:
        assert text.index(shot.question) < text.index(examples[1].question)
    if style == "chat":
        messages = []
        order = sorted(pool[:2], key=lambda shot: text.index(shot.question))
        for shot in order:
            prompt = render(shot, "chat", "letter")
            messages += [
                {"role": "user", "content": prompt.user},
                {"role": "assistant", "content": prompt.completion},
            ]
        messages.append({"role": "user", "content": render(examples[1], "chat", "letter").user})
        whole = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
        )
        assert asked[1].requests[0].prefix == encode_text(tokenizer, whole)
    with pytest.raises(ScoringError, match="--num_fewshot 5: 2 labelled examples are left of 3"):
        prepare_questions(encoder, examples, Method(num_fewshot=5), [*pool[:2], examples[0]], None)


def test_nearest_examples():
    pool = [
        "fever and cough after travel",
        "broken bone in the hand",
        "vitamin C deficiency scurvy gums",
    ]
    assert find_nearest(pool, ["bleeding gums, which vitamin deficiency?"], 1) == [[2]]
    assert find_nearest(pool, ["a broken hand with fever"], 2)[0][-1] == 1


@given(st.integers(2, 6), st.integers(0, 8))
def test_orders_show_every_option(n, permutations):
    example = MultipleChoice("q", "?", tuple(f"option {i}" for i in range(n)), n - 1, "mcq", "s")
    if permutations == 0 and n > 5:
        with pytest.raises(ScoringError, match="at most 120"):
            choose_orders(example, Method(permutations=permutations))
        return
    orders = choose_orders(example, Method(permutations=permutations))
    assert orders[0] == tuple(range(n))
    assert len(set(orders)) == len(orders)
    for order in orders:
        shown = reorder(example, order)
        assert sorted(shown.options) == sorted(example.options)
        assert shown.options[shown.answer] == example.options[example.answer]
    whole = orders[: len(orders) // n * n]  # rotations: each option at each position equally often
    assert all(
        column.count(option) == len(whole) // n
        for column in zip(*whole, strict=True)
        for option in range(n)
    )


def test_permuted_scores_are_averaged_per_option(demo_tokenizer):
    examples, _ = read_examples(DEMO_TEST, "test")
    encoder = make_encoder(demo_tokenizer, "plain")
    engine = HfEngine(*load(DEMO / "base"), 2048)
    method = Method(permutations=4)
    asked, shared = prepare_questions(encoder, examples, method, (), 512)
    rows = rows_of(engine, encoder, asked, shared, method)
    for example in examples[:5]:
        row = rows[example.id]
        chances = {letter: [] for letter in "ABCD"}
        for order, logprobs in row["permutations"].items():
            shown = dataclasses.replace(
                example, options=tuple(example.options[LETTERS.index(letter)] for letter in order)
            )
            alone = answer_questions(engine, encoder, [shown], "m", 512)[0]["option_logprobs"]
            assert logprobs == pytest.approx(list(alone.values()), abs=1e-4)
            for letter, value in zip(order, logprobs, strict=True):
                chances[letter].append(np.exp(value))
        assert {k: np.exp(v) for k, v in row["option_logprobs"].items()} == pytest.approx(
            {k: np.mean(v) for k, v in chances.items()}
        )


def test_generated_answers_are_parsed_or_left_open(demo_tokenizer):
    examples, _ = read_examples(DEMO_TEST, "test")
    encoder = make_encoder(demo_tokenizer, "plain")
    method = Method(scoring="generate", max_new_tokens=4)
    asked, shared = prepare_questions(encoder, examples, method, (), 512)
    model, backend = load(DEMO / "base")
    rows = rows_of(HfEngine(model, backend, 2048), encoder, asked, shared, method)
    for entry in asked[:6]:
        prefix = torch.tensor([entry.requests[0].prefix])
        with torch.no_grad():  # greedy by hand, one token at a time
            for _ in range(4):
                token = model(input_ids=prefix, use_cache=False).logits[0, -1].argmax()
                if token == encoder.end_id:
                    break
                prefix = torch.cat([prefix, token[None, None]], 1)
        text = demo_tokenizer.decode(prefix[0, len(entry.requests[0].prefix) :]).strip()
        row = rows[entry.example.id]
        assert row["text"] == text
        index = parse_answer(text, entry.example.options)
        assert row["prediction"] == (None if index is None else LETTERS[index])


class Thinker:
    """An engine that writes the same texts for every question."""

    name = "hf"
    weights = "float32"

    def __init__(self, *texts):
        self.answers = [Answer(text) for text in texts]

    def generate(self, prefixes, sampling):
        return [self.answers for _ in prefixes]


def test_thoughts_are_no_answer(demo_tokenizer):
    encoder = make_encoder(demo_tokenizer, "plain")
    choice = MultipleChoice("q", "Which?", ("one", "two"), 0, "mcq", "s")
    open_question = OpenAnswer("o", "What?", "Fever.", "qa", "s")
    once = Method(scoring="generate")
    twice = Method(scoring="generate", samples=2, temperature=1.0)
    for example, method, texts, prediction, unfinished in (
        (choice, once, ["<think>one?</think>B"], "B", None),
        (choice, once, ["<think>The answer is A."], None, 1),
        (choice, twice, ["<think>The answer is A.", "B"], "B", 1),
        (open_question, once, ["<think>Cough?</think>\n\nFever."], "Fever.", None),
        (open_question, once, ["<think>Fever."], None, 1),
    ):
        asked, shared = prepare_questions(encoder, [example], method)
        ((row,),) = predict(Thinker(*texts), encoder, asked, shared, method, "m")
        assert (row["prediction"], row.get("unfinished")) == (prediction, unfinished), texts
        assert row["text"] == texts[0]


def test_answers_that_were_cut_are_counted(demo_tokenizer):
    """An answer of exactly max_new_tokens is cut only where no stop token ends it."""
    stop = demo_tokenizer.eos_token_id
    sampling = Sampling(3, (stop,), lambda ids: " ".join(map(str, ids)))
    assert decode_answer([5, 6, 7], sampling) == Answer("5 6 7", reached_limit=True)
    assert decode_answer([5, 6, stop], sampling) == Answer("5 6")
    assert decode_answer([5, 6], sampling) == Answer("5 6")
    encoder = make_encoder(demo_tokenizer, "plain")
    engine = Thinker("Fever.")
    engine.answers = [Answer("Fever and", reached_limit=True)]
    asked = [OpenAnswer(f"o{i}", "What?", "Fever.", "qa", "s") for i in range(3)]
    rows = answer_questions(engine, encoder, asked, "m", max_new_tokens=2)
    assert [row["reached_limit"] for row in rows] == [1, 1, 1]
    assert score_predictions(collect_rows(rows))["reached_limit"] == 3


def test_an_open_question_that_is_too_long_is_refused_in_words_of_the_recipe(demo_tokenizer):
    encoder = make_encoder(demo_tokenizer, "plain")
    asked = [OpenAnswer("o", "word " * 100, "Fever.", "qa", "qa.jsonl line 1")]
    with pytest.raises(ScoringError, match=r"data.test: .*line 1: needs .* data.max_new_tokens"):
        answer_questions(Thinker("x"), encoder, asked, "m", 64, max_new_tokens=32)


def test_samples_vote(demo_tokenizer):
    examples, _ = read_examples(DEMO_TEST, "test")
    encoder = make_encoder(demo_tokenizer, "plain")
    method = Method(scoring="generate", max_new_tokens=3, temperature=1.0, samples=5)
    asked, shared = prepare_questions(encoder, examples, method, (), 512)
    engine = HfEngine(*load(DEMO / "base"), 2048)
    rows = rows_of(engine, encoder, asked, shared, method)
    assert rows == rows_of(engine, encoder, asked, shared, method), "the seed decides"
    assert len({tuple(row["samples"]) for row in rows.values()}) > 1
    for row in rows.values():
        assert len(row["samples"]) == 5
        parsed = [parse_answer(text, tuple(row["options"])) for text in row["samples"]]
        assert row["votes"] == {
            letter: n for i, letter in enumerate("ABCD") if (n := parsed.count(i))
        }
        if row["votes"]:
            assert row["votes"][row["prediction"]] == max(row["votes"].values())
        else:
            assert row["prediction"] is None


def test_perplexity_asks_for_every_token_once():
    path = real("models/stories260k")
    tokenizer = AutoTokenizer.from_pretrained(path)
    encoder = make_encoder(tokenizer, "plain")
    text = "Once upon a time there was a little girl who had a fever. " * 30
    (short, long), _ = prepare_questions(
        encoder,
        [Passage("a", text[:200], "text", "s"), Passage("b", text, "text", "s")],
        Method(scoring="perplexity"),
        (),
        128,
    )
    assert [token for request in long.requests for token in request.options[0]] == encode_text(
        tokenizer, text
    )
    assert all(
        len(request.prefix) + len(request.options[0]) - 1 <= 128 for request in long.requests
    )
    row = rows_of(HfEngine(*load(path), 512), encoder, [short], 0, Method(scoring="perplexity"))[
        "a"
    ]
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([[tokenizer.bos_token_id, *encode_text(tokenizer, text[:200])]])
    with torch.no_grad():
        loss = plain(input_ids=ids, labels=ids, use_cache=False).loss.item()
    assert row["logprob"] == pytest.approx(-loss * row["tokens"], rel=1e-4)
    assert row["tokens"] == ids.shape[1] - 1


@pytest.mark.parametrize(
    ("example", "method", "message"),
    [
        (
            OpenAnswer("o", "What?", "That.", "qa", "s"),
            Method(),
            (
                "--scoring letters is for multiple-choice questions; this data holds open"
                " questions: use generate"
            ),
        ),
        (Passage("t", "text", "text", "s"), Method(scoring="generate"), "use perplexity"),
        (
            MultipleChoice("q", "?", ("a", "b"), 0, "mcq", "s"),
            Method(scoring="generate", samples=3),
            "would be 3 equal answers; set --temperature",
        ),
        (
            MultipleChoice("q", "?", ("yes", "no", "maybe"), 0, "pubmedqa", "s"),
            Method(permutations=3, scoring="cloze"),
            "show their options",
        ),
    ],
)
def test_methods_that_do_not_fit(demo_tokenizer, example, method, message):
    with pytest.raises(ScoringError, match=message):
        prepare_questions(make_encoder(demo_tokenizer, "plain"), [example], method)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=2, max_size=6))
def test_common_beginning(prefixes):
    n = count_common(prefixes)
    assert all(prefix[:n] == prefixes[0][:n] and len(prefix) > n for prefix in prefixes)
    shortest = min(map(len, prefixes))
    assert n == shortest - 1 or len({prefix[n] for prefix in prefixes}) > 1


def test_key_tells_every_change(demo_tokenizer):
    encoder = make_encoder(demo_tokenizer, "plain")
    example = MultipleChoice("q", "Which?", ("one", "two"), 0, "mcq", "s")

    def key(example, run="r", **changes) -> str:
        return prepare_questions(encoder, [example], Method(**changes))[0][0].key(run)

    changed = [
        key(example, "other"),
        key(dataclasses.replace(example, id="p")),
        key(dataclasses.replace(example, question="Who?")),
        key(example, scoring="cloze"),
    ]
    changed.append(key(dataclasses.replace(example, answer=1)))  # a corrected label is a new row
    assert len({key(example), *changed}) == 6
