"""Odd input of every kind: one line and exit code 2, never a traceback, never a silent acceptance.

Each case is a mistake, so each has to be refused. Cases run in this process, because the imports of
a command take seconds.
"""

import collections
import json
import traceback
import typing
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, run_inside

from medqlora.core.command import describe_refusal
from medqlora.core.config import DataEntry
from medqlora.core.config_loading import all_keys, flatten_types, load_config
from medqlora.core.errors import UserError
from medqlora.data.reading import read_entry
from medqlora.training.stages import read_stages

pytestmark = [
    pytest.mark.full,  # Some hundred starts of commands take a minute.
]

LONG = "n" * 300  # No file system takes a name of over 255 bytes.
DEEP = 20_000  # Python's readers of JSON and YAML give up far below this depth.
# Each of these is a mistake where a number is expected. YAML 1.1 reads 1:30 as 90.
NO_NUMBERS = [".nan", ".inf", "-.inf", "true", "abc", "[]", "{}", str(2**70), str(-(2**70)), "1:30"]
NO_NUMBERS += ["010", "1e999", "'1,5'", "2026-01-01", "[1]", '"\\ud800"', "!!python/object:os x"]
NO_CHOICES = ["nonsense", "''", "3.5", "[]", "{}", "true", '"a\\0b"']
NO_TEXTS = ["[]", "{}", "true", "3", ".inf", '"a\\0b"', '"\\udfff"']
NO_FLAGS_NUMBERS = ["nan", "inf", "-5", "abc", "", str(2**70), "1e999", "1:30", "1;5"]


class Tally:
    """Counts how inputs ended, and keeps those that did not end in one line."""

    def __init__(self):
        self.kinds = collections.Counter()
        self.faults = []

    def add(self, name: str, kind: str, text: str = "") -> None:
        self.kinds[kind] += 1
        if kind != "one line":
            self.faults.append(f"{kind}: {name}: {text[-300:]}")

    def try_call(self, name: str, call) -> None:
        try:
            call()
        except UserError as error:
            clear = "\n" not in str(error) and len(str(error)) < 700
            self.add(name, "one line" if clear else "not one line", str(error))
        except OSError as error:
            # The frame of every command says such an error in one line; a script's case shows it.
            line = describe_refusal(error)
            self.try_call(name, lambda: refuse(line))
        except Exception:  # noqa: BLE001  # every error but ours is a fault
            self.add(name, "traceback", traceback.format_exc())
        else:
            self.add(name, "accepted")

    def try_script(self, script: str, arguments: list[str], monkeypatch) -> None:
        name = f"{script} {' '.join(map(ascii, arguments))[-200:]}"
        try:
            code, err = run_inside(ROOT / script, arguments, monkeypatch)
        except BaseException:  # noqa: BLE001  # pydantic's and torch's errors alike
            self.add(name, "traceback", traceback.format_exc())
            return
        lines = err.strip().splitlines()
        if code == 0:
            self.add(name, "accepted")
        elif code != 2 or len(lines) != 1 or "Traceback" in err:
            self.add(name, "not one line", f"{code} {err}")
        else:
            self.add(name, "one line")

    def check(self, least: int) -> None:
        assert not self.faults, (dict(self.kinds), "\n".join(self.faults[:40]))
        assert self.kinds["one line"] >= least, self.kinds


def refuse(line: str) -> typing.NoReturn:
    raise UserError(line)


def list_odd_values(field) -> list[str]:
    """YAML values that are mistakes for a field."""
    kinds = set(flatten_types(field.annotation))
    numbers = kinds & {int, float}
    if numbers:
        return NO_NUMBERS
    if any(typing.get_origin(kind) is typing.Literal for kind in kinds) and bool not in kinds:
        return NO_CHOICES
    if kinds <= {str, type(None)}:
        return NO_TEXTS
    return []


def test_odd_values_of_every_key(tmp_path):
    tally = Tally()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {base: some}\n")
    cases = [(f"--{key}", field) for key, field in all_keys().items()]
    cases += [(f"--data.train.0.{key}", field) for key, field in DataEntry.model_fields.items()]
    for flag, field in cases:
        for value in list_odd_values(field):
            if flag.endswith(".seed") and value == str(2**70):  # A seed may be of any size.
                continue
            if flag.endswith(".keep") and value == "[]":  # No column need be kept.
                continue
            given = [flag, value]
            if ".train.0." in flag:
                given = ["--data.train", "[{format: qa, path: a}]", *given]
            tally.try_call(f"{flag} {value}", lambda given=given: load_config(recipe, given))
    tally.check(400)


def deep_yaml(depth: int) -> str:
    return "model: " + "[" * depth + "]" * depth


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML_FILES = {
    "repeated key": "model: {base: a}\nmodel: {base: b}\n",
    "repeated inner key": "model:\n  base: a\n  base: b\n",
    "repeated key in a list": "model: {base: a}\ndata: {train: [{format: qa, format: mcq}]}\n",
    "endless aliases": LAUGHS,
    "alias in itself": "model: &m\n  base: *m\n",
    "unknown alias": "model: *nothing\n",
    "deep": deep_yaml(DEEP),
    "base 60": "model: {base: a}\ntraining: {max_steps: 1:30}\n",
    "octal": "model: {base: a}\ntraining: {seed: 0123}\n",
    "infinite": "model: {base: a}\ntraining: {lr: .inf}\n",
    "nan": "model: {base: a}\nlora: {alpha: .NaN}\n",
    "true as a number": "model: {base: a}\nlora: {r: yes}\n",
    "nan inside": "model: {base: a, template_arguments: {x: .nan}}\n",
    "NUL": 'model: {base: "a\\0b"}\n',
    "surrogate": 'model: {base: "\\uD800"}\n',
    "control character": "model: {base: a\x01}\n",
    "tab": "model:\n\tbase: a\n",
    "two documents": "model: {base: a}\n---\nmodel: {base: b}\n",
    "python object": "!!python/object/apply:os.system ['true']\n",
    "a list": "- a\n",
    "a text": "model\n",
    "list as key": "? [a, b]\n: c\n",
    "empty": "",
    "date that is none": "model: {base: 2026-13-45}\n",
    "user without home": "model: {base: ~nobody_of_this_name/x}\n",
}


def test_odd_yaml_files(tmp_path):
    tally = Tally()
    for name, text in YAML_FILES.items():
        path = tmp_path / "odd.yaml"
        path.write_text(text, encoding="utf-8")
        tally.try_call(name, lambda path=path: load_config(path))
    for name, content in (
        ("latin", b"model: {base: \xe9}\n"),
        ("UTF-16", b"\xff\xfem\0"),
        ("", b"\0"),
    ):
        path.write_bytes(content)
        tally.try_call(f"bytes {name}", lambda path=path: load_config(path))
    for path in odd_paths(tmp_path):
        tally.try_call(f"path {str(path)[-30:]}", lambda path=path: load_config(path))
    tally.check(30)


def test_odd_lists_of_stages(tmp_path):
    tally = Tally()
    path = tmp_path / "odd.yaml"

    def attempt(name: str, where: Path = path) -> None:
        tally.try_call(name, lambda: read_stages(where, [], tmp_path / "run"))

    for name, text in YAML_FILES.items():
        path.write_text(text, encoding="utf-8")
        attempt(name)
        indented = "".join(f"      {line}\n" for line in text.splitlines())
        path.write_text(f"stages:\n  - name: a\n    config:\n{indented}", encoding="utf-8")
        attempt(f"{name} inside")
    for where in odd_paths(tmp_path):
        attempt(f"path {str(where)[-30:]}", where)
        path.write_text(f"stages: [{{name: a, config: {json.dumps(str(where))}}}]")
        attempt(f"config {str(where)[-30:]}")
    for value in NO_TEXTS:
        path.write_text(f"stages: [{{name: {value}, config: a.yaml}}]")
        attempt(f"name {value}")
    path.write_text("stages: [{name: a, config: ~nobody_of_this_name/x}]")
    attempt("user without home")
    tally.check(60)


def odd_paths(folder: Path) -> list[Path]:
    loop = folder / "loop"
    if not loop.is_symlink():
        loop.symlink_to(loop)
    return [folder, folder / "nothing", folder / LONG, loop, loop / "x", Path("/dev/null/x")]


QUESTION = {
    "medmcqa": {"id": "1", "question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d"}
    | {"cop": 2, "exp": "why", "subject_name": "Anatomy"},
    "medqa": {
        "question": "Which?",
        "options": {"A": "a", "B": "b"},
        "answer_idx": "A",
        "answer": "a",
    },
    "mcq": {"question": "Which?", "options": ["a", "b", "c"], "answer": "A"},
    "medquad": {"question": "What?", "answer": "This."},
    "qa": {"question": "What?", "answer": "This."},
}
NEEDED = {"question", "opa", "opb", "opc", "opd", "cop", "options", "answer_idx", "answer"}
ODD_JSON = ['""', '"  "', "[]", "{}", "true", "[[]]", '{"a": {}}', "1e999", '"\\ud800"']
ODD_JSON += ["[" * DEEP + "]" * DEEP, "-1", "NaN", "null", str(2**70), "0.5", '["", ""]']
# A number is a text where a text is wanted, and NaN and null are how some files say that a cell is
# empty.
TEXTUAL = ("-1", str(2**70), "0.5", "1e999", "NaN", "null")

# A blank label is a hidden one. Reading keeps such a question, and training and scoring refuse it.
BLANK = ('""', '"  "', "[]", "[[]]", "NaN", "null", "-1")
LABELS = {"medmcqa": ["cop"], "medqa": ["answer_idx", "answer"], "mcq": ["answer"]}
LABELS |= {"medquad": [], "qa": []}


def test_odd_rows(tmp_path):
    tally = Tally()
    for kind, row in QUESTION.items():
        for key in row.keys() & NEEDED:
            for odd in ODD_JSON:
                if odd in BLANK and key in LABELS[kind]:
                    continue
                if odd in TEXTUAL and (key.startswith("op") or key == "answer"):
                    continue
                parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in row.items()]
                place = list(row).index(key)
                parts[place] = f"{json.dumps(key)}: {odd}"
                path = tmp_path / "odd.jsonl"
                path.write_text("{" + ", ".join(parts) + "}\n", encoding="utf-8")
                entry = DataEntry(format=kind, path=str(path))
                tally.try_call(
                    f"{kind} {key} {odd[:20]}", lambda entry=entry: read_entry(entry, "train")
                )
    for kind in QUESTION:
        for path in odd_paths(tmp_path):
            entry = DataEntry(format=kind, path=str(path))
            tally.try_call(
                f"{kind} {str(path)[-20:]}", lambda entry=entry: read_entry(entry, "train")
            )
    tally.check(150)


def test_odd_files(tmp_path):
    tally = Tally()
    good = json.dumps(QUESTION["medmcqa"])
    files = {
        "cut.jsonl": good[:40].encode(),
        "empty.jsonl": b"",
        "blank.jsonl": b"\n\n",
        "number.jsonl": b"3\n",
        "list.jsonl": b"[]\n",
        "null.json": b"null",
        "text.json": b'"a"',
        "deep.json": b"[" * DEEP + b"]" * DEEP,
        "deep.jsonl": b'{"a":' * DEEP,
        "zeros.jsonl": b"\0" * 100,
        "binary.jsonl": bytes(range(256)) * 10,
        "gzip.jsonl": b"\x1f\x8b\x08\0" + b"x" * 50,
        "wide.jsonl": good.encode("utf-16"),
        "repeated.jsonl": b'{"question": "a", "question": "b"}\n',
        "header.csv": b"question,opa,opb,opc,opd,cop\n",
        "ragged.csv": b"question,opa,opb,opc,opd,cop\na,b\n",
        "quote.csv": b'question,opa,opb,opc,opd,cop\n"a,b,c,d,e,1\n',
        "zeros.csv": b"question,opa\0,opb\n",
        "binary.parquet": b"PAR1" + b"x" * 30,
        "empty.parquet": b"",
        "unknown.xlsx": b"PK",
        "name": good.encode(),
        "surrogate.json": b'[{"question": "\\ud83d"}]',
        "infinite.json": b"[Infinity]",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        entry = DataEntry(format="medmcqa", path=str(path))
        tally.try_call(name, lambda entry=entry: read_entry(entry, "train"))
    for text in ('"a"', "3", "[[1]]", "[1]", "{", '{"x": 1}', "[" * DEEP, "null"):
        path = tmp_path / "pmids.json"
        path.write_text(text)
        row = {"QUESTION": "q", "CONTEXTS": ["c"], "LABELS": ["l"], "LONG_ANSWER": "a"}
        (tmp_path / "pubmedqa.json").write_text(json.dumps({"1": row | {"final_decision": "yes"}}))
        entry = DataEntry(
            format="pubmedqa", path=str(tmp_path / "pubmedqa.json"), test_pmids=str(path)
        )
        tally.try_call(f"pmids {text[:10]}", lambda entry=entry: read_entry(entry, "train"))
    tally.check(len(files))


# script: (arguments that are right, numbers, files that are read, files that are written, words)
DEMO_YAML = str(ROOT / "recipes" / "configs" / "demo.yaml")
DDP = str(ROOT / "accelerate_configs" / "ddp.yaml")
SCRIPTS = {
    "launch/submit.py": (
        [
            "--config",
            DEMO_YAML,
            "--accelerate_config",
            DDP,
            "--output_dir",
            "runs/odd",
            "--dry_run",
        ],
        ["--nodes", "--gpus_per_node", "--cpus_per_gpu", "--training.lr", "--data.max_length"],
        ["--config", "--accelerate_config", "--recipe"],
        ["--output_dir"],
        ["--time", "--unknown", "--job_name", "--partition", "--account", "--sbatch"],
    ),
    "recipes/prepare_data.py": (
        [],
        ["--processes", "--show", "--lora.r"],
        ["--config", "--model.base"],
        ["--removed"],
        ["--unknown", "--model.quantization"],
    ),
    "recipes/train_stages.py": (
        [str(ROOT / "recipes" / "configs" / "demo_stages.yaml")],
        ["--facts.training.lr", "--questions.data.max_length", "--questions.lora.r"],
        [""],
        [],
        ["--unknown", "--facts.model.quantization", "--other.lora.r", "--facts"],
    ),
    "recipes/search.py": (
        [str(ROOT / "recipes" / "configs" / "search_demo.yaml"), "--output_dir", "found"],
        ["--trials", "--lora.r", "--training.lr"],
        ["--accelerate_config"],
        ["--plot"],
        ["--unknown", "--model.quantization", "--lora.variant", "--data.train"],
    ),
    "recipes/merge_adapter.py": (
        ["--adapter", "nothing", "--output", "made"],
        ["--max_difference"],
        ["--adapter", "--base"],
        [],
        ["--unknown", "--base_weights", "--dtype", "--verify"],
    ),
    "eval/predict.py": (
        [
            f"--model={DEMO / 'base'}",
            "--format=medmcqa",
            "--output=odd.jsonl",
            f"--path={DEMO / 'data' / 'test.jsonl'}",
        ],
        ["--num_fewshot", "--permutations", "--limit", "--max_length", "--batch_size"],
        ["--model", "--adapter", "--path", "--config"],
        ["--output"],
        [
            "--engine",
            "--prompt_style",
            "--scoring",
            "--shard",
            "--dtype",
            "--format",
            "--columns",
            "--engine_arguments",
            "--template_arguments",
            "--server",
            "--answer_is",
            "--unknown",
        ],
    ),
    "eval/ask.py": (
        [f"--model={DEMO / 'base'}", "--question=Why?"],
        ["--permutations", "--samples", "--temperature", "--threshold", "--max_new_tokens"],
        ["--model", "--adapter", "--file", "--config"],
        ["--output"],
        [
            "--engine",
            "--option",
            "--columns",
            "--scoring",
            "--dtype",
            "--prompt_style",
            "--server",
            "--template_arguments",
            "--unknown",
        ],
    ),
    "eval/score.py": ([], [], [""], [], ["--unknown"]),
    "eval/rate.py": (
        ["sheet", "--output", "sheet.csv", "--key", "key.json", "a.jsonl"],
        ["--seed", "--limit"],
        [""],
        ["--output", "--key"],
        ["--unknown"],
    ),
    "eval/compare.py": (
        ["a.jsonl", "b.jsonl"],
        ["--max_disagreement", "--max_mean_difference"],
        [""],
        ["--output"],
        ["--unknown"],
    ),
    "eval/report.py": (["--output", "page.html"], [], [""], ["--output"], ["--unknown"]),
    "bench/memory.py": (
        [],
        ["--gpus", "--supervised", "--serve", "--steps", "--lora.r"],
        ["--config", "--model.base"],
        ["--json", "--plot"],
        ["--strategy", "--fit", "--unknown", "--model.dtype"],
    ),
    "bench/recipe_memory.py": (["--check"], [], [], [], ["--unknown"]),
    "bench/throughput.py": (
        [],
        ["--steps", "--warm_up", "--peak_tflops"],
        ["--config"],
        ["--json", "--plot"],
        ["--sweep", "--unknown"],
    ),
    "bench/latency.py": (
        ["--model", str(DEMO / "base")],
        ["--requests", "--output_tokens", "--seed", "--concurrency"],
        ["--model", "--path"],
        ["--json"],
        ["--engine", "--rate", "--goodput", "--dtype", "--unknown"],
    ),
    "bench/before_after.py": (
        ["--run", "nothing"],
        ["--entry", "--limit", "--requests"],
        ["--run", "--merged"],
        ["--json", "--output"],
        ["--by", "--unknown"],
    ),
    "bench/data.py": ([], ["--rows", "--max_tokens_per_batch"], [], ["--json"], ["--unknown"]),
    "bench/strategies.py": (
        [],
        ["--processes", "--steps"],
        ["--config"],
        ["--json"],
        ["--strategies", "--unknown"],
    ),
    "bench/scaling.py": ([], ["--tokens"], ["--check"], [], ["--unknown"]),
    "bench/gpu.py": (
        ["--output", "found", "--device", "cpu"],
        ["--minutes"],
        [],
        [],
        ["--stages", "--device", "--unknown"],
    ),
}
ODD_WORDS = ["nonsense", '{"a": 1, "a": 2}', "a\nb", "--", "\udcff", "[x", "-x y"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_odd_flags(script, tmp_path, monkeypatch):
    tally = Tally()
    right, numbers, read, written, words = SCRIPTS[script]
    monkeypatch.chdir(tmp_path)

    def attempt(flag: str, value: str) -> None:
        given = [f"{flag}={value}"] if flag else [value]
        # The odd value stands last, where argparse lets it win.
        tally.try_script(script, [*right, *given], monkeypatch)

    for flag in numbers:
        for value in NO_FLAGS_NUMBERS:
            attempt(flag, value)
    for flag in read:
        for path in [*map(str, odd_paths(tmp_path)), "~nobody_of_this_name/x", "\udcff"]:
            attempt(flag, path)
    for flag in written:
        for path in (str(tmp_path / LONG), str(tmp_path / "no" / "x"), "/proc/x", "\udcff"):
            attempt(flag, path)
    for flag in words:
        for value in ODD_WORDS:
            attempt(flag, value)
    tally.check(1)


ENVIRONMENT = [
    {"RANK": "x"},
    {"WORLD_SIZE": "-1"},
    {"LOCAL_RANK": "1.5", "RANK": "0", "WORLD_SIZE": "1"},
    {"LOCAL_RANK": "0"},
    {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"},
    {"LOCAL_RANK": "0", "RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
    {"LOCAL_WORLD_SIZE": "two"},
    {"MASTER_PORT": "http"},
    {"SLURM_RESTART_COUNT": "many"},
    {"TORCHELASTIC_RESTART_COUNT": "²"},
    {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "three"},
]


def test_odd_environment(tmp_path, monkeypatch):
    tally = Tally()
    for values in ENVIRONMENT:
        with monkeypatch.context() as patch:
            for name, value in values.items():
                patch.setenv(name, value)
            tally.try_script("recipes/sft_qlora.py", ["--output_dir", str(tmp_path / "run")], patch)
    assert not (tmp_path / "run").exists()
    tally.check(len(ENVIRONMENT))
