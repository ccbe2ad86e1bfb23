"""eval/predict.py on servers that fail, lie and stall: the right predictions or one line, nothing
in between, and no secret in it.
"""

import json
import shutil
import signal
import time

import pytest
import warm_processes
from conftest import DEMO, ROOT, run_inside
from odd_servers import (
    CONTENTS,
    KINDS,
    LINE,
    LONGEST,
    RIGHT,
    SECRET,
    STALLS,
    OddServer,
    fail_with,
    hang,
    refuse_ids,
    send,
)

from medqlora.engines.interface import ChatRequest, EngineError
from medqlora.engines.openai import ChatEngine
from medqlora.engines.server_connection import PATIENCE, Connection
from medqlora.evaluation.journal import Journal
from medqlora.evaluation.predictions import read_predictions

ROWS = [json.loads(line) for line in (DEMO / "data" / "test.jsonl").read_text().splitlines()[:4]]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def ask(questions, tmp_path, monkeypatch):
    """Runs eval/predict.py on a server; -> exit code, stderr, rows of the file, rows kept."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)

    def run(server, api="chat", scoring="generate", *more):
        output = tmp_path / "p.jsonl"
        code, shown = run_inside(
            ROOT / "eval" / "predict.py",
            list_flags(server, questions, output, api, scoring, *more),
            monkeypatch,
        )
        rows = []
        if output.exists():
            rows = [json.loads(line) for line in output.read_text().splitlines()]
        kept = []
        for part in sorted((tmp_path / "p.jsonl.parts").glob("*.jsonl")):
            lines = map(json.loads, part.read_text().splitlines())
            kept += [row for line in lines for row in line["rows"]]
        return code, shown, rows, kept

    return run


def list_flags(server, questions, output, api="chat", scoring="generate", *more):
    return [
        *("--model", "m", "--format", "medmcqa", "--path", questions, "--output", output),
        *("--engine", "openai", "--api", api, "--server", server.url, "--scoring", scoring),
        *("--timeout", 30, "--retries", 0, "--concurrency", 2),
        *(() if api == "chat" else ("--tokenizer", DEMO / "base")),
        *more,
    ]


def list_kinds():
    """The quick tier leaves out what the other API shows too."""
    for name, *rest in KINDS:
        repeated = name.endswith("to letters") and name.removesuffix(" to letters") in CONTENTS
        yield pytest.param(name, *rest, id=name, marks=pytest.mark.full if repeated else ())


@pytest.mark.parametrize(("name", "expected", "api", "scoring", "behave"), list_kinds())
def test_kinds_of_server(ask, name, expected, api, scoring, behave):
    # A pause before another try takes half a second, so only one kind gets one.
    retries = ("--retries", 1) if "once" in name else ()
    timeout = ("--timeout", 0.3) if name in STALLS else ()
    with OddServer(behave) as server:
        began = time.monotonic()
        code, shown, rows, kept = ask(server, api, scoring, *retries, *timeout)
        assert time.monotonic() - began < LONGEST or name not in STALLS
    assert SECRET not in shown
    if expected == RIGHT:
        assert code == 0, shown
        assert [row["prediction"] for row in rows] == ["B"] * 4
    else:
        assert expected == LINE
        assert (code, shown.count("\n"), rows) == (2, 1, []), shown
    # What was kept before a failure is right.
    assert all(row["prediction"] == "B" for row in kept)


def test_one_failed_request_costs_one_row(ask, tmp_path):
    """The same command asks it again, and nothing else."""
    with OddServer(fail_with(500), only=ROWS[2]["question"]) as server:
        code, shown, rows, kept = ask(server)
        assert (code, rows, len(kept)) == (2, [], 3), shown
        assert shown.startswith("1 of 4 questions got no answer and have no row")
        assert "answers 500" in shown
        server.behave, server.asked = send, 0
        code, shown, rows, _ = ask(server)
        assert code == 0, shown
        assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
        assert server.asked == 1 + 1, "the trial, and the missing row"
        # Nothing is asked for a file that is complete.
        assert (ask(server)[0], server.asked) == (0, 2)


def test_a_question_with_a_failed_order_has_no_row(ask):
    def fail_later(handler, good):
        send(handler, good, 200 if handler.asked < 4 else 500)

    with OddServer(fail_later) as server:
        code, shown, rows, kept = ask(server, "completions", "letters", "--permutations", 4)
    assert (code, rows, kept) == (2, [], [])
    assert shown.startswith("4 of 4 questions got no answer")


def test_rows_kept_by_a_kill_need_no_server(ask, tmp_path):
    with OddServer(send) as server:
        _, _, rows, _ = ask(server)
    (tmp_path / "p.jsonl").unlink()
    with Journal(tmp_path / "p.jsonl") as journal:
        journal.append(rows)
    code, shown, again, _ = ask(server)
    assert (code, again) == (0, rows), shown


def test_rows_of_another_way_or_model_are_never_mixed(ask, tmp_path):
    """A server that changes between two runs of one command: each file is of one kind."""

    def fail_later(handler, good):
        send(handler, good, 500 if handler.asked > 3 else 200)

    def rename(handler, good):
        send(handler, good | {"model": "m-2024-08-06"})

    with OddServer(fail_later) as server:
        _, _, _, kept = ask(server, "completions", "letters")
        assert [row["scoring_way"] for row in kept] == ["ids"] * 2
        server.behave = refuse_ids
        code, shown, rows, _ = ask(server, "completions", "letters")
        assert code == 0, shown
        assert [row["scoring_way"] for row in rows] == ["echo"] * 4
        assert {row["served_model"] for row in rows} == {"m"}
        # A finished file stays this command's, whichever way the server would answer now.
        server.behave = send
        assert ask(server, "completions", "letters")[0] == 0
        # Rows that are complete make the file again, and those of the other way still wait.
        (tmp_path / "p.jsonl").unlink()
        server.asked = 0
        code, shown, rows, kept = ask(server, "completions", "letters")
        assert (code, server.asked) == (0, 0), shown
        assert [row["scoring_way"] for row in rows] == ["echo"] * 4
        assert [row["scoring_way"] for row in kept].count("ids") == 2
        shutil.rmtree(tmp_path / "p.jsonl.parts")
        (tmp_path / "p.jsonl").unlink()
        server.behave = rename
        code, shown, rows, _ = ask(server, "completions", "letters")
        assert code == 0, shown
        assert {row["served_model"] for row in rows} == {"m-2024-08-06"}
    assert len(read_predictions(tmp_path / "p.jsonl").ids) == 4


def test_the_way_is_said(ask, monkeypatch):
    printed = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
    with OddServer(refuse_ids) as server:
        code, shown, _, _ = ask(server, "completions", "letters")
    assert code == 0, shown
    assert any(
        line.startswith("the server answers as model m; options are scored") and "(echo)" in line
        for line in printed
    )


def test_a_redirect_sends_the_key_nowhere(ask):
    with OddServer(send) as other:

        def redirect(handler, good):
            send(handler, b"", 307, {"Location": f"{other.url}/chat/completions"})

        with OddServer(redirect) as server:
            code, shown, _, _ = ask(server)
    assert code == 2
    assert f"give the address where it leads as --server: {other.url}" in shown
    assert (server.asked, other.asked) == (1, 0)


def test_a_dead_server_is_not_asked_for_ever():
    messages = [{"role": "user", "content": "Which?"}]
    with OddServer(fail_with(500)) as server:
        engine = ChatEngine(Connection(server.url, "m", retries=0, concurrency=8))
        answers = engine.score([ChatRequest(messages, ["A", "B"])] * (3 * PATIENCE))
    assert all(isinstance(answer, EngineError) for answer in answers)
    assert PATIENCE <= server.asked < PATIENCE + 8


def test_ctrl_c_ends_requests_that_hang(questions, tmp_path):
    """One line, exit code 130 and the kept rows, long before the requests would end."""
    output = tmp_path / "p.jsonl"
    # The trial is a short question, and must not hang.
    longest = max(ROWS, key=lambda row: len(json.dumps(row)))
    with OddServer(hang, only=longest["question"]) as server:
        flags = list_flags(server, questions, output, "chat", "generate", "--timeout", 600)
        process = warm_processes.start(["eval/predict.py", *flags], ROOT)
        deadline = time.monotonic() + 60
        while server.asked < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.asked == 5
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, complaint = process.communicate(timeout=60)
        assert time.monotonic() - began < LONGEST - 1
    assert process.returncode == 130
    assert "Traceback" not in complaint
    assert complaint.splitlines()[-1].endswith("the same command goes on from there")


@pytest.mark.parametrize(
    ("asked", "answers", "right"),
    [
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4", "gpt-4-0613", True),
        ("mistral-large-latest", "mistral-large-2411", True),
        ("llama3", "llama3:latest", True),
        ("meta-llama/Llama-3-8B", "Llama-3-8B", True),
        ("Llama-3-8B", "/data/models/Llama-3-8B", True),
        ("/models/tuned/", "/models/tuned", True),
        ("m", None, True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o", "gpt-4o-mini-2024-07-18", False),
        ("llama-3", "llama-3-70b", False),
        ("qwen-2", "qwen-2.5", False),
        ("a/model", "b/model", False),
        ("tgi", "meta-llama/Llama-3-8B", False),
        ("m", "/", False),
    ],
)
def test_which_names_are_the_models_own(asked, answers, right):
    assert Connection("http://127.0.0.1:9/v1", asked).is_ours(answers) is right


def test_served_model_names_another(ask):
    def rename(handler, good):
        send(handler, good | {"model": "deployed"})

    with OddServer(rename) as server:
        code, shown, _, _ = ask(server)
        assert (code, "say so by --served_model" in shown) == (2, True), shown
        code, shown, rows, _ = ask(server, "chat", "generate", "--served_model", "deployed")
    assert code == 0, shown
    assert {row["served_model"] for row in rows} == {"deployed"}
    assert {row["model"] for row in rows} == {"m"}


ADDRESSES = {
    "ftp://host/v1": "expected http:// or https://",
    "127.0.0.1:8000/v1": "expected http:// or https://",
    "localhost:8000": "expected http:// or https://",
    "http://": "expected http:// or https://",
    "http:///v1": "expected http:// or https://",
    "http://:8000/v1": "expected http:// or https://",
    "http://host:port/v1": "expected http:// or https://",
    "http://host:0/v1": "expected http:// or https://",
    "http://host:99999/v1": "expected http:// or https://",
    "http://[::1/v1": "expected http:// or https://",
    "http://::1:8000/v1": "expected http:// or https://",
    "http://[nonsense]/v1": "expected http:// or https://",
    "http://host/v1\n": "at place 15",
    "http://ho st/v1": "at place 10",
    "http://host\0/v1": "at place 12",
    "http://höst/v1": "at place 9",
    "http://host\udcff/v1": "not valid UTF-8",
    f"http://user:{SECRET}@host/v1": "has an @",
    f"{SECRET}@host": "has an @",
    f"http://host/v1?key={SECRET}": "has a ? or #",
    "http://host/v1#x": "has a ? or #",
    "http://host/v1/chat/completions": "give the address up to /v1",
    f"http://{'a' * 70}.example/v1": "cannot be",
    "http://xn--/v1": "",
    "": "give the server's address",
}


@pytest.mark.parametrize("address", ADDRESSES, ids=range(len(ADDRESSES)))
def test_odd_addresses(ask, address):
    server = OddServer(send)
    server.http.server_close()
    server.url = address
    code, shown, _, _ = ask(server)
    assert (code, shown.count("\n")) == (2, 1), shown
    assert ADDRESSES[address] in shown
    assert SECRET not in shown


def test_an_address_of_version_six_is_taken(ask):
    server = OddServer(send)
    server.http.server_close()
    server.url = "http://[::1]:9/v1"
    code, shown, _, _ = ask(server)
    assert code == 2
    assert "cannot be reached" in shown


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OPENAI_API_KEY", f"{SECRET}\n", "at place 27 of 27"),
        ("OPENAI_API_KEY", f"{SECRET} x", "at place 27 of 28"),
        ("OPENAI_API_KEY", f"{SECRET}é", "at place 27 of 27"),
        ("OPENAI_API_KEY", f"{SECRET}\udcff", "at place 27 of 27"),
        ("HTTP_PROXY", f"ftp://user:{SECRET}@proxy", "HTTP_PROXY is no address of a proxy"),
        ("http_proxy", "http://proxy:port", "http_proxy is no address of a proxy"),
        ("HTTPS_PROXY", "http://", "HTTPS_PROXY is no address of a proxy"),
        ("ALL_PROXY", "socks5://proxy\n", "ALL_PROXY is no address of a proxy"),
        ("OPENAI_ORG_ID", f"{SECRET}\nX: y", ""),
        ("OPENAI_PROJECT_ID", "é", ""),
        ("SSL_CERT_FILE", "/nowhere/at/all", ""),
        ("NO_PROXY", "[::", ""),
    ],
)
def test_odd_values_of_the_environment(ask, monkeypatch, name, value, message):
    with OddServer(send) as server:
        monkeypatch.setenv(name, value)
        code, shown, rows, _ = ask(server)
    if code == 0:  # Some values have no meaning for a plain connection to this machine.
        assert (message, len(rows)) == ("", 4)
        return
    assert (code, shown.count("\n")) == (2, 1), shown
    assert message in shown
    assert SECRET not in shown


@pytest.mark.parametrize("variable", [SECRET, "A=B", "", "A\0B"])
def test_odd_names_of_the_keys_variable(ask, variable):
    with OddServer(send) as server:
        code, shown, _, _ = ask(server, "chat", "generate", "--api_key_variable", variable)
    assert (code, shown.count("\n"), server.asked) == (2, 1, 0), shown
    assert "expected the name of an environment variable" in shown
    assert SECRET not in shown
