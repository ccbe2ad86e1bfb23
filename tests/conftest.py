"""Shared by the tests: where the real data lies, and tiny models built in code."""

import contextlib
import functools
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
import warm_processes
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
)

torch.set_num_threads(1)  # the models here are so small that threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the scripts that tests start
# bitsandbytes imports torch's compiler at every start otherwise, for functions that nothing calls
os.environ["TORCHDYNAMO_DISABLE"] = "1"

# No test may depend on the machine's speed, and hypothesis would fail one that takes long.
hypothesis.settings.register_profile("any_machine", deadline=None)
hypothesis.settings.load_profile("any_machine")

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipes" / "demo"
DATA = Path(os.environ.get("MEDQLORA_TEST_DATA") or ROOT.parent / "shared" / "data")
TOKENIZERS = ("llama-3", "qwen2.5", "phi-3", "smollm2")


def real(path: str) -> Path:
    """A real data file, or a skip that says how to get one."""
    found = DATA / path
    if not found.exists():
        pytest.skip(
            f"real data {path} is not here; set MEDQLORA_TEST_DATA to the folder that has it"
        )
    return found


@functools.cache  # loading takes seconds; a test that changes one does so with monkeypatch
def real_tokenizer(name: str):
    folder = real(f"tokenizers/{name}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = folder / "instruct_chat_template.jinja"
    if template.exists():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return real_tokenizer(request.param)


@pytest.fixture(scope="session")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "base")


SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "gemma2": lambda: Gemma2Config(
        **SMALL, head_dim=16, sliding_window=16, query_pre_attn_scalar=16
    ),
    "phi3": lambda: Phi3Config(**SMALL, sliding_window=24),
}


def build_model(architecture: str, attention: str | None = None, **changes) -> torch.nn.Module:
    """A small random model whose outputs are not all alike."""
    config = ARCHITECTURES[architecture]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention or "eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def run_script(
    *arguments: str, cwd: Path = ROOT, cold: bool = False, **options
) -> subprocess.CompletedProcess:
    """Run a script of the project as a user does; `cold` starts a new interpreter for it."""
    if cold:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=600, **options
        )
    process = warm_processes.start(arguments, cwd, **options)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_inside(script: Path, arguments: list[str], monkeypatch) -> tuple[int, str]:
    """Run a script in this process (imports cost seconds); -> exit code, stderr."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, err.getvalue()


def pytest_configure(config) -> None:
    """Tests are of the CPU, on a machine with a GPU too: some compare runs bit by bit, others start
    two processes. Only -m gpu shows it.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# Files that take minutes, or wait for other programs, begin first when the tests run on several
# cores.
LONGEST = (
    "test_readme",
    "test_trust",
    "test_lowest_versions",
    "test_gpu",
    "test_slurm",
    "test_strategies",
    "test_processes",
    "test_vllm",
    "test_end_to_end",
    "test_predict",
    "test_odd_servers",
    "test_damaged_models",
    "test_interrupts",
)


def pytest_collection_modifyitems(items: list) -> None:
    ranks = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.module.__name__, len(ranks)))
