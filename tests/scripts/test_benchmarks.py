"""The benchmarks' figures follow their definitions, and their commands run on small input."""

import json
import math
import runpy
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import DEMO, ROOT, run_inside, run_script
from hypothesis import given
from hypothesis import strategies as st

from medqlora.engines.latency import (
    LatencyError,
    Served,
    draw_arrivals,
    parse_objectives,
    summarize,
)

CONFIG = ROOT / "recipes" / "configs" / "demo.yaml"
THROUGHPUT = ROOT / "bench" / "throughput.py"
LATENCY = ROOT / "bench" / "latency.py"
DATA = ROOT / "bench" / "data.py"


def test_a_misspelt_flag_is_refused_before_torch_is_imported():
    """Importing torch takes seconds, after which nobody wants to read of a misspelt flag."""
    scripts = [*(ROOT / "bench").glob("*.py"), *(ROOT / "bench" / "peers").glob("*.py")]
    # Another interpreter runs this one, and only sft.py calls it.
    scripts = [script for script in scripts if script.name != "llamafactory_train.py"]
    code = (
        "import runpy, sys\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv = [script, '--mispelt', '3']\n"
        "    try:\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 2, script\n"
        "    assert 'torch' not in sys.modules, script\n"
    )
    done = run_script("-c", code, *scripts, cold=True)
    assert done.returncode == 0, done.stderr


# ---- definitions ---------------------------------------------------------------------------------


def test_latencies_of_a_known_answer():
    served = Served(sent=10.0, arrivals=(10.5, 10.6, 10.8), tokens=3)
    assert (served.ttft, served.e2el) == pytest.approx((0.5, 0.8))
    assert served.tpot == pytest.approx(0.15)
    assert served.itl == pytest.approx([0.1, 0.2])
    one = Served(10.0, (10.5,), 1)
    assert (one.tpot, one.itl) == (None, [])
    summary = summarize([served, one], 2.0, {"ttft": 600, "tpot": 140})
    assert summary["requests_per_second"] == 1.0
    assert summary["output_tokens_per_second"] == 2.0
    # The first is too slow per token. A single token has no TPOT to miss.
    assert summary["goodput_requests_per_second"] == 0.5
    assert summary["tpot_ms"]["p50"] == pytest.approx(150)
    assert summarize([one], 1.0)["tpot_ms"] is None
    assert summarize([one], 1.0)["goodput_requests_per_second"] is None


@given(st.floats(0, 1e3), st.lists(st.floats(1e-4, 10), min_size=2, max_size=20))
def test_parts_of_a_latency_sum_to_it(sent, gaps):
    served = Served(sent, tuple(np.cumsum([sent + gaps[0], *gaps[1:]])), len(gaps))
    assert math.isclose(served.ttft + sum(served.itl), served.e2el, rel_tol=1e-6, abs_tol=1e-9)
    assert math.isclose(
        served.ttft + served.tpot * (served.tokens - 1), served.e2el, rel_tol=1e-6, abs_tol=1e-9
    )


def test_arrivals_have_the_rate_they_are_asked_for():
    for seed in range(5):
        assert len(few := draw_arrivals(32, 4.0, seed)) / few[-1] == pytest.approx(4.0)
    times = draw_arrivals(20_000, 8.0, 0)
    assert np.all(np.diff(times) >= 0)
    # The deviation of an exponential distribution equals its mean.
    assert np.std(np.diff(times)) == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize("text", ["ttft", "itl=5", "ttft=fast", "e2el=-1"])
def test_goodput_objectives_without_meaning_are_refused(text):
    with pytest.raises(LatencyError):
        parse_objectives([text])


# ---- throughput ----------------------------------------------------------------------------------


@pytest.mark.full
def test_throughput_of_a_sweep(tmp_path):
    """Two cases run. The third cannot, and is recorded with its reason."""
    done = run_script(
        THROUGHPUT,
        "--config",
        CONFIG,
        "--steps",
        "2",
        "--warm_up",
        "1",
        "--json",
        tmp_path / "a.json",
        "--plot",
        tmp_path / "a.png",
        "--sweep",
        "model.attention=varlen,sdpa,flash",
        "--data.max_length",
        "128",
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert [case["case"]["model.attention"] for case in cases] == ["varlen", "sdpa", "flash"]
    assert "flash needs" in cases[2]["error"]
    for case in cases[:2]:
        assert (
            case["tokens_per_second"]
            == case["real_tokens_per_second"]
            > case["supervised_tokens_per_second"]
            > 0
        )
        times = case["step_seconds"]
        assert len(times["all"]) == 2 and times["p50"] <= times["p90"] <= times["p99"]  # noqa: PT018
        assert 0 <= case["data_wait_fraction"] < 1
        # FLOPs per token are (4 + 2 x recomputed / layers) x weights. The model has 4 layers of
        # 4 x 128 x 128 + 3 x 128 x 384 weights, and 327,680 weights of adapters.
        per_token = case["model_flops_per_second"] / case["tokens_per_second"]
        assert per_token == pytest.approx(
            4 * (4 * (4 * 128 * 128 + 3 * 128 * 384) + 327_680), rel=1e-6
        )
        assert case["loss"] == pytest.approx(cases[0]["loss"], rel=0.02)  # Both do the same work.
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweep", "data.max_length"], "expected section.key=value"),
        (["--sweep", "data.max_lenght=1,2"], "did you mean"),
        (["--steps", "0"], "expected a whole number from 1"),
        (["--peak_tflops", "-1"], "above 0"),
        (["--plot", "a.xyz"], "ends in .png"),
        (["--model.base", "nothing.json"], "nothing.json"),
        (["--training.max_tokens_per_batch", "700"], "not a multiple"),
    ],
)
def test_throughput_refuses_before_any_work(flags, message, monkeypatch):
    code, complaint = run_inside(THROUGHPUT, ["--config", CONFIG, *flags], monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1)
    assert message in complaint


# ---- latency -------------------------------------------------------------------------------------


def test_latency_of_transformers(monkeypatch, tmp_path):
    flags = [
        "--model",
        DEMO / "base",
        "--requests",
        "4",
        "--output_tokens",
        "5",
        "--concurrency",
        "1,4",
        "--rate",
        "50",
        "--goodput",
        "e2el=60000",
    ]
    code, complaint = run_inside(LATENCY, [*flags, "--json", tmp_path / "a.json"], monkeypatch)
    assert code == 0, complaint
    loops = json.loads((tmp_path / "a.json").read_text())["loops"]
    assert [next(iter(loop)) for loop in loops] == ["concurrency", "concurrency", "rate"]
    for loop in loops:
        assert loop["requests"] == 4
        assert loop["output_tokens_per_second"] == pytest.approx(5 * loop["requests_per_second"])
        assert loop["goodput_requests_per_second"] == loop["requests_per_second"]
        assert loop["ttft_ms"]["p50"] < loop["e2el_ms"]["p50"]
    # Four requests at a time wait for each other.
    assert loops[1]["ttft_ms"]["p99"] > loops[0]["ttft_ms"]["p99"]


def test_letters_and_sizes(monkeypatch, tmp_path):
    flags = [
        "--model",
        DEMO / "base",
        "--json",
        tmp_path / "a.json",
        "--scoring",
        "--requests",
        "6",
    ]
    assert run_inside(LATENCY, flags, monkeypatch)[0] == 0
    scoring = json.loads((tmp_path / "a.json").read_text())["scoring"]
    assert scoring["questions"] == 6  # As many are asked alone.
    assert scoring["questions_per_second"] > 0
    assert not any("tpot" in key for key in scoring)
    flags = ["--model", DEMO / "base", "--json", tmp_path / "b.json", "--sizes"]
    assert run_inside(LATENCY, flags, monkeypatch)[0] == 0
    (sizes,) = json.loads((tmp_path / "b.json").read_text())["sizes"]
    assert sizes["loaded_nf4_bytes"] < sizes["loaded_16_bit_bytes"]
    assert sizes["loaded_16_bit_bytes"] == pytest.approx(2 * 1_015_936, rel=0.01)


class Server(ThreadingHTTPServer):
    """Streams three tokens for each completion, 20 ms apart, then a piece without text.

    Args:
        left: requests that are served whole. Later answers break off after one piece.
        silent: whether a broken answer ends without an error message.
        plain: whether the server refuses ignore_eos and usage.
    """

    left = 10**6
    silent = False
    plain = False

    def handle_error(self, *_):
        """Keep the traceback of a client that has gone away out of the script's stderr."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.plain and ("ignore_eos" in body or "stream_options" in body):
            self.send_response(400)
            self.end_headers()
            return
        self.server.left -= 1
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for number in range(4):
            time.sleep(0.02)
            choice = {
                "index": 0,
                "text": " a" if number < 3 else "",
                "finish_reason": None if number < 3 else "length",
                "logprobs": None,
            }
            self.send({"choices": [choice]})
            if self.server.left < 0:
                if not self.server.silent:
                    self.wfile.write(b'data: {"error": {"message": "engine died"}}\n\n')
                return
        if not self.server.plain:
            self.send(
                {
                    "choices": [],
                    "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
                }
            )
        self.wfile.write(b"data: [DONE]\n\n")

    def send(self, piece: dict) -> None:
        common = {"id": "1", "object": "text_completion", "created": 0, "model": "m"}
        self.wfile.write(f"data: {json.dumps(piece | common)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def flags_for(server) -> list:
    return [
        "--engine",
        "openai",
        "--server",
        f"http://127.0.0.1:{server.server_port}/v1",
        "--model",
        "m",
        "--tokenizer",
        DEMO / "base",
        "--requests",
        "4",
    ]


@pytest.mark.parametrize("plain", [False, True])
def test_latency_of_a_server(server, plain, monkeypatch, tmp_path):
    """Pieces and tokens are counted as in vLLM's benchmark: the piece without text is an arrival,
    and tokens are the server's own count or the tokenizer's.
    """
    server.plain = plain
    code, complaint = run_inside(
        LATENCY,
        [
            *flags_for(server),
            "--concurrency",
            "4",
            "--output_tokens",
            "3",
            "--json",
            tmp_path / "a.json",
        ],
        monkeypatch,
    )
    assert code == 0, complaint
    report = json.loads((tmp_path / "a.json").read_text())
    (loop,) = report["loops"]
    assert report["complete"]
    assert loop["short_answers"] == 0
    assert loop["itl_ms"]["p50"] > 19  # The server pauses 20 ms between pieces.
    assert loop["e2el_ms"]["p50"] >= 79
    assert loop["tpot_ms"]["mean"] == pytest.approx(
        (loop["e2el_ms"]["mean"] - loop["ttft_ms"]["mean"]) / 2
    )
    assert loop["output_tokens_per_second"] == pytest.approx(3 * loop["requests_per_second"])


@pytest.mark.parametrize("silent", [False, True])
def test_server_that_dies_leaves_what_was_measured(server, silent, monkeypatch, tmp_path):
    server.left = 2 + 4 + 1  # the warm-up, the first loop, and one request of the second
    server.silent = silent
    code, complaint = run_inside(
        LATENCY,
        [*flags_for(server), "--concurrency", "1,2", "--json", tmp_path / "a.json"],
        monkeypatch,
    )
    assert (code, complaint.count("\n")) == (2, 1), complaint
    assert "server http://127.0.0.1" in complaint
    report = json.loads((tmp_path / "a.json").read_text())
    assert len(report["loops"]) == 1
    assert not report["complete"]


def test_every_load_has_its_own_questions(monkeypatch):
    script = runpy.run_path(str(LATENCY))
    monkeypatch.setattr(
        sys, "argv", ["latency.py", "--model", str(DEMO / "base"), "--requests", "5"]
    )
    requests, distinct = script["read_questions"](script["parse_arguments"](), 3)
    assert len({tuple(request.prefix) for request in requests}) == 15
    assert distinct
    monkeypatch.setattr(
        sys, "argv", ["latency.py", "--model", str(DEMO / "base"), "--requests", "500"]
    )
    requests, distinct = script["read_questions"](script["parse_arguments"](), 2)
    assert len(requests) == 1_000
    assert not distinct


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "m", "--engine", "openai"], "needs --server"),
        (["--model", str(DEMO / "base"), "--goodput", "itl=3"], "expected ttft="),
        (["--model", str(DEMO / "base"), "--goodput", "ttft=nan"], "expected ttft="),
        (["--model", str(DEMO / "base"), "--requests", "0"], "expected a whole number from 1"),
        (["--model", str(DEMO / "base"), "--concurrency", "0.5"], "expected whole numbers"),
        (["--model", str(DEMO / "base"), "--concurrency", "two"], "expected whole numbers"),
        (["--model", str(DEMO / "base"), "--rate", "inf"], "expected numbers above 0"),
        (
            ["--model", str(DEMO / "base"), "--rate", "5", "--seed", "-1"],
            "expected a whole number from 0",
        ),
        (["--model", str(DEMO / "base"), "--engine", "vllm", "--dtype", "nf4"], "merge first"),
        (["--model", str(DEMO / "base"), "--sizes", "nowhere"], "no such folder"),
        (
            [
                "--model",
                "m",
                "--engine",
                "openai",
                "--server",
                "http://127.0.0.1:9/v1",
                "--tokenizer",
                str(DEMO / "base"),
            ],
            "is it running",
        ),
    ],
)
def test_latency_refuses(flags, message, monkeypatch):
    code, complaint = run_inside(LATENCY, flags, monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1), complaint
    assert message in complaint


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.full
def test_data_stages(tmp_path):
    done = run_script(DATA, "--rows", "2000", "--json", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    ours = results["ours"]
    whole = results["whole"]
    assert set(ours["stages"]) == {"read", "clean", "render", "tokenize", "plan", "write"}
    assert ours["rows"] == whole["rows"] >= 1990  # A few equal rows are dropped.
    assert ours["tokens"] == whole["tokens"]
    done = run_script(DATA, "--tokenizer", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenizer", "nowhere", "--data", "nowhere.jsonl"], "nowhere: not here"),
        (
            ["--tokenizer", DEMO / "base", "--data", DEMO / "data" / "train.jsonl", "--rows", "20"],
            "expected a whole number from 100",
        ),
        (
            [
                "--tokenizer",
                DEMO / "base",
                "--data",
                DEMO / "data" / "train.jsonl",
                "--llamafactory",
                sys.executable,
            ],
            "no interpreter with llamafactory",
        ),
        (
            [
                "--tokenizer",
                DEMO / "base",
                "--data",
                DEMO / "data" / "train.jsonl",
                "--llamafactory",
                "nowhere",
            ],
            "no interpreter with llamafactory",
        ),
    ],
)
def test_comparison_of_trainers_refuses_missing_files_and_packages(flags, message, monkeypatch):
    code, complaint = run_inside(ROOT / "bench" / "peers" / "sft.py", flags, monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1), complaint
    assert message in complaint


# ---- recorded figures ----------------------------------------------------------------------------


def test_pages_hold_the_recorded_figures(monkeypatch, tmp_path):
    tables = ROOT / "bench" / "tables.py"
    pages = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "eval" / "README.md"]
    assert run_inside(tables, ["--check", ROOT / "README.md", *pages], monkeypatch) == (0, "")
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for name in runpy.run_path(str(tables))["TABLES"]:
        assert f"<!-- table {name} -->" in text, f"table {name} stands on no page"
    page = tmp_path / "page.md"
    page.write_text("<!-- table sft -->\n| 100 x |\n<!-- end of sft -->\n")
    assert run_inside(tables, ["--check", page], monkeypatch)[0] == 2
    assert run_inside(tables, ["--write", page], monkeypatch) == (0, "")
    assert run_inside(tables, ["--check", page], monkeypatch) == (0, "")
    page.write_text("<!-- table guesses -->\n<!-- end of guesses -->\n")
    code, complaint = run_inside(tables, ["--check", page], monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1)


def test_recorded_figures_name_command_and_versions_but_no_private_folders():
    for path in (ROOT / "bench" / "results").rglob("*.json"):
        text = path.read_text()
        assert "shapes" in path.parts or (
            "versions" in text and ("command" in text or "settings" in text)
        ), path
        assert not any(place in text for place in ('"/home', '"/tmp', '"/work', '"/root')), path


def test_measured_memory_is_near_the_forecast():
    for path in (ROOT / "bench" / "results" / "cpu-2-cores").glob("memory_*.json"):
        assert abs(json.loads(path.read_text())["relative_error"]) < 0.05, path
