"""docs/colab.ipynb runs from top to bottom, on the demonstration."""

import json

import pytest
from conftest import ROOT

pytestmark = [
    pytest.mark.full,
]
NOTEBOOK = ROOT / "docs" / "colab.ipynb"


def test_the_notebook_runs_without_a_gpu(tmp_path, monkeypatch, capfd):
    pytest.importorskip("IPython", reason="IPython is not here; pip install ipython")
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    # The notebook works in the folder that holds the project, and its run must not land in ours.
    for folder in ROOT.iterdir():
        if folder.is_dir() and folder.name != "runs":
            (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    settings = Config()
    settings.HistoryManager.enabled = False
    shell = InteractiveShell(config=settings)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            # A few steps show that every cell works.
            source = "".join(cell["source"]).replace("STEPS = 200", "STEPS = 4")
            shell.run_cell(source).raise_error()
    shown = capfd.readouterr().out
    assert "recipe: demo" in shown
    assert "tuned: " in shown
    assert "Vitamin" in shown
    assert "no medical advice" in shown
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()


def test_a_failing_command_stops_the_notebook():
    pytest.importorskip("IPython", reason="IPython is not here; pip install ipython")
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    (defining,) = [
        "".join(cell["source"]) for cell in cells if "def run(" in "".join(cell["source"])
    ]
    function = defining[defining.index("def run(") : defining.index("here = ")]
    shell.run_cell(function).raise_error()
    with pytest.raises(SystemError, match="this command failed: exit 3"):
        shell.run_cell('run("exit 3")').raise_error()


def test_the_notebook_holds_no_outputs():
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
