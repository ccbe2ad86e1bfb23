"""Rating sheets: what raters see, how their sheets are read, and how far they agree."""

import csv
import io
import itertools
import json
import random

import numpy as np
import pytest
from conftest import ROOT, run_inside
from hypothesis import given, settings
from hypothesis import strategies as st

from medqlora.evaluation.predictions import read_predictions
from medqlora.evaluation.rating_sheet import (
    CRITERIA,
    FORMULA_SIGNS,
    HEAD,
    LONGEST_CELL,
    RatingError,
    clean_cell,
    draw_sheet,
    read_sheet,
    restore_cell,
)
from medqlora.evaluation.ratings import (
    compute_alpha,
    describe_difference,
    describe_mean,
    measure_agreement,
    summarise_ratings,
)

SCRIPT = ROOT / "eval" / "rate.py"


def write_answers(path, model, answers, **more):
    rows = [
        {
            "id": f"q{number}",
            "kind": "open",
            "question": f"What is {number}?",
            "gold": f"it is {number}",
            "prediction": answer,
            "text": answer,
            "model": model,
        }
        | more
        for number, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path):
    """Answers of two models to the same six questions."""
    return [
        write_answers(tmp_path / "first.jsonl", "owner/secret-7b", [f"=1+{n}" for n in range(6)]),
        write_answers(tmp_path / "other.jsonl", "runs/hidden", [f"so, {n}\nö" for n in range(6)]),
    ]


def draw(files, seed=0, limit=None):
    return draw_sheet([read_predictions(path) for path in files], seed, limit)


def fill(sheet, rate, path, delimiter=",", encoding="utf-8-sig", order=None):
    """Save a sheet as a rater does: rate(item, criterion) -> a cell."""
    head, *rows = list(csv.reader(io.StringIO(sheet.text.lstrip("\ufeff"))))
    for row in rows:
        for name in CRITERIA:
            row[HEAD.index(name)] = str(rate(row[0], name))
    random.Random(order).shuffle(rows)
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([head, *rows])
    return path


# ---- sheets --------------------------------------------------------------------------------------


def test_a_sheet_names_no_model(files):
    sheet = draw(files)
    for name in ("secret", "hidden", "first", "other"):
        assert name not in sheet.text
    rows = list(csv.reader(io.StringIO(sheet.text.lstrip("\ufeff"))))
    assert sheet.text.startswith("\ufeff")
    assert rows[0] == list(HEAD)
    assert len(rows) == 1 + 12 == 1 + len(sheet.key.items)
    # The two answers to a question stand one below the other, and not always in one order.
    assert all(a[1] == b[1] for a, b in zip(rows[1::2], rows[2::2], strict=True))
    firsts = {sheet.key.items[row[0]].file for row in rows[1::2]}
    assert len(firsts) == 2
    for item, _, reference, answer, *_ in rows[1:]:
        number = sheet.key.items[item].question[1:]
        assert number in restore_cell(answer)
        assert reference == f"it is {number}"


def test_a_seed_draws_the_same_sheet(files):
    assert draw(files, 1).text == draw(files, 1).text
    assert draw(files, 1).text != draw(files, 2).text
    assert len(draw(files, 1, limit=2).key.items) == 4


TEXTS = st.text(st.characters(exclude_categories=("Cc", "Cs")) | st.sampled_from("\n\t"))


@given(TEXTS | st.builds(str.__add__, st.sampled_from(FORMULA_SIGNS), TEXTS))
def test_cells_are_no_formulas_and_come_back(text):
    cell = clean_cell(text)
    assert not cell.startswith(tuple("=+-@\t"))
    assert restore_cell(cell) == text


def test_odd_texts_fit_their_cells(tmp_path):
    answers = ["x" * 40_000, "a\0b\rc", "I am Secret-7B.", None]
    path = write_answers(tmp_path / "a.jsonl", "owner/secret-7b", answers)
    sheet = draw([path])
    cells = {row[1]: row for row in csv.reader(io.StringIO(sheet.text))}
    assert LONGEST_CELL < len(cells["What is 0?"][3]) < 32_767
    assert cells["What is 1?"][3] == "abc"
    assert cells["What is 3?"][3] == "(no answer)"
    assert sheet.cut == [cells["What is 0?"][0]]
    assert sheet.telling == [cells["What is 2?"][0]]


@pytest.mark.parametrize(
    ("answers", "more", "message"),
    [
        (["x"] * 5, {}, "hold different questions"),
        (["x"] * 6, {"gold": "another"}, "has another gold in"),
        (["x"] * 6, {"question": None}, "holds no text of its question"),
    ],
)
def test_files_of_other_questions_are_refused(files, tmp_path, answers, more, message):
    third = write_answers(tmp_path / "third.jsonl", "m", answers, **more)
    with pytest.raises(RatingError, match=message):
        draw([files[0], third])


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8")]
)
def test_sheets_are_read_as_programs_save_them(files, tmp_path, delimiter, encoding):
    sheet = draw(files)
    rate = lambda item, name: 1 + (hash_of(item) + CRITERIA.index(name)) % 5  # noqa: E731
    path = fill(sheet, rate, tmp_path / "s.csv", delimiter, encoding, order=3)
    found = read_sheet(path, sheet.key)
    assert found == {item: tuple(rate(item, name) for name in CRITERIA) for item in sheet.key.items}


def hash_of(item):
    return int(item[-4:])


@pytest.mark.parametrize("value", ["", "0", "6", "3.5", "good", "nan", "-1", "4,0", "1e0"])
def test_ratings_that_are_none_are_refused_with_their_row(files, tmp_path, value):
    sheet = draw(files)
    rows = list(sheet.key.items)
    bad = {(rows[4], "safety"): value, (rows[5], "fluency"): value}
    path = fill(sheet, lambda item, name: bad.get((item, name), 4), tmp_path / "s.csv")
    with pytest.raises(RatingError, match=r"row \d+ \(Q.*\): .* and 1 more like this"):
        read_sheet(path, sheet.key)


def test_sheets_of_another_key_are_refused(files, tmp_path):
    sheet = draw(files)
    path = fill(sheet, lambda *_: 3, tmp_path / "s.csv")
    with pytest.raises(RatingError, match="is none of the key's"):
        read_sheet(path, draw(files, seed=1).key)
    lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    for content, message in (
        ("", "0 columns are called item"),
        ("".join(lines).replace("safety", "Safe"), "0 columns are called safety"),
    ):
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises(RatingError, match=message):
            read_sheet(tmp_path / "t.csv", sheet.key)
    (tmp_path / "t.csv").write_bytes("item,é".encode("cp1252"))
    with pytest.raises(RatingError, match="CSV UTF-8"):
        read_sheet(tmp_path / "t.csv", sheet.key)


def test_lost_and_repeated_items_are_refused(files, tmp_path):
    sheet = draw(files)
    path = fill(sheet, lambda *_: 3, tmp_path / "s.csv")
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    for changed, message in ((rows[:-1], "is missing"), ([*rows, rows[3]], "stands twice")):
        with (tmp_path / "t.csv").open("w", newline="") as file:
            csv.writer(file).writerows(changed)
        with pytest.raises(RatingError, match=message):
            read_sheet(tmp_path / "t.csv", sheet.key)


# ---- agreement -----------------------------------------------------------------------------------


def test_alpha_of_the_published_example():
    """Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section D."""
    third = 1 / 3
    coincidences = np.array(
        [
            [7, 4 * third, third, third, 0],
            [4 * third, 10, 4 * third, third, 0],
            [third, 4 * third, 8, third, 0],
            [third, third, third, 4, 0],
            [0, 0, 0, 0, 3],
        ]
    )
    assert compute_alpha(coincidences) == pytest.approx(0.815, abs=5e-4)


def alpha_by_definition(ratings):
    """Observed and expected disagreement, summed over all pairs of values."""
    values = ratings.ravel()
    counts = np.bincount(values, minlength=6)

    def distance(a, b):
        low, high = sorted((a, b))
        return (counts[low : high + 1].sum() - (counts[low] + counts[high]) / 2) ** 2

    raters, items = ratings.shape
    observed = sum(
        distance(a, b) for item in ratings.T for a, b in itertools.permutations(item, 2)
    ) / (items * raters * (raters - 1))
    expected = sum(distance(a, b) for a, b in itertools.permutations(values, 2))
    expected /= len(values) * (len(values) - 1)
    return 1 - observed / expected


@settings(max_examples=25)  # Each of them draws an interval.
@given(st.integers(2, 4), st.integers(2, 8), st.integers(0, 10_000))
def test_alpha_is_its_definition(raters, items, seed):
    ratings = np.random.default_rng(seed).integers(1, 6, (raters, items))
    alpha, bounds = measure_agreement(ratings, np.arange(items))
    if len(set(ratings.ravel())) == 1:
        assert (alpha, bounds) == (None, None)
        return
    assert alpha == pytest.approx(alpha_by_definition(ratings))
    assert bounds[0] <= bounds[1] <= 1


def test_equal_ratings_agree_and_one_rater_has_none_to_agree_with():
    ratings = np.array([[1, 5, 3, 2]] * 2)
    assert measure_agreement(ratings, np.arange(4))[0] == 1
    assert measure_agreement(ratings[:1], np.arange(4)) == (None, None)
    assert measure_agreement(np.full((2, 4), 3), np.arange(4)) == (None, None)


def test_means_and_differences_by_hand():
    mean = describe_mean(np.array([1.0, 5.0, 3.0, 3.0]))
    assert mean["mean"] == 3
    low, high = mean["mean_ci95"]
    assert 1 <= low < 3 < high <= 5
    low, high = describe_mean(np.full(10, 5.0))["mean_ci95"]
    assert (low < 4.9, high) == (True, 5)
    # The t interval of 1, 2, 3: 2 +- 4.3027 / sqrt(3)
    found = describe_difference(np.array([1.0, 2.0, 3.0]))
    assert found["difference"] == 2
    assert found["difference_ci95"] == pytest.approx([2 - 2.4841, 2 + 2.4841], abs=1e-4)
    assert describe_difference(np.zeros(3)) == {"n": 3, "difference": 0, "difference_ci95": None}


def test_every_rating_reaches_its_model(files, tmp_path):
    """The first model is rated 2 and 4 by two raters, the other one 5 by both."""
    sheet = draw(files)
    first = str(files[0])
    sheets = []
    for rater, low in enumerate((2, 4)):
        rate = lambda item, _, low=low: low if sheet.key.items[item].file == first else 5  # noqa: E731
        path = fill(sheet, rate, tmp_path / f"{rater}.csv", order=rater)
        sheets.append(read_sheet(path, sheet.key))
    found = summarise_ratings(sheets, sheet.key)
    assert (found["questions"], found["items"], found["raters"]) == (6, 12, 2)
    assert found["models"] == {first: "owner/secret-7b", str(files[1]): "runs/hidden"}
    for name in CRITERIA:
        criterion = found["criteria"][name]
        assert [part["mean"] for part in criterion["per_file"].values()] == [3, 5]
        (difference,) = criterion["differences"]
        assert (difference["a"], difference["difference"]) == (first, 2)


def test_the_command_from_sheet_to_agreement(files, tmp_path, monkeypatch):
    sheet, key = tmp_path / "sheet.csv", tmp_path / "key.json"
    arguments = ["sheet", *files, "--output", sheet, "--key", key]
    assert run_inside(SCRIPT, arguments, monkeypatch) == (0, "")
    code, complaint = run_inside(SCRIPT, arguments, monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1), "nothing is written over"
    assert sheet.read_bytes().decode() == draw(files).text
    filled = [fill(draw(files), lambda *_: 4, tmp_path / f"{name}.csv") for name in "ab"]
    written = tmp_path / "agreement.json"
    arguments = ["agreement", *filled, "--key", key, "--output", written]
    assert run_inside(SCRIPT, arguments, monkeypatch) == (0, "")
    assert json.loads(written.read_text())["sheets"] == [str(path) for path in filled]
    for wrong in (
        ["agreement", sheet, "--key", key],
        ["agreement", filled[0], filled[0], "--key", key],
        ["agreement", filled[0], "--key", files[0]],
        ["agreement", filled[0], "--key", tmp_path / "none.json"],
        ["sheet", files[0], files[0], "--output", tmp_path / "x.csv", "--key", tmp_path / "x.json"],
        ["sheet", files[0], "--output", tmp_path / "x.csv", "--key", tmp_path / "x.csv"],
        [],
    ):
        code, complaint = run_inside(SCRIPT, wrong, monkeypatch)
        assert (code, complaint.count("\n")) == (2, 1), complaint
