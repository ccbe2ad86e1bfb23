"""The memory in the head of each recipe is that of its forecast, and of the recipe as it stands."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_inside

SCRIPT = ROOT / "bench" / "recipe_memory.py"
CONFIGS = ROOT / "recipes" / "configs"
RECORDS = ROOT / "bench" / "results" / "predicted"


def test_heads_hold_the_recorded_forecasts(monkeypatch):
    assert run_inside(SCRIPT, ["--check"], monkeypatch) == (0, "")
    # The demonstration runs on a CPU, and a list of stages or a search names other recipes.
    asking = runpy.run_path(str(SCRIPT))["find_recipes"]()
    others = {CONFIGS / "demo.yaml", *CONFIGS.glob("*_stages.yaml"), *CONFIGS.glob("search_*.yaml")}
    assert {*asking} == {*CONFIGS.glob("*.yaml")} - others


@pytest.fixture
def recipe(tmp_path):
    # A record is found by the name of its recipe, in any folder.
    return Path(shutil.copy(CONFIGS / "gemma-2b_medmcqa.yaml", tmp_path))


def change(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert re.search(old, text)
    path.write_text(re.sub(old, new, text), encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r"8 GiB:  \d", "8 GiB:  1", "its forecast is not that of recipe_gemma-2b_medmcqa.json"),
        ("max_length: 512", "max_length: 1024", "the recipe has changed since"),
        ("data:", "lora: {r: 32}\ndata:", "the recipe has changed since"),
        ("format: medmcqa", "format: medquad", "the recipe has changed since"),
        ("included:", "included, with --gpus 2:", "the recipe has changed since"),
        ("included:", "included, with --gpus two:", "argument --gpus: got 'two'"),
        ("included:", "included, with --strategy two:", "argument --strategy"),
        ("included:", 'included, with "--gpus:', "No closing quotation; correct the heading"),
        ("included:", "included, with --lora.rank 2:", "unknown key lora.rank"),
        ("# Memory by", "# Room by", "asks for a forecast; add one"),
    ],
)
def test_a_changed_recipe_or_head_is_said(recipe, old, new, message, monkeypatch):
    change(recipe, old, new)
    code, complaint = run_inside(SCRIPT, ["--check", recipe], monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1)
    assert message in complaint


def test_heads_are_written_and_settings_without_memory_may_change(recipe, monkeypatch):
    wanted = recipe.read_text(encoding="utf-8").replace("eval_steps: 100", "eval_steps: 50")
    recipe.write_text(re.sub(r"#   .*\n", "", wanted), encoding="utf-8")
    assert run_inside(SCRIPT, ["--check", recipe], monkeypatch)[0] == 2
    assert run_inside(SCRIPT, ["--write", recipe], monkeypatch) == (0, "")
    assert recipe.read_text(encoding="utf-8") == wanted
    assert run_inside(SCRIPT, ["--check", recipe], monkeypatch) == (0, "")


def test_a_recipe_without_a_record_names_the_command(recipe, monkeypatch):
    new = recipe.rename(recipe.with_name("new.yaml"))
    code, complaint = run_inside(SCRIPT, ["--write", new], monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1)
    assert "--forecast" in complaint


@pytest.mark.parametrize(("name", "gib"), [("gemma-2b_medmcqa", 80), ("phi3-mini_medquad", 8)])
def test_a_forecast_made_again_is_the_recorded_one(name, gib):
    again = runpy.run_path(str(SCRIPT))["forecast"](CONFIGS / f"{name}.yaml", "", gib)
    recorded = json.loads((RECORDS / f"recipe_{name}.json").read_text())
    plans = recorded["forecasts"][0]["plans"]
    (plan,) = [plan for plan in plans if plan["gib"] == gib]
    assert again.keys() == plan.keys()
    for key, value in plan.items():
        assert again[key] == (pytest.approx(value, rel=0.02) if "bytes" in key else value), key
