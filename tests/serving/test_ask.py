"""eval/ask.py: the probabilities of eval/predict.py, confidence, abstention, memory and streams."""

import ast
import io
import json
import threading

import pytest
from conftest import DEMO, ROOT, TOKENIZERS, build_model, real, real_tokenizer, run_inside
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from replying_server import Server
from transformers import AutoTokenizer

from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError, MultipleChoice
from medqlora.data.reading import read_entry
from medqlora.engines.hf import HfEngine
from medqlora.engines.interface import Answer, EngineError, Sampling, TextStream
from medqlora.engines.openai import ChatEngine, CompletionsEngine, Connection
from medqlora.engines.registry import Asking, open_engine, prepare_asking
from medqlora.evaluation.answering import make_sampling, predict
from medqlora.evaluation.method import Method
from medqlora.evaluation.questions import prepare_questions
from medqlora.evaluation.settings import clean_texts
from medqlora.prompts.chat_template import MessageEncoder, make_encoder
from medqlora.serving.ask import (
    Conversation,
    answer_choices,
    describe_answer,
    keeps_turns,
    make_printable,
    measure_consistency,
)
from medqlora.serving.questions import make_question, read_questions
from medqlora.serving.settings import AskSettings

TEST = DEMO / "data" / "test.jsonl"
BASE = str(DEMO / "base")


def settings(**values) -> AskSettings:
    return AskSettings(**({"model": BASE, "dtype": "float32", "max_new_tokens": 12} | values))


@pytest.fixture(scope="module")
def asking():
    return prepare_asking(settings())


@pytest.fixture(scope="module")
def engine(asking):
    return open_engine(settings(), asking, 0, None)


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("permutations", "count"), [(1, 130), (4, 20)])
def test_a_file_gets_the_very_numbers_of_predict(engine, asking, permutations, count):
    examples = read_entry(DataEntry(format="medmcqa", path=str(TEST), limit=count), "test").examples
    examples = clean_texts(examples, asking.encoder.style, False)
    method = Method(permutations=permutations)
    asked, shared = prepare_questions(asking.encoder, examples, method, (), asking.max_length)
    batches = predict(engine, asking.encoder, asked, shared, method, "m")
    expected = {row["id"]: row for batch in batches for row in batch}
    wanted = settings(file=TEST, permutations=permutations)
    questions = clean_texts(read_questions(wanted)[:count], asking.encoder.style, False)
    rows = answer_choices(engine, asking, questions, wanted)
    assert len(rows) == count
    for row in rows:
        same = expected[row["id"]]
        for key in ("option_logprobs", "letter_mass", "prompt_sha256", "weights"):
            assert row[key] == same[key], key
        top = max(row["option_logprobs"].values())
        shares = [2.718281828459045 ** (v - top) for v in row["option_logprobs"].values()]
        assert row["confidence"] == pytest.approx(max(shares) / sum(shares))
        assert row["answer"].startswith(f"{same['prediction']}. ")


def test_a_typed_question_has_the_numbers_that_its_row_has_in_a_file(engine, asking):
    (example, *_) = read_entry(DataEntry(format="medmcqa", path=str(TEST)), "test").examples
    (typed,) = read_questions(settings(question=example.question, option=example.options))
    (row,) = answer_choices(engine, asking, [typed], settings())
    many = answer_choices(engine, asking, read_questions(settings(file=TEST))[:64], settings())
    assert row["option_logprobs"] == pytest.approx(many[0]["option_logprobs"], abs=1e-5)
    assert row["letter_mass"] == pytest.approx(many[0]["letter_mass"], abs=1e-5)


def test_answers_in_text_vote(engine, asking):
    question = make_question("What causes tetanus?", ("Plasmodium", "Clostridium"), "typed")
    (row,) = answer_choices(
        engine, asking, [question], settings(scoring="generate", samples=3, temperature=1.0)
    )
    assert len(row["samples"]) == 3
    if row["votes"]:
        assert row["confidence"] == max(row["votes"].values()) / sum(row["votes"].values())
        assert row["confidence_is"] == "votes"
    else:
        assert (row["answer"], row["confidence"]) == (None, None)
        assert describe_answer(row).startswith("No answer")


# ---- open questions -----------------------------------------------------------------------------


def test_an_open_question_is_asked_as_predict_asks_it(engine, asking):
    question = make_question("What is fever?", (), "typed")
    talk = Conversation(engine, asking, settings(samples=2))
    _, entry = talk.prepare(question)
    method = Method(scoring="generate", max_new_tokens=12)
    (same,), _ = prepare_questions(asking.encoder, [question], method, (), asking.max_length)
    assert entry.requests[0].prefix == same.requests[0].prefix
    ((expected,),) = predict(engine, asking.encoder, [same], 0, method, BASE)
    pieces = []
    row = talk.answer(question, pieces.append)
    assert "".join(pieces).strip() == row["answer"] == expected["prediction"]
    assert row["prompt_sha256"] == expected["prompt_sha256"]
    assert row["confidence"] == measure_consistency(row["answer"], row["samples"])
    # The same seed draws the same samples.
    assert talk.answer(question, pieces.append)["samples"] == row["samples"]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=6), st.text(max_size=20))
def test_consistency_is_a_share(samples, answer):
    assert 0 <= measure_consistency(answer, samples) <= 1
    assert measure_consistency(None, samples) == 0


def test_consistency_is_the_mean_overlap():
    assert describe_answer({"answer": ""}) == "(the model's answer is empty)"
    assert measure_consistency("high fever", ["The high fever.", "high", "nothing"]) == (
        pytest.approx((1 + 2 / 3 + 0) / 3)
    )
    assert measure_consistency("fever", ["<think> fever"]) == 0


@pytest.mark.parametrize(("threshold", "abstains"), [(0, False), (1.01, True)])
def test_the_ends_of_the_threshold(engine, asking, threshold, abstains):
    wanted = settings(threshold=threshold, samples=1)
    choice = make_question("Which?", ("a", "b"), "typed")
    (row,) = answer_choices(engine, asking, [choice], wanted)
    other = Conversation(engine, asking, wanted).answer(
        make_question("What is fever?", (), "typed"), lambda piece: None
    )
    for found in (row, other):
        assert found["abstained"] is abstains
        assert ("withheld" in found) is abstains
        if abstains:
            assert (found["prediction"], found["text"]) == (None, None)
            assert "below the threshold of 1.01" in found["answer"]


def test_withheld_are_exactly_the_answers_below_the_threshold(engine, asking):
    questions = read_questions(settings(file=TEST))[:60]
    rows = answer_choices(engine, asking, questions, settings())
    middle = sorted(row["confidence"] for row in rows)[30]
    kept = answer_choices(engine, asking, questions, settings(threshold=middle))
    assert [row["abstained"] for row in kept] == [row["confidence"] < middle for row in rows]


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2.5", "smollm2", "llama-3"])
def test_earlier_turns_stand_in_the_prompt_as_the_template_writes_them(name):
    tokenizer = real_tokenizer(name)
    encoder = make_encoder(tokenizer, "chat")
    talk = Conversation(None, Asking(encoder, {}, 4_096, {}), settings())
    assert keeps_turns(encoder)
    first = make_question("What is fever?", (), "typed")
    talk.remember(first, {"abstained": False, "answer": "A high temperature."})
    talk.remember(first, {"abstained": True, "answer": "No answer"})
    _, entry = talk.prepare(make_question("And in children?", (), "typed"))
    messages = [
        {"role": "user", "content": "What is fever?"},
        {"role": "assistant", "content": "A high temperature."},
        {"role": "user", "content": "And in children?"},
    ]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
    )
    read = tokenizer.decode(entry.requests[0].prefix)
    assert read.startswith(text)
    assert not read.removeprefix(text).strip("\n")


def test_the_oldest_turns_are_forgotten_where_the_model_ends():
    encoder = make_encoder(real_tokenizer("smollm2"), "chat")
    talk = Conversation(None, Asking(encoder, {}, 120, {}), settings(max_new_tokens=20))
    for number in range(8):
        question = make_question(f"What is disease number {number}?", (), "typed")
        talk.remember(question, {"abstained": False, "answer": f"It is number {number}."})
    prompt, entry = talk.prepare(make_question("And now?", (), "typed"))
    assert len(entry.requests[0].prefix) + 20 <= 120
    assert 0 < talk.forgotten < 8
    assert len(prompt.shots) == len(talk.turns) == 8 - talk.forgotten
    assert "number 7" in prompt.shots[-1].user
    with pytest.raises(ValueError, match=r"shorten the question, or lower --max_new_tokens"):
        talk.prepare(make_question("why " * 200, (), "typed"))


def test_prompts_without_a_template_keep_no_turns(asking):
    assert not keeps_turns(asking.encoder)
    assert keeps_turns(MessageEncoder())


# ---- streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_the_pieces_of_a_stream_are_its_text(name, data):
    tokenizer = real_tokenizer(name)
    text = data.draw(st.text(max_size=40) | st.just("naïve 👩‍⚕️ don't , end .\n 日本"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    sampling = Sampling(99, (tokenizer.eos_token_id,), tokenizer.decode)
    pieces = []
    stream = TextStream(sampling, pieces.append)
    for token in [*ids, tokenizer.eos_token_id, 5]:
        stream.add([token])
    whole = stream.finish().text
    assert whole == tokenizer.decode(ids)
    assert "".join(pieces).endswith(whole)


def test_a_tokenizer_without_a_pad_token_answers():
    """Short rows of a batch are filled with the end token."""
    template = real_tokenizer("llama-3").chat_template
    tokenizer = AutoTokenizer.from_pretrained(real("tokenizers/llama-3"), pad_token=None)
    tokenizer.chat_template = template
    assert tokenizer.pad_token_id is None
    model = build_model("llama", vocab_size=128_256, hidden_size=16, intermediate_size=16)
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    engine = HfEngine(model, "sdpa")
    encoder = make_encoder(tokenizer, "chat")
    asking = Asking(encoder, {}, 512, {})
    questions = [make_question(text, (), "typed") for text in ("Why?", "What is fever, and why?")]
    prefixes = [
        Conversation(engine, asking, settings()).prepare(question)[1].requests[0].prefix
        for question in questions
    ]
    sampling = make_sampling(encoder, Method(scoring="generate", max_new_tokens=5), 0)
    together = engine.generate(prefixes, sampling)
    for prefix, texts in zip(prefixes, together, strict=True):
        assert [engine.stream(prefix, sampling, lambda piece: None)] == texts


def connect(server, kind=CompletionsEngine):
    connection = Connection(server.url, "m", retries=0, timeout=20)
    return kind(connection, str) if kind is CompletionsEngine else kind(connection)


def events(*objects, end=b"data: [DONE]\n\n"):
    for found in objects:
        yield f": comment\r\ndata: {json.dumps(found)}\r\n\r\n".encode()
    yield end


def piece(text, reason=None, model="m"):
    choice = {"index": 0, "text": text, "delta": {"content": text}, "finish_reason": reason}
    return {"model": model, "choices": [choice]}


@pytest.mark.parametrize("kind", [CompletionsEngine, ChatEngine])
def test_pieces_of_a_server_are_shown_before_its_answer_has_ended(kind):
    shown = threading.Event()

    def reply(path, body):
        assert body["stream"] is True

        def pieces():
            yield from events(piece("high "), end=b"")
            assert shown.wait(20)
            yield from events(piece("température", "stop"), {"choices": [], "usage": {}})

        return 200, pieces()

    seen = []

    def show(text):
        seen.append(text)
        shown.set()

    with Server(reply) as server:
        answer = connect(server, kind).stream([1], Sampling(5, decode=str), show)
    assert answer.text == "".join(seen) == "high température"


def test_a_server_that_does_not_stream_gives_one_piece():
    seen = []
    with Server(lambda path, body: (200, piece("whole", "stop"))) as server:
        answer = connect(server).stream([1], Sampling(5, decode=str), seen.append)
    assert answer == Answer("whole")
    assert seen == ["whole"]


BROKEN = {
    "before its end": [piece("a")],
    "It says": [piece("a"), {"error": {"message": "full"}}],
    "answers as model 'other'": [piece("a", model="other")],
    "content_filter": [piece("a", "content_filter")],
    "nonsense": [{"model": "m", "choices": [3]}],
    "not JSON": None,
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_stream_is_one_line(message):
    objects = BROKEN[message]

    def reply(path, body):
        return 200, iter([b"data: {\n\n"]) if objects is None else events(*objects)

    with Server(reply) as server, pytest.raises(EngineError, match=message) as caught:
        connect(server).stream([1], Sampling(5, decode=str), lambda piece: None)
    assert "\n" not in str(caught.value)


def test_a_server_that_refuses_or_hangs_is_one_line():
    with Server(lambda path, body: (500, {"error": "busy"})) as server:
        with pytest.raises(EngineError, match="answers 500"):
            connect(server).stream([1], Sampling(5, decode=str), lambda piece: None)
        slow = CompletionsEngine(Connection(server.url, "m", retries=0, timeout=0.2), str)
    hang = threading.Event()

    def wait():
        yield from events(piece("a"), end=b"")
        hang.wait(20)

    with Server(lambda path, body: (200, wait())) as server:
        slow = CompletionsEngine(Connection(server.url, "m", retries=0, timeout=0.3), str)
        with pytest.raises(EngineError, match=r"did not end its answer in 0\.3 s"):
            slow.stream([1], Sampling(5, decode=str), lambda piece: None)
        hang.set()


# ---- what is read -------------------------------------------------------------------------------

ROWS = [
    {"question": "Which?", "options": ["a", "b"], "answer": "B"},
    {"question": "Which?", "options": {"A": "x", "B": "y", "C": "z"}},
    {"question": "What?", "answer": "this", "context": "Some text."},
    {"question": "What?", "options": None},
    {"question": "What now?", "options": []},
]


def test_rows_with_and_without_options_and_answers_are_read(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    questions = read_questions(settings(file=path))
    assert [isinstance(question, MultipleChoice) for question in questions] == [1, 1, 0, 0, 0]
    assert [question.answer for question in questions] == [None] * 5
    assert questions[2].context == ("Some text.",)
    assert all(question.id for question in questions)
    text = tmp_path / "questions.txt"
    text.write_text("﻿What is fever?\n\n  Why?  \r\n", encoding="utf-8")
    assert [q.question for q in read_questions(settings(file=text))] == ["What is fever?", "Why?"]
    table = tmp_path / "questions.csv"
    table.write_text("stem,A,B,C\nWhich?,x,y,z\nWhat?,,,\n")
    choice, other = read_questions(settings(file=table, columns={"question": "stem"}))
    assert choice.options == ("x", "y", "z")
    assert not isinstance(other, MultipleChoice)


def test_published_layouts_keep_their_contexts(tmp_path):
    row = {"QUESTION": "Does it?", "CONTEXTS": ["One.", "Two."], "LABELS": ["A", "B"]}
    path = tmp_path / "pubmedqa.json"
    path.write_text(json.dumps({"1": row}))
    (question,) = read_questions(settings(file=path))
    assert question.options == ("yes", "no", "maybe")
    assert question.context


@pytest.mark.parametrize(
    "name", ["medqa/dev_5_options", "medmcqa/train_partial", "medquad/medquad"]
)
def test_published_files_are_read(name):
    assert len(read_questions(settings(file=real(f"{name}.jsonl")))) > 1_000


ODD_FILES = {
    "nothing.jsonl": None,
    "empty.jsonl": b"",
    "blank.txt": b"\n \n",
    "latin.txt": b"\xe9\n",
    "zeros.txt": b"\0\0",
    "no_question.jsonl": b'{"text": "a"}\n',
    "one_option.jsonl": b'{"question": "Which?", "options": ["a"]}\n',
    "number.jsonl": b'{"question": 3}\n',
    "picture.png": b"\x89PNG",
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_odd_files_are_one_line(tmp_path, name):
    path = tmp_path / name
    if ODD_FILES[name] is not None:
        path.write_bytes(ODD_FILES[name])
    with pytest.raises(DataError) as caught:
        read_questions(settings(file=path))
    assert "\n" not in str(caught.value)


REFUSED = [
    {"threshold": -0.01},
    {"threshold": 1.02},
    {"threshold": float("nan")},
    {"threshold": 0.5, "samples": 0},
    {"question": " "},
    {"question": "a", "file": "b"},
    {"option": ("a", "b")},
    {"question": "a", "option": ("b",)},
    {"question": "a", "option": ("b", " ")},
    {"question": "a", "option": "bc"},
    {"question": "a", "option": ("b", "c"), "samples": 3},
    {"columns": {"question": "q"}},
    {"disclaimer": ""},
    {"output": "answers.txt"},
    {"scoring": "generate", "permutations": 2},
]


@pytest.mark.parametrize("values", REFUSED, ids=str)
def test_settings_that_contradict_each_other_are_refused(values):
    with pytest.raises(ValidationError):
        settings(**values)


# ---- the command --------------------------------------------------------------------------------


def ask(monkeypatch, *arguments, stdin: bytes = b"") -> tuple[int, str, str]:
    """Run the command in this process -> exit code, stdout, stderr."""
    out = io.StringIO()
    given = io.TextIOWrapper(io.BytesIO(stdin))
    monkeypatch.setattr("sys.stdin", given)
    # run_inside catches stdout itself, so the command's own is caught where it prints.
    monkeypatch.setattr("builtins.print", lambda *parts, **how: write(out, *parts, **how))
    code, err = run_inside(ROOT / "eval" / "ask.py", list(arguments), monkeypatch)
    return code, out.getvalue(), err


def write(out, *parts, sep=" ", end="\n", file=None, flush=False):
    (file or out).write(sep.join(map(str, parts)) + end)


def test_a_chat_server_holds_a_conversation(monkeypatch, tmp_path):
    def reply(path, body):
        text = f"answer {len(body['messages'])}"
        if body.get("stream"):
            return 200, events(piece(text[:4]), piece(text[4:], "stop"))
        choices = [
            {"index": i, "message": {"content": text}, "finish_reason": "stop"}
            for i in range(body.get("n", 1))
        ]
        return 200, {"model": "m", "choices": choices}

    lines = b"What is fever?\n\nAnd why?\n/what\n/reset\nI want to die\n/quit\nnever asked\n"
    output = tmp_path / "answers.jsonl"
    with Server(reply) as server:
        chat = ["--model", "m", "--engine", "openai", "--server", server.url, "--api", "chat"]
        code, out, err = ask(monkeypatch, *chat, "--output", output, stdin=lines)
    assert code == 0, err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["answer 1", "answer 3", "answer 1"]
    assert [row["earlier_turns"] for row in rows] == [0, 1, 0]
    assert [row["confidence"] for row in rows] == [1, 1, 1]
    assert rows[2]["reminders"] == ["self_harm"]
    assert out.count("A language model wrote this.") == 3
    assert "call the local emergency number" in out
    assert "no such command: /what" in err
    with Server(reply) as server:
        chat[5] = server.url
        again = ask(monkeypatch, *chat, "--output", output, stdin=b"a\n")
        latin = ask(monkeypatch, *chat, stdin=b"caf\xe9\n")
        nothing = ask(monkeypatch, *chat, stdin=b"\n")
        plain = ask(
            monkeypatch,
            *chat,
            *("--question", "I want to die", "--disclaimer", "none", "--no_reminder"),
            *("--threshold", "1.01"),
        )
    for code, _, err in (again, latin, nothing):
        assert (code, err.strip().count("\n")) in ((2, 0), (2, 1)), err
    assert "exists; give a new file name" in again[2]
    assert plain[1].strip() == (
        "No answer: the model's confidence is 1.000, below the threshold of 1.01."
    )


def test_answers_cannot_command_a_terminal():
    assert make_printable("a\x1b[2Jb\r\x07\n\tc\x9b") == "a\ufffd[2Jb\ufffd\ufffd\n\tc\ufffd"


def test_the_command_answers_a_file_in_its_order(monkeypatch, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    output = tmp_path / "answers.jsonl"
    code, out, err = ask(
        monkeypatch,
        *("--model", BASE, "--file", path, "--output", output),
        *("--max_new_tokens", "3", "--samples", "1"),
    )
    assert code == 0, err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["choice", "choice", "open", "open", "open"]
    assert [line for line in out.splitlines() if line.startswith("Question ")] == [
        f"Question {number}: {row['question']}" for number, row in enumerate(ROWS, 1)
    ]


def test_evaluation_never_prints_reminders():
    for path in [*(ROOT / "medqlora" / "evaluation").rglob("*.py"), ROOT / "eval" / "predict.py"]:
        names = {
            node.module or ""
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
        }
        assert not {name for name in names if name.startswith("medqlora.serving")}, path


# ---- passages -----------------------------------------------------------------------------------

BOOK = "Bile is kept in the gallbladder until a meal.\n\nInsulin is made by the pancreas.\n"


def test_passages_are_shown_named_and_written(monkeypatch, tmp_path):
    (tmp_path / "book.txt").write_text(BOOK)
    common = ["--model", BASE, "--retrieval", str(tmp_path / "book.txt"), "--samples", "0"]
    common += ["--max_new_tokens", "4"]
    output = tmp_path / "answers.jsonl"
    code, out, _ = ask(
        monkeypatch, *common, "--question", "Where is bile kept?", "--output", str(output)
    )
    assert code == 0
    row = json.loads(output.read_text())
    (passage,) = row["passages"]
    assert passage["text"] in BOOK.replace("\n\n", " ")
    assert f"[1] {passage['id']}" in out
    assert row["citations"] == row["unknown_citations"] == []
    # The prompt with passages is another one than the prompt without.
    _, _, _ = ask(
        monkeypatch, *common, "--question", "Qqq?", "--output", str(tmp_path / "other.jsonl")
    )
    other = json.loads((tmp_path / "other.jsonl").read_text())
    assert "passages" not in other
    assert other["prompt_sha256"] != row["prompt_sha256"]


def test_a_question_of_stdin_without_a_passage_is_said(monkeypatch, tmp_path):
    (tmp_path / "book.txt").write_text(BOOK)
    code, out, err = ask(
        monkeypatch,
        *["--model", BASE, "--retrieval", str(tmp_path / "book.txt"), "--samples", "0"],
        *["--max_new_tokens", "2"],
        stdin=b"qqq\nWhat makes insulin?\n",
    )
    assert code == 0
    assert "no passage found for 1 of 1 questions" in err
    assert "[1] book.txt#1" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--num_passages", "2"], "needs texts"), (["--retrieval", "nowhere"], "retrieval nowhere")],
)
def test_wrong_texts_are_one_line(monkeypatch, flags, message):
    code, _, err = ask(monkeypatch, "--model", BASE, "--question", "Why?", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
