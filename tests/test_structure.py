"""The rules of the house: import order, scripts that are never imported, packages that know nothing
of argv.
"""

import ast
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import run_script

ROOT = Path(__file__).parent.parent
# The order of ARCHITECTURE.md: a module imports only from those before it.
ORDER = [
    "config",
    "allocator",
    "hardware",
    "runs",
    "processes",
    "examples",
    "cleaning",
    "prompts",
    "tokens",
    "packing",
    "preparation",
    "attention",
    "layers",
    "models",
    "optimizers",
    "losses",
    "strategies",
    "memory",
    "stages",
    "trials",
    "checkpoints",
    "merging",
    "engines.interface",
    "engines.hf",
    "engines.vllm",
    "engines.openai",
    "predictions",
    "scoring",
    "metrics",
    "latency",
    "page",
    "reports",
]
SCRIPTS = [
    p
    for folder in ("recipes", "eval", "bench", "launch")
    for p in sorted((ROOT / folder).rglob("*.py"))
]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_every_module_has_its_place():
    found = {
        str(path.relative_to(ROOT / "medqlora").with_suffix("")).replace("/", ".")
        for path in (ROOT / "medqlora").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert found == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_module_imports_only_from_above(module):
    path = ROOT / "medqlora" / (module.replace(".", "/") + ".py")
    allowed = set(ORDER[: ORDER.index(module)])
    used = {
        name.removeprefix("medqlora.") for name in imports(path) if name.startswith("medqlora.")
    }
    used = {name for name in used if name in ORDER}
    assert used <= allowed, f"{module} imports {used - allowed}, which stand after it"


@pytest.mark.parametrize("module", ORDER)
def test_package_neither_prints_nor_reads_arguments(module):
    tree = ast.parse(
        (ROOT / "medqlora" / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    )
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    touched = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "print" not in called
    assert not touched & {"sys.argv", "os.environ", "os.getenv"}


def test_scripts_are_never_imported():
    names = {path.stem for path in SCRIPTS}
    for path in [*SCRIPTS, *(ROOT / "medqlora").rglob("*.py"), *(ROOT / "tests").glob("*.py")]:
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {"recipes", "bench", "launch"}, path
        assert not {name for name in used if name in names}, path


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_do_nothing_when_read(path):
    """Only imports, definitions, constants and the guarded call stand at the top level."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        assert not isinstance(node, (ast.For, ast.While, ast.With, ast.Try)), ast.unparse(node)[:80]
        # before torch is imported
        if (
            isinstance(node, ast.Expr)
            and ast.unparse(node) != "prefer_expandable_segments(os.environ)"
        ):
            assert isinstance(node.value, ast.Constant), ast.unparse(node)[:80]
        if isinstance(node, ast.If):
            assert "__name__" in ast.unparse(node.test)


def test_metrics_and_scoring_need_no_torch():
    done = run_script(
        "-c",
        "import sys, medqlora.reports, medqlora.metrics; assert not {'torch', 'transformers'} &"
        " set(sys.modules)",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"],
    ids=lambda path: path.name,
)
def test_shellcheck_finds_nothing(path):
    found = subprocess.run(
        ["shellcheck", "-x", "-s", "bash", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout
