"""A verdict on a published figure is that of the figures, and every figure is a recorded one."""

import copy
import json
import re

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from medqlora.core.config import Lora
from medqlora.core.errors import ConfigError
from medqlora.model.adapter_preview import preview_adapter
from medqlora.reporting.claims import (
    BOUNDS,
    PREDICTED,
    QUANTITIES,
    TOLERANCE,
    VERDICTS,
    agrees,
    check_claim,
    describe_figure,
    find_value,
    judge,
    list_rows,
)
from medqlora.training.memory.architectures import read_architecture

RECORDS = ROOT / "bench" / "results" / "predicted"
PROJECTS = json.loads((ROOT / "bench" / "claims.json").read_text(encoding="utf-8"))["projects"]
CLAIMS = [claim for project in PROJECTS.values() for claim in project["claims"]]
FIGURES = [figure for claim in CLAIMS for figure in claim["figures"]]


def read_record(name: str) -> dict:
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["published"])
def test_a_verdict_is_that_of_its_figures_and_of_no_others(claim):
    check_claim(claim, read_record)
    assert claim["reason"].endswith(".")
    others = set(VERDICTS) - {claim["verdict"]}
    for verdict in others:
        with pytest.raises(ConfigError, match="give"):
            check_claim(claim | {"verdict": verdict}, read_record)


@pytest.mark.parametrize(
    "claim",
    [claim for claim in CLAIMS if claim["verdict"] == "refuted"],
    ids=lambda claim: claim["published"],
)
def test_a_refuted_claim_with_equal_figures_fails(claim):
    equal = copy.deepcopy(claim)
    for figure in equal["figures"]:
        if figure["relation"] != "beside":
            figure["ours"] = {"published": figure["claimed"]}
    with pytest.raises(ConfigError, match="plausible"):
        list(list_rows([equal], read_record))


NUMBERS = st.floats(0.01, 1e6)


@given(NUMBERS, NUMBERS, NUMBERS)
def test_relations_mean_what_they_say(a, b, ours):
    low, high = sorted((a, b))
    figure = {"claimed": [low, high], "unit": "GB", "relation": ""}
    value = ours * 1e9
    assert agrees(figure | {"relation": "at most"}, value) == (value <= low * 1e9)
    assert agrees(figure | {"relation": "at least"}, value) == (value >= high * 1e9)
    if agrees(figure | {"relation": "exact"}, value):
        assert agrees(figure | {"relation": "equal"}, value)
    inside = low * (1 - TOLERANCE) * 1e9 <= value <= high * (1 + TOLERANCE) * 1e9
    assert agrees(figure | {"relation": "equal"}, value) == inside


def test_some_figures_that_agree_make_a_claim_hold_partly():
    def figure(claimed: float, relation: str = "equal") -> dict:
        return {"claimed": claimed, "unit": "", "relation": relation, "ours": {"published": 10}}

    assert judge({"figures": [figure(10), figure(10.5)]}, read_record) == "plausible"
    assert judge({"figures": [figure(10), figure(20)]}, read_record) == "partly"
    assert judge({"figures": [figure(5), figure(20)]}, read_record) == "refuted"
    shown = figure(10, "beside")
    assert judge({"figures": [shown]}, read_record) == "not checkable here"
    assert judge({"figures": [shown, figure(20)]}, read_record) == "refuted"
    assert judge({"figures": []}, read_record) == "not checkable here"


def test_every_recorded_claim_and_every_quantity_is_used():
    used = {figure["ours"]["record"] for figure in FIGURES if "record" in figure["ours"]}
    recorded = {path.stem for path in RECORDS.glob("claim_*.json")}
    # bench/tables.py shows the longest rows of this model in a table of their own.
    assert {name for name in recorded if "llama3.1" not in name} <= used
    assert set(QUANTITIES) == {figure["ours"].get("quantity") for figure in FIGURES} - {None}
    assert {*PREDICTED, *BOUNDS} <= set(QUANTITIES)


def test_published_figures_name_their_source_and_the_projects_no_owner():
    for figure in FIGURES:
        if "published" in figure["ours"]:
            assert figure["ours"]["source"]
    text = (ROOT / "bench" / "claims.json").read_text(encoding="utf-8")
    assert not re.search(r"github\.com|https?:", text)


def test_our_commands_name_files_that_are_there():
    text = (ROOT / "bench" / "claims.json").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:recipes|eval|bench)/[\w./-]+\.(?:py|yaml)", text))
    assert len(named) > 10
    assert not [path for path in sorted(named) if not (ROOT / path).is_file()]


def test_parameters_of_the_records_are_those_of_the_models():
    for name in sorted({figure["ours"].get("record", "") for figure in FIGURES} - {""}):
        record = read_record(name)
        architecture = read_architecture(record["model"], ROOT / "bench" / "architectures")
        flags = record["command"]
        targets = Lora().target_modules
        if "--lora.target_modules" in flags:
            named = flags[flags.index("--lora.target_modules") + 1]
            targets = named.strip("[]").split(", ")
        preview = preview_adapter(architecture, Lora(r=16, target_modules=targets))
        assert preview.base_parameters == record["base_parameters"]
        assert preview.trained_parameters == record["trainable_parameters"]


def test_our_figure_is_shown_in_the_unit_of_the_claim():
    def show(unit: str, **ours) -> str:
        figure = {"unit": unit, "ours": ours}
        return describe_figure(figure, find_value(figure, read_record))

    pubmedqa = "claim_llama3-8b_pubmedqa"
    parameters = show("", record=pubmedqa, quantity="trainable parameters")
    assert parameters == "41,943,040 (computed)"
    assert show("%", record=pubmedqa, quantity="trainable share") == "0.52 % (computed)"
    peak = show("GB", record=pubmedqa, quantity="tensors", name="step")
    assert re.fullmatch(r"step: \d\.\d\d GB \(predicted\)", peak)
    bound = show(
        "minutes", record=pubmedqa, quantity="least seconds on a T4", options={"tokens": 1}
    )
    assert bound.startswith("at least 0.00 minutes")
    assert show("GiB", published=8) == "8 GiB (published)"
    assert show("%", formula="one of", of=4) == "25 % (computed)"
