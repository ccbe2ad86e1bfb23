"""Data entries -> rows: mixture shares, separation from evaluation data, cache."""

import json

import numpy as np
import pytest
from conftest import DEMO
from pydantic import ValidationError

from medqlora.batches.cache import load_prepared, prepare_plan, save_prepared
from medqlora.batches.pipeline import count_reasons, prepare
from medqlora.core.config import Config
from medqlora.data.examples import DataError
from medqlora.prompts.chat_template import make_encoder

QUESTION = {
    "id": "a",
    "question": "Which of these is right?",
    "opa": "1",
    "opb": "2",
    "opc": "3",
    "opd": "4",
    "cop": 4,
}


@pytest.fixture
def make(tmp_path, demo_tokenizer):
    def make(train, evaluation=None, **data):
        def write(name, rows):
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return str(path)

        entries = [
            {"format": "medmcqa", "path": write(f"train{i}", rows), **more}
            for i, (rows, more) in enumerate(train)
        ]
        held_out = [{"format": "medmcqa", "path": write("eval", evaluation)}] if evaluation else []
        config = Config(
            model={"base": "x"},
            data={"train": entries, "eval": held_out, "cache_dir": str(tmp_path / "cache"), **data},
        )
        return config, prepare(config, make_encoder(demo_tokenizer))

    return make


def rows(count, start=0):
    return [
        QUESTION | {"id": str(i), "question": f"Which is number {i}?"}
        for i in range(start, start + count)
    ]


def numbered(count, word):
    """Rows with the ids 1, 2, 3 …, as every file of its own may have them."""
    return [
        QUESTION | {"id": str(i), "question": f"Which {word} is number {i}?"}
        for i in range(1, count + 1)
    ]


def test_two_entries_may_number_their_rows_alike(make):
    """Each row keeps its own entry's weight, and the mixture tells each entry's own rows."""
    entries = [(numbered(40, "red"), {"weight": 3.0}), (numbered(40, "blue"), {"weight": 0.25})]
    _, prepared = make(entries)
    assert prepared.repeats.tolist() == [3.0] * 40 + [0.25] * 40
    assert [entry["rows"] for entry in prepared.mixture] == [40, 40]
    assert [entry["rows_per_epoch"] for entry in prepared.mixture] == [120, 10]
    shared = [(numbered(40, "red"), {"share": 0.8}), (numbered(40, "blue"), {})]
    _, prepared = make(shared)
    assert [entry["row_share"] for entry in prepared.mixture] == pytest.approx([0.8, 0.2])


def test_rows_know_their_example_after_removals_and_from_the_cache(make):
    """A row that is dropped while it is tokenized must not shift the entries of those behind it."""
    long = {"id": "1", "question": "word " * 900}
    first = [QUESTION | long, *numbered(3, "red")]
    for _ in range(2):  # The second time reads the cache.
        entries = [(first, {"weight": 2.0}), (numbered(3, "blue"), {})]
        _, prepared = make(entries, max_length=128, drop_invalid=True)
        assert prepared.repeats.tolist() == [2.0] * 3 + [1.0] * 3
        assert prepared.train.examples.tolist() == [1, 2, 3, 4, 5, 6]


def test_test_questions_with_one_id_are_refused_or_the_first_is_kept(make, tmp_path):
    for name in ("a", "b"):
        text = "".join(json.dumps(row) + "\n" for row in numbered(3, name))
        (tmp_path / f"test-{name}.jsonl").write_text(text)
    test = [
        {"format": "medmcqa", "path": str(tmp_path / f"test-{name}.jsonl")} for name in ("a", "b")
    ]
    with pytest.raises(DataError, match=r"test-b.jsonl line 1: id 1 stands at .*test-a.jsonl line"):
        make([(rows(5, 50), {})], test=test)
    _, prepared = make([(rows(5, 50), {})], test=test, drop_invalid=True)
    assert [example.question for example in prepared.test] == [
        f"Which a is number {i}?" for i in (1, 2, 3)
    ]
    assert count_reasons(prepared.removals) == {"its id stands at": 3}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_open_test_questions_reach_every_process_whole(make, tmp_path):
    asked = [
        {"question": f"What is {i}?", "answer": "Rest.", "subject": "s", "context": ["a", "b"]}
        for i in range(3)
    ]
    test = [{"format": "qa", "path": write(tmp_path / "qa.jsonl", asked)}]
    # A training row that asks the same is removed.
    leak = {"question": "what is 1", "answer": "Sleep."}
    config, prepared = make([(rows(5, 50), {}), ([leak], {"format": "qa"})], test=test)
    assert [(row.question, row.answer, row.context) for row in prepared.test] == [
        (row["question"], "Rest.", ("a", "b")) for row in asked
    ]
    assert count_reasons(prepared.removals) == {"is in the evaluation data": 1}
    assert load_prepared(config.data, save_prepared(config.data, prepared)).test == prepared.test


def test_test_data_of_several_kinds_is_refused(make, tmp_path):
    choice = {"format": "medmcqa", "path": write(tmp_path / "mc.jsonl", numbered(2, "red"))}
    asked = {"question": "What is fever?", "answer": "Heat."}
    open_question = {"format": "qa", "path": write(tmp_path / "qa.jsonl", [asked])}
    text = {"format": "text", "path": write(tmp_path / "text.jsonl", [{"text": "Fever is hot."}])}
    for test, message in (
        ([choice, open_question], r"multiple-choice questions \(mc.* open ones \(qa.jsonl line 1"),
        ([open_question, text], "text.jsonl line 1: not a question; put text in data.eval"),
    ):
        with pytest.raises(DataError, match=message):
            make([(rows(5, 50), {})], test=test)
    bare = {"format": "qa", "path": write(tmp_path / "bare.jsonl", [{"question": "What?"}])}
    with pytest.raises(DataError, match=r'bare.jsonl line 1: the row has no "answer"'):
        make([(rows(5, 50), {})], test=[bare])


def test_training_rows_of_the_evaluation_set_are_removed_and_listed(make):
    same = QUESTION | {
        "id": "x",
        "question": "which of THESE is right",
        "opa": "4",
        "opd": "1",
        "cop": 1,
    }
    _, prepared = make([([*rows(5), same], {})], [QUESTION])
    assert "x" not in prepared.train.names
    assert [(r.id, "eval.jsonl line 1" in r.reason) for r in prepared.removals] == [("x", True)]
    assert count_reasons(prepared.removals) == {"is in the evaluation data": 1}
    _, kept = make([([*rows(5), same], {})], [QUESTION], decontaminate=False)
    assert "x" in kept.train.names


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_share_is_the_part_of_all_rows(make, share):
    _, prepared = make([(rows(300), {}), (rows(100, 1000), {"share": share})])
    assert prepared.mixture[1]["row_share"] == pytest.approx(share)
    config, prepared = make([(rows(300), {"weight": 0.5}), (rows(100, 1000), {"share": share})])
    assert prepared.mixture[0]["rows_per_epoch"] == 150
    plan, _ = prepare_plan(config, prepared, 1)
    general = np.array([int(name) >= 1000 for name in prepared.train.names])
    assert general[plan.rows].mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("temperature", [1, 2, 5, 1e9])
def test_a_temperature_mixes_by_powers_of_the_sizes(make, temperature):
    sizes = np.array([400, 25])
    entries = [(rows(400), {}), (rows(25, 1000), {})]
    config, prepared = make(entries, temperature=temperature)
    shares = sizes ** (1 / temperature) / (sizes ** (1 / temperature)).sum()
    assert [entry["row_share"] for entry in prepared.mixture] == pytest.approx(shares)
    plan, _ = prepare_plan(config, prepared, 1)
    small = np.array([int(name) >= 1000 for name in prepared.train.names])
    assert len(plan.rows) == pytest.approx(425, abs=1)
    assert small[plan.rows].mean() == pytest.approx(shares[1], abs=0.003)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"weight": 2.0}, {}], r"data.train\[0\].weight and data.temperature both say"),
        ([{}, {"share": 0.5}], r"data.train\[1\].share and data.temperature both say"),
        ([{}], "mixes several entries of data.train, and there are 1"),
    ],
)
def test_a_temperature_beside_another_mixture_is_refused(entries, message):
    entries = [{"format": "medmcqa", "path": "x.jsonl", **entry} for entry in entries]
    with pytest.raises(ValidationError, match=message):
        Config(model={"base": "x"}, data={"train": entries, "temperature": 2})


def test_rows_of_text_are_filled_and_hold_one_document_each(tmp_path, demo_tokenizer):
    (tmp_path / "books").mkdir()
    for name, word in (("a.txt", "Hearing"), ("b.md", "Scurvy")):
        text = "\n\n".join([f"The {word} is a {word}. " * 40] * 5)
        (tmp_path / "books" / name).write_text(text)
    lines = [
        json.dumps({"text": f"The {word} is here. " * 30}) for word in ("Naloxone", "Flumazenil")
    ]
    (tmp_path / "more.jsonl").write_text("\n".join(lines))
    train = [{"format": "text", "path": str(tmp_path / name)} for name in ("books", "more.jsonl")]
    data = {"train": train, "max_length": 64, "cache_dir": str(tmp_path / "cache")}
    data["deduplicate"] = "none"  # Equal passages would leave gaps.
    prepared = prepare(Config(model={"base": "x"}, data=data), make_encoder(demo_tokenizer))
    table = prepared.train
    words = ["Hearing", "Scurvy", "Naloxone", "Flumazenil"]
    found = []
    for first, last in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        text = demo_tokenizer.decode(table.ids[first:last])
        (word,) = [word for word in words if word in text]
        found.append(word)
    assert found == sorted(found, key=words.index)
    # Only the last row of a document may be short.
    short = [number for number in range(len(found)) if table.lengths[number] < 64]
    assert all(found[n] != found[n + 1] for n in short if n + 1 < len(found))
    fill = table.lengths.sum() / (64 * len(found))
    assert f"{len(found):,} rows of plain text are {fill:.1%} full" in "\n".join(
        prepared.descriptions
    )


def test_second_time_comes_from_the_cache(make, monkeypatch):
    config, first = make([(rows(20), {})])
    _, first_hash = prepare_plan(config, first, 1)
    monkeypatch.setattr("medqlora.batches.pipeline.encode_examples", None)
    monkeypatch.setattr("medqlora.batches.cache.make_plan", None)
    config, again = make([(rows(20), {})])
    assert np.array_equal(first.train.ids, again.train.ids)
    assert isinstance(again.train.ids, np.memmap)
    assert list(first.train.names) == list(again.train.names)
    assert prepare_plan(config, again, 1)[1] == first_hash


def test_other_data_is_another_cache_entry(make):
    _, first = make([(rows(20), {})])
    _, other = make([([*rows(19), QUESTION | {"id": "19", "question": "Another?"}], {})])
    assert first.hashes["data_sha256"] != other.hashes["data_sha256"]
    assert not np.array_equal(first.train.ids, other.train.ids)


def test_duplicates_and_unlabelled_rows(make):
    _, prepared = make([([*rows(3), rows(1)[0] | {"id": "twice"}], {})])
    assert [r.id for r in prepared.removals] == ["twice"]
    with pytest.raises(DataError, match="no label"):
        make([([*rows(3), QUESTION | {"cop": None}], {})])
    _, prepared = make([([*rows(3), QUESTION | {"cop": None}], {})], drop_invalid=True)
    assert [(r.id, r.reason) for r in prepared.removals] == [("a", "no label")]


def test_no_test_question_of_the_demonstration_is_in_its_training_data():
    def questions(name):
        return {
            json.loads(line)["question"]
            for line in (DEMO / "data" / f"{name}.jsonl").read_text().splitlines()
        }

    train = questions("train")
    validation = questions("validation")
    test = questions("test")
    assert len(train) >= 2000
    assert len(validation) >= 300
    assert len(test) >= 500
    assert not train & test
    assert not train & validation
    assert not validation & test
    assert not questions("general") & test
    assert sum(path.stat().st_size for path in (DEMO / "base").iterdir()) < 5e6


def test_reasons_are_counted_by_kind_not_by_length(make):
    long = [QUESTION | {"id": f"long{i}", "opa": "very long option " * (200 + i)} for i in range(5)]
    _, prepared = make([([*rows(5), *long], {})], max_length=128, drop_invalid=True)
    assert count_reasons(prepared.removals) == {"too long": 5}
