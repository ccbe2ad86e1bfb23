"""The rules of the house: import order, scripts that are never imported, packages that know nothing
of argv.
"""

import ast
import re
import shutil
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import run_script

ROOT = Path(__file__).parent.parent
# The import rule of ARCHITECTURE.md: what each wing may import beside itself.
DATA_SIDE = {"core", "data", "prompts", "batches"}
WINGS = {
    "core": set(),
    "data": {"core"},
    "prompts": {"core", "data"},
    "batches": {"core", "data", "prompts"},
    "model": {"core"},
    "engines": DATA_SIDE | {"model"},
    "training": DATA_SIDE | {"model", "engines"},
    "evaluation": DATA_SIDE | {"model", "engines"},
    "reporting": DATA_SIDE | {"model", "engines", "training", "evaluation"},
    "serving": DATA_SIDE | {"model", "engines", "training", "evaluation"},
}
ROOMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "medqlora").rglob("*.py")
    if path.name != "__init__.py"
)
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


def used_rooms(room: str) -> set[str]:
    return imports(ROOT / (room.replace(".", "/") + ".py")) & set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_wing_imports_only_itself_and_wings_to_its_left(room):
    wing = room.split(".")[1]
    others = {used.split(".")[1] for used in used_rooms(room)} - {wing}
    assert others <= WINGS[wing], f"{room} imports from {others - WINGS[wing]}"


def test_no_room_imports_itself_in_a_circle():
    graph = {room: used_rooms(room) for room in ROOMS}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("wing", sorted(DATA_SIDE))
def test_the_data_side_never_imports_torch(wing):
    names = [room for room in ROOMS if room.startswith(f"medqlora.{wing}.")]
    code = f"import sys, {', '.join(names)}; assert 'torch' not in sys.modules"
    done = run_script("-c", code, cold=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_package_neither_prints_nor_reads_arguments(room):
    tree = ast.parse((ROOT / (room.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    touched = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if room in ("medqlora.core.command", "medqlora.core.entry"):  # the frame of every command
        return
    assert "print" not in called
    assert not touched & {"sys.argv", "os.environ", "os.getenv"}


def test_scripts_are_never_imported():
    names = {path.stem for path in SCRIPTS}
    for path in [*SCRIPTS, *(ROOT / "medqlora").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
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
        "import sys, medqlora.reporting.run_page, medqlora.evaluation.metrics\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)",
        cold=True,
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


def test_the_table_of_contracts_names_every_test_file_and_its_tier():
    tiers: dict[str, set[str]] = {}
    for line in (ROOT / "tests" / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and ".py`" in line:
            for name in re.findall(r"`((?:\w+/)?test_\w+\.py)`", line):
                tiers.setdefault(name, set()).add(line.rstrip(" |").rpartition("| ")[2])
    files = {
        str(path.relative_to(ROOT / "tests")): path for path in ROOT.glob("tests/**/test_*.py")
    }
    assert tiers.keys() == files.keys()
    for name, path in files.items():
        text = path.read_text(encoding="utf-8")
        whole_file = re.search(r"^pytestmark = \[\n    pytest\.mark\.full,", text, re.MULTILINE)
        if whole_file:
            assert tiers[name] == {"full"}, name
        elif re.search(r"^@pytest\.mark\.full$|marks=pytest\.mark\.full\b", text, re.MULTILINE):
            assert tiers[name] & {"full", "both"}, name
        else:
            assert tiers[name] == {"quick"}, name


def test_consoles_print_texts_as_they_are():
    """Brackets in a question or a path must not become rich's markup."""
    for path in [*SCRIPTS, *(ROOT / "medqlora").rglob("*.py")]:
        if path == ROOT / "medqlora" / "core" / "command.py":  # the owner of make_console
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"Console", "rich.print", "rich.console.Console"}, path


def test_every_script_enters_before_it_imports_other_packages():
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        if "run_command(" in text and "bench/peers/llamafactory" not in path.as_posix():
            assert "enter()" in text, path
