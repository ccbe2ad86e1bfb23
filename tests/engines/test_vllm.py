"""The real vLLM engine and server against transformers, in float32 on a CPU: scores, adapter,
generation.

vLLM pins its own versions of other packages, so it runs in an environment of its own:
MEDQLORA_VLLM_PYTHON names its interpreter (`.ci/run` makes one with the community build for CPUs).
"""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict

import pytest
import torch
from conftest import DEMO, ROOT, build_model, real, run_script
from transformers import AutoTokenizer

from medqlora.core.config import DataEntry, Lora
from medqlora.data.reading import read_examples
from medqlora.engines.hf import HfEngine
from medqlora.engines.interface import Sampling
from medqlora.evaluation.method import Method
from medqlora.evaluation.questions import prepare_questions
from medqlora.model.adapter import attach_adapter, save_adapter
from medqlora.model.attention.documents import DOCUMENTS
from medqlora.model.identity import architecture_hash
from medqlora.prompts.chat_template import make_encoder

PYTHON = os.environ.get("MEDQLORA_VLLM_PYTHON") or (
    sys.executable if importlib.util.find_spec("vllm") else None
)
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        PYTHON is None, reason="vLLM is not here; set MEDQLORA_VLLM_PYTHON to a Python that has it"
    ),
]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
QUESTIONS = DataEntry(format="medmcqa", path=str(DEMO / "data" / "test.jsonl"), limit=24)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A small model whose head width vLLM's CPU kernels know, with a tokenizer that splits some
    letters, and an adapter.
    """
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(real("models/stories260k"))
    model = build_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = attach_adapter(
        model, Lora(r=8, alpha=32, target_modules=("q_proj", "v_proj", "down_proj")), seed=0
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    save_adapter(
        folder / "adapter",
        adapted,
        {"base": str(folder / "base"), "architecture_sha256": architecture_hash(model.config)},
    )
    return folder


def prepare(folder):
    """Requests with few-shot examples in common, letters of one and of two tokens."""
    encoder = make_encoder(AutoTokenizer.from_pretrained(folder / "base"), "plain")
    pool, _ = read_examples(
        DataEntry(format="medmcqa", path=str(DEMO / "data" / "train.jsonl"), limit=30), "train"
    )
    asked, shared = prepare_questions(
        encoder, read_examples(QUESTIONS, "test")[0], Method(num_fewshot=1), pool, 511
    )
    requests = [request for entry in asked for request in entry.requests]
    assert {len(option) for request in requests for option in request.options} == {1, 2}
    return encoder, requests, shared


SCRIPT = """
import json, sys
from pathlib import Path
from medqlora.engines.interface import EngineError, Request, Sampling
from medqlora.engines.vllm import VllmEngine
from dataclasses import asdict
if __name__ == "__main__":
    folder, given = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    requests = [Request(*pair) for pair in given["requests"]]
    engine = VllmEngine(str(folder / "base"), folder / "adapter", dtype="float32", max_length=511)
    result = {"exact": engine.exact, "tuned": engine.score(requests, given["shared"])}
    sampling = Sampling(8, (given["stop"],), lambda ids: " ".join(map(str, ids)))
    answers = engine.generate([request.prefix for request in requests], sampling)
    result["answers"] = [[asdict(answer) for answer in some] for some in answers]
    engine.lora, engine.unproven = None, True
    result["base"] = engine.score(requests, given["shared"])
    try:  # what a vLLM that ignores the adapter would give
        engine.prove_adapter(requests[:2])
    except EngineError as error:
        result["refused"] = str(error)
    Path(sys.argv[3]).write_text(json.dumps(result))
"""


def test_engine_agrees_with_transformers(model_dir, tmp_path):
    encoder, requests, shared = prepare(model_dir)
    given = {
        "requests": [[r.prefix, r.options] for r in requests],
        "shared": shared,
        "stop": encoder.end_id,
    }
    (tmp_path / "given.json").write_text(json.dumps(given))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [
        PYTHON,
        tmp_path / "script.py",
        model_dir,
        tmp_path / "given.json",
        tmp_path / "result.json",
    ]
    done = subprocess.run(
        list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())

    from transformers import AutoModelForCausalLM

    from medqlora.model.adapter import load_adapter

    base = AutoModelForCausalLM.from_pretrained(
        model_dir / "base", dtype=torch.float32, attn_implementation=DOCUMENTS
    )
    expected = HfEngine(base, "varlen").score(requests, shared)
    tuned_engine = HfEngine(load_adapter(base, model_dir / "adapter"), "varlen")
    tuned = tuned_engine.score(requests, shared)
    assert torch.allclose(torch.tensor(result["base"]), torch.tensor(expected), atol=1e-4)
    assert torch.allclose(torch.tensor(result["tuned"]), torch.tensor(tuned), atol=1e-4)
    assert not torch.allclose(torch.tensor(tuned), torch.tensor(expected), atol=1e-2)
    sampling = Sampling(8, (encoder.end_id,), lambda ids: " ".join(map(str, ids)))
    answers = tuned_engine.generate([request.prefix for request in requests], sampling)
    assert result["answers"] == [[asdict(answer) for answer in some] for some in answers]
    assert "does not apply it" in result["refused"]


def test_command_and_server_agree_with_transformers(model_dir, tmp_path):
    """eval/predict.py with --engine hf, vllm and openai (a vLLM server), held together by
    eval/compare.py.
    """
    common = [
        "--format",
        "medmcqa",
        "--path",
        str(DEMO / "data" / "test.jsonl"),
        "--limit",
        "24",
        "--prompt_style",
        "lm_eval",
    ]
    assert (
        run_script(
            "eval/predict.py",
            "--model",
            model_dir / "base",
            *common,
            "--dtype",
            "float32",
            "--output",
            tmp_path / "hf.jsonl",
        ).returncode
        == 0
    )
    command = [
        PYTHON,
        "eval/predict.py",
        "--model",
        model_dir / "base",
        *common,
        "--dtype",
        "float32",
        "--engine",
        "vllm",
        "--output",
        tmp_path / "vllm.jsonl",
    ]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [
        PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model_dir / "base",
        "--served-model-name",
        "small",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "512",
    ]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            list(map(str, serve)), env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and server.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer,
            ):
                if answer.status == 200:
                    break
            time.sleep(1)
        done = run_script(
            "eval/predict.py",
            "--engine",
            "openai",
            "--server",
            f"http://127.0.0.1:{port}/v1",
            "--model",
            "small",
            "--tokenizer",
            model_dir / "base",
            "--max_length",
            "511",
            *common,
            "--output",
            tmp_path / "server.jsonl",
        )
        assert done.returncode == 0, done.stderr + (tmp_path / "server.log").read_text()[-2000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait(60)
    files = [tmp_path / f"{name}.jsonl" for name in ("hf", "vllm", "server")]
    gate = run_script(
        "eval/compare.py", *files, "--max_disagreement", "0", "--max_mean_difference", "0.0001"
    )
    assert gate.returncode == 0, gate.stdout
