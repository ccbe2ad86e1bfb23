"""The settings of an evaluation: flags, YAML files, mistakes in both; chat servers get messages."""

import json
import sys

import pytest
import yaml
from conftest import DEMO, ROOT, run_inside
from replying_server import Server

from medqlora.core.command import read_settings
from medqlora.core.errors import ConfigError
from medqlora.data.examples import MultipleChoice, Passage
from medqlora.evaluation.method import Method, ScoringError
from medqlora.evaluation.questions import prepare_questions
from medqlora.evaluation.settings import (
    GROUPS,
    EvaluationSettings,
    check_dropping,
    choose_method,
)
from medqlora.prompts.chat_template import MessageEncoder

TEST = DEMO / "data" / "test.jsonl"
LEAST = ["--model", "m", "--format", "medqa", "--output", "p.jsonl"]
CHAT = [*LEAST, "--engine", "openai", "--api", "chat", "--server", "http://a/v1"]


def read(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
    return read_settings("", EvaluationSettings, GROUPS)


def test_each_key_is_one_flag_in_one_group():
    declared = [name for section in GROUPS.values() for name in section.__annotations__]
    assert sorted(declared) == sorted(EvaluationSettings.model_fields)
    for name, field in EvaluationSettings.model_fields.items():
        assert field.description, f"{name} has no docstring"


def test_defaults_are_the_method_s(monkeypatch):
    assert choose_method(read(monkeypatch, *LEAST)) == Method()


def test_file_and_flags_give_the_same_settings(tmp_path, monkeypatch):
    path = tmp_path / "evaluation.yaml"
    values = {
        "model": "m",
        "format": "mcq",
        "output": "p.jsonl",
        "columns": {"question": "stem", "options": ["a", "b"]},
        "drop_invalid": True,
        "permutations": 4,
        "engine": "vllm",
        "gpu_memory": 0.5,
    }
    path.write_text(yaml.safe_dump(values))
    flags = []
    for name, value in values.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        flags += [f"--{name}"] if value is True else [f"--{name}", text]
    from_file = read(monkeypatch, "--config", path)
    assert from_file == read(monkeypatch, *flags)
    won = read(monkeypatch, "--config", path, "--permutations", "0")
    assert won == from_file.model_copy(update={"permutations": 0})


def test_paths_of_a_file_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "e.yaml").write_text(
        "model: ./m\nformat: medqa\noutput: ./p.jsonl\npath: d.jsonl\n"
    )
    settings = read(monkeypatch, "--config", tmp_path / "e.yaml")
    assert settings.model == str(tmp_path / "m")
    assert settings.output == tmp_path / "p.jsonl"
    assert settings.path == "d.jsonl"


@pytest.mark.parametrize(
    ("text", "flags", "parts"),
    [
        ("model: m\nformt: medqa\n", [], ["line 2", "unknown key formt", "did you mean format?"]),
        ("model: m\nformat: medqa\nlimit: 0\n", [], ["line 3", "limit got 0", "equal to 1"]),
        ("model: m\nformat: medqa\nlimit: yes\n", [], ["line 3", "limit", "true and false"]),
        ("model: m\n", [], ["format is missing", "--format VALUE"]),
        ("- model\n", [], ["expected keys with values"]),
        ("model: [m\n", [], ["not valid YAML"]),
        (None, ["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (None, [*LEAST, "--modl", "x"], ["--modl", "did you mean --model?"]),
        (None, [*LEAST, "--scoring", "letter"], ["--scoring", "'letter'", "'letters'"]),
        (None, [*LEAST, "--limit", "many"], ["--limit", "'many'", "integer"]),
        (None, [*LEAST, "--limit"], ["--limit", "expected one argument"]),
        (None, [*LEAST, "--format", "medqua"], ["medqua", "did you mean medquad?"]),
        (None, [*LEAST, "--columns", "[1]"], ["--columns", "JSON object"]),
        (None, [*LEAST, "more"], ["argument more", "--key VALUE"]),
        (None, [*LEAST, "--api", "chat"], ["--api is for --engine openai"]),
        (None, [*LEAST, "--engine", "openai"], ["--server"]),
        (
            None,
            [*LEAST, "--engine", "openai", "--server", "http://a/v1", "--adapter", "b"],
            ["the server owns its adapters"],
        ),
        (None, [*CHAT, "--max_length", "9"], ["--max_length counts tokens"]),
        (None, [*CHAT, "--prompt_style", "plain"], ["a chat server takes messages only"]),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, monkeypatch, text, flags, parts):
    if text is not None:
        (tmp_path / "e.yaml").write_text(text)
        flags = ["--config", tmp_path / "e.yaml", "--output", "p.jsonl", *flags]
    with pytest.raises(ConfigError) as error:
        read(monkeypatch, *flags)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_dropping_needs_questions_and_a_known_length(monkeypatch):
    settings = read(monkeypatch, *LEAST, "--drop_too_long")
    check_dropping(settings, Method(), 512)
    check_dropping(read(monkeypatch, *LEAST), Method(), None)
    with pytest.raises(ConfigError, match="not known how much this model can read; give --max_le"):
        check_dropping(settings, Method(), None)
    with pytest.raises(ConfigError, match="texts are read in windows"):
        check_dropping(settings, Method(scoring="perplexity"), 512)


def test_a_chat_server_knows_no_log_probabilities_of_texts():
    question = MultipleChoice("1", "Which?", ("one", "two"), 0, "mcq", "s")
    passage = Passage("t", "Some text.", "text", "s")
    for example, scoring in ((question, "cloze"), (passage, "perplexity")):
        with pytest.raises(ScoringError, match="first token's only"):
            prepare_questions(MessageEncoder(), [example], Method(scoring=scoring))


@pytest.mark.parametrize("scoring", ["letters", "generate"])
def test_predictions_through_a_chat_server(tmp_path, monkeypatch, scoring):
    """Worked examples are earlier turns, the answer of each order is read at its place."""

    def reply(path, body):
        if "logprobs" not in body:
            return 200, {"choices": [{"message": {"role": "assistant", "content": "Answer: C"}}]}
        top = [{"token": letter, "logprob": -value} for value, letter in enumerate("DCBA", 1)]
        content = [{"token": "D", "logprob": -1, "top_logprobs": top}]
        message = {"role": "assistant", "content": "D"}
        return 200, {"choices": [{"message": message, "logprobs": {"content": content}}]}

    output = tmp_path / "p.jsonl"
    with Server(reply) as server:
        arguments = [
            *("--model", "served", "--format", "medmcqa", "--path", TEST, "--output", output),
            *("--engine", "openai", "--api", "chat", "--server", server.url, "--retries", 0),
            *("--num_fewshot", 2, "--fewshot_path", DEMO / "data" / "train.jsonl"),
            *("--limit", 3, "--scoring", scoring),
        ]
        code, shown = run_inside(ROOT / "eval" / "predict.py", arguments, monkeypatch)
    assert code == 0, shown
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prediction"] for row in rows] == ["D" if scoring == "letters" else "C"] * 3
    for row, body in zip(rows, server.bodies, strict=False):
        roles = [message["role"] for message in body["messages"]]
        assert roles == ["user", "assistant"] * 2 + ["user"]
        assert any(row["question"] in body["messages"][-1]["content"] for row in rows), row
