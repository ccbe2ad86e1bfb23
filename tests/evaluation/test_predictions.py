"""The journal under kills, changing shards and full disks; reading files that are wrong in one
place.
"""

import errno
import json
import multiprocessing
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medqlora.evaluation.journal import Journal, hash_id, split_into_batches
from medqlora.evaluation.predictions import (
    PredictionError,
    collect_rows,
    read_predictions,
    read_rows,
)


@given(
    st.lists(st.text(min_size=1), unique=True, max_size=300), st.integers(1, 64), st.integers(1, 5)
)
def test_cells_are_a_partition_that_shards_do_not_change(ids, size, shards):
    question_batches = split_into_batches(ids, size)
    assert sorted(
        number for question_batch in question_batches for number in question_batch
    ) == list(range(len(ids)))
    assert len(question_batches) <= max(1, len(ids) // size)
    assert sum(len(question_batches[shard::shards]) for shard in range(shards)) == len(
        question_batches
    )
    where = {
        ids[number]: index
        for index, question_batch in enumerate(question_batches)
        for number in question_batch
    }
    again = split_into_batches(ids[::-1], size)
    assert all(
        where[ids[::-1][number]] == index
        for index, question_batch in enumerate(again)
        for number in question_batch
    )


def test_hash_is_the_same_on_every_machine():
    # the first 15 hexadecimal digits of its SHA-256
    assert hash_id("demo-test-0000") == 131723212439740675


def rows_of(*keys: str) -> list[dict]:
    return [
        {"key": key, "id": key, "gold": "A", "prediction": "A", "text": "é\n\u2028"} for key in keys
    ]


def test_what_is_appended_is_there_again(tmp_path):
    output = tmp_path / "p.jsonl"
    with Journal(output, 0, 2) as journal:
        journal.append(rows_of("a", "b"))
    with Journal(output, 1, 2) as journal:
        journal.append(rows_of("c"))
        assert set(journal.read()) == {"a", "b", "c"}
    with Journal(output, 0, 3) as journal:
        journal.finish(output, list(journal.read().values()))
    assert [row["id"] for row in map(json.loads, output.read_text().split("\n")[:-1])] == [
        "a",
        "b",
        "c",
    ]
    assert list(tmp_path.iterdir()) == [output]


def test_a_line_cut_anywhere_is_dropped_and_no_other(tmp_path):
    output = tmp_path / "p.jsonl"
    with Journal(output) as journal:
        journal.append(rows_of("a"))
        start = journal.path.stat().st_size
        journal.append(rows_of("b", "c"))
    whole = journal.path.read_bytes()
    for end in range(start, len(whole)):
        journal.path.write_bytes(whole[:end])
        with Journal(output) as again:
            assert set(again.read()) == {"a"}
            again.append(rows_of("d"))
            assert set(again.read()) == {"a", "d"}


def test_a_changed_line_is_dropped_and_its_batch_is_made_again(tmp_path):
    """Most changes leave valid JSON behind: another digit, another letter of a name."""
    output = tmp_path / "p.jsonl"
    with Journal(output) as journal:
        journal.append(rows_of("a"))
        journal.append(rows_of("b"))
    whole = journal.path.read_bytes()
    for place in range(whole.index(b"\n")):
        for bit in (1, 2):
            changed = bytearray(whole)
            changed[place] ^= bit
            journal.path.write_bytes(changed)
            with Journal(output) as again:
                found = again.read()
            # A space may become another blank; nothing else may pass.
            assert set(found) == {"b"} or list(found.values()) == rows_of("a", "b"), place
    journal.path.write_bytes(whole.replace(b'"gold"', b'"golf"', 1))
    with Journal(output) as again:
        again.append(rows_of("a"))
        again.finish(output, rows_of("a", "b"))
    assert list(tmp_path.iterdir()) == [output]


def test_full_disk_keeps_earlier_batches(tmp_path, monkeypatch):
    with Journal(tmp_path / "p.jsonl") as journal:
        journal.append(rows_of("a"))

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(
            PredictionError, match="No space left on device; earlier batches are kept"
        ):
            journal.append(rows_of("b"))
        monkeypatch.undo()
        journal.append(rows_of("c"))
        assert set(journal.read()) == {"a", "c"}


def hold(output, ready, leave):
    with Journal(output):
        ready.set()
        leave.wait(30)


def test_two_processes_do_not_write_one_shard(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    leave = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "p.jsonl", ready, leave))
    other.start()
    assert ready.wait(30)
    with (
        pytest.raises(PredictionError, match="another process is writing this shard"),
        Journal(tmp_path / "p.jsonl"),
    ):
        pass
    leave.set()
    other.join(30)


GOOD = {
    "id": "q1",
    "gold": "A",
    "prediction": "B",
    "subject": None,
    "option_logprobs": {"A": -1.5, "B": -0.5},
    "letter_mass": 0.8,
}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: expected an object, got list"),
        (json.dumps({"id": "q2", "gold": "A"}), 'line 2: no "prediction"'),
        (json.dumps(GOOD), "line 2: id q1 stands on line 1 too"),
        (json.dumps(GOOD | {"id": ""}), "line 2: id is ''"),
        (json.dumps(GOOD | {"id": 7}), "line 2: id is 7"),
        (json.dumps(GOOD | {"id": "q2", "gold": None}), "line 2: no label"),
        (
            json.dumps(GOOD | {"id": "q2", "gold": "E"}),
            "line 2: gold is 'E', which is not one of the options AB",
        ),
        (json.dumps(GOOD | {"id": "q2", "gold": "AB"}), "line 2: gold is 'AB'"),
        (json.dumps(GOOD | {"id": "q2", "prediction": "C"}), "line 2: prediction is 'C'"),
        (
            json.dumps(GOOD | {"id": "q2", "prediction": 1}),
            "line 2: prediction is 1; expected a text",
        ),
        (
            json.dumps(GOOD | {"id": "q2", "option_logprobs": {"A": float("nan"), "B": -1}}),
            "line 2: option_logprobs A is nan",
        ),
        (
            json.dumps(GOOD | {"id": "q2", "option_logprobs": {"A": 3.0, "B": -1}}),
            "line 2: option_logprobs A is 3.0",
        ),
        (
            json.dumps(GOOD | {"id": "q2", "kind": "open"}),
            "line 2: kind is 'open' in a file of kind 'choice'",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(PredictionError, match=r"p\.jsonl") as caught:
        read_predictions(path)
    assert message in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(PredictionError, match="No such file"):
        read_predictions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(PredictionError, match="is empty"):
        read_predictions(tmp_path / "empty.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(PredictionError, match="not UTF-8"):
        read_predictions(tmp_path / "bytes.jsonl")


options = st.dictionaries(st.sampled_from("ABCDE"), st.floats(-50, 0), min_size=1).map(
    lambda d: dict(zip(string.ascii_uppercase, d.values(), strict=False))
)


@given(st.lists(st.tuples(options, st.text()), min_size=1, max_size=20))
def test_columns_hold_what_rows_hold(drawn):
    rows = [
        {
            "id": f"q{i}",
            "gold": "A",
            "prediction": max(logprobs, key=logprobs.get),
            "option_logprobs": logprobs,
            "question": text,
        }
        for i, (logprobs, text) in enumerate(drawn)
    ]
    found = collect_rows(rows)
    for i, row in enumerate(rows):
        values = list(row["option_logprobs"].values())
        assert found.logprobs[i, : len(values)].tolist() == values
        assert np.isnan(found.logprobs[i, len(values) :]).all()
        chances = np.exp(values)
        assert found.confidence[i] == pytest.approx(chances.max() / chances.sum())
    assert found.right.tolist() == [row["prediction"] == "A" for row in rows]


def test_rows_are_found_again_by_offset(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [GOOD | {"id": f"q{i}", "question": "é" * i} for i in range(5)]
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    found = read_predictions(path)
    assert read_rows(path, [found.offsets[3], found.offsets[1]]) == [rows[3], rows[1]]


def test_features_of_questions():
    texts = [
        "Which is NOT a cause?",
        "All EXCEPT one",
        "Which drug isn't safe?",
        "Knot in 5 days",
        "A noted cause",
    ]
    found = collect_rows([GOOD | {"id": str(i), "question": text} for i, text in enumerate(texts)])
    assert found.negated == [True, True, True, False, False]
    assert found.numeric == [False, False, False, True, False]
    assert found.length[0] == 5


def test_parts_of_other_models_are_left_alone(tmp_path):
    """Garbage and rows of another model in the parts folder: not read, not deleted."""
    output = tmp_path / "p.jsonl"
    with Journal(output, 0, 1) as journal:
        journal.append(rows_of("a"))
        with Journal(output, 1, 2) as other_shard:
            other_shard.append(rows_of("another model's"))
        other = other_shard.path
        (journal.folder / "x.jsonl").write_text('{"a": 1}\n7\n[1]\n')
        assert set(journal.read()) == {"a", "another model's"}
        journal.finish(output, rows_of("a"))
    assert other.exists()
    assert not journal.path.exists()
