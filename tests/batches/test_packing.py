import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from medqlora.batches.budgets import (
    PlanError,
    choose_packing,
    count_bins,
    describe_batch,
    list_budgets,
    share_bins,
)
from medqlora.batches.cache import load_arrays, save_arrays
from medqlora.batches.collate import cap_batches, collate
from medqlora.batches.order import count_moved
from medqlora.batches.plan import fit_bins, make_plan
from medqlora.core.config import Training
from medqlora.prompts.rows import TokenTable


def medmcqa_like(rows: int) -> np.ndarray:
    """Lengths as MedMCQA's prompts have them: median about 115 tokens, a long tail."""
    return np.clip(np.random.default_rng(0).lognormal(4.75, 0.55, rows).astype(np.int64), 30, 1024)


lengths_strategy = st.lists(st.integers(2, 64), min_size=1, max_size=200).map(np.array)


@given(lengths_strategy, st.integers(64, 300))
def test_bins_hold_every_row_once_and_never_overflow(lengths, capacity):
    bins = fit_bins(lengths, capacity)
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(lengths)))
    assert all(lengths[chosen].sum() <= capacity for chosen in bins)


@given(lengths_strategy, st.integers(64, 300))
def test_best_fit_is_within_its_known_bound(lengths, capacity):
    """Best-fit decreasing needs at most 11/9 of the optimum + 4 bins (Johnson 1973); the optimum is
    at least the volume.
    """
    assert (
        len(fit_bins(lengths, capacity)) <= 11 / 9 * (-(-lengths.sum() // capacity)) + 4
        or lengths.max() * 2 > capacity
    )


def rows_of_steps(plan) -> list[list[int]]:
    return [sorted(plan.rows_of(step).tolist()) for step in range(len(plan))]


@given(lengths_strategy, st.integers(1, 9), st.integers(1, 3), st.integers(0, 5), st.booleans())
# Five full bins of an epoch are a step of three and one of two, which two ranks could share.
@example(np.full(40, 8), 2, 3, 0, True)
def test_plan_shows_every_row_once_per_epoch(lengths, ranks, bins, seed, packing):
    """For any number of processes, and in the same steps as for one."""
    ranks = ranks if packing else 1
    settings = {
        "capacity": 64,
        "global_tokens": 64 * bins,
        "seed": seed,
        "packing": packing,
        "window": 50,
    }
    micro = share_bins(64 * bins, 64, int(lengths.max()), ranks)
    plan = make_plan(lengths, ranks=ranks, micro_tokens=micro, **settings)
    assert rows_of_steps(plan) == rows_of_steps(make_plan(lengths, **settings))
    assert sorted(plan.rows) == list(range(len(lengths)))
    for step in range(len(plan)):
        of_ranks = [plan.micro_batches(step, rank, ranks) for rank in range(ranks)]
        assert len({len(batches) for batches in of_ranks}) == 1, (
            "ranks run the same number of micro-batches"
        )
        for rows in (rows for batches in of_ranks for rows in batches):
            assert lengths[rows].sum() <= micro
    again = make_plan(lengths, ranks=ranks, micro_tokens=micro, **settings)
    assert all(
        np.array_equal(getattr(plan, name), getattr(again, name))
        for name in ("rows", "bins", "steps", "epochs")
    )


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 40), st.integers(1, 40))
def test_any_number_of_processes_has_a_micro_batch_that_holds_the_longest_row(
    packed, ranks, bins, longest
):
    longest = min(longest, packed)
    given_value = Training(global_batch_tokens=packed * bins, max_tokens_per_batch=packed)
    by_forecast = Training(global_batch_tokens=packed * bins, max_tokens_per_batch="auto")
    for training in (given_value, by_forecast):
        for size in list_budgets(training, longest, ranks):
            assert longest <= size <= packed * bins
            packing = choose_packing(training, size, ranks)
            assert packed * bins % packing == 0
    (size,) = list_budgets(given_value, longest, ranks)
    assert size == packed if bins % ranks == 0 else size <= packed


def test_medmcqa_size_is_planned_full():
    lengths = medmcqa_like(182_822)
    plan = make_plan(lengths, capacity=2048, global_tokens=8 * 2048)
    assert lengths.sum() / ((len(plan.bins) - 1) * 2048) > 0.995


def test_ranks_get_equal_tokens():
    lengths = medmcqa_like(20_000)
    plan = make_plan(lengths, capacity=4096, global_tokens=4096 * 8, ranks=4)
    for step in range(len(plan) - 1):
        tokens = [
            sum(lengths[rows].sum() for rows in plan.micro_batches(step, rank, 4))
            for rank in range(4)
        ]
        assert max(tokens) / min(tokens) < 1.02


def test_seed_and_epoch_change_the_order():
    lengths = medmcqa_like(500)
    plans = [
        make_plan(lengths, capacity=2048, global_tokens=2048, seed=seed, epochs=2)
        for seed in (0, 1)
    ]
    assert not np.array_equal(plans[0].rows[:400], plans[1].rows[:400])
    assert not np.array_equal(plans[0].rows[:400], plans[0].rows[500:900])
    assert plans[0].epochs[-1] == 2


def test_epochs_weights_and_steps():
    lengths = np.full(100, 10)
    repeats = np.r_[np.full(50, 2.0), np.full(50, 0.5)]
    plan = make_plan(lengths, capacity=100, global_tokens=100, repeats=repeats)
    counts = np.bincount(plan.rows, minlength=100)
    assert set(counts[:50]) == {2}
    assert counts[50:].sum() == 25
    assert len(make_plan(lengths, capacity=100, global_tokens=100, max_steps=3)) == 3
    assert len(make_plan(lengths, capacity=100, global_tokens=100, epochs=1.5)) == 15


@given(
    lengths_strategy,
    st.data(),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2**80),
    st.booleans(),
)
def test_a_sorted_epoch_has_the_rows_of_a_shuffled_one(lengths, data, ranks, bins, seed, packing):
    """Weights included. Its steps ascend, for any number of processes, and ties follow the seed."""
    ranks = ranks if packing else 1
    count = len(lengths)
    values = data.draw(st.lists(st.sampled_from([-1.5, 0.0, 0.25, 7.0]), min_size=count))
    order_by = np.resize(values, count)
    repeats = np.resize(data.draw(st.lists(st.sampled_from([0.5, 1.0, 1.75]), min_size=1)), count)
    settings = {"capacity": 64, "global_tokens": 64 * bins, "seed": seed, "packing": packing}
    settings |= {"repeats": repeats, "epochs": 2}
    try:
        shuffled = make_plan(lengths, **settings)
    except PlanError:  # The weights left no row of so few.
        return
    micro = share_bins(64 * bins, 64, int(lengths.max()), ranks)
    plan = make_plan(lengths, order_by=order_by, ranks=ranks, micro_tokens=micro, **settings)
    assert rows_of_steps(plan) == rows_of_steps(make_plan(lengths, order_by=order_by, **settings))
    first_epochs = []
    for one in (shuffled, plan):
        steps = [one.rows_of(step) for step in range(len(one)) if one.epochs[step] <= 1]
        first_epochs.append(np.concatenate(steps))
    assert sorted(first_epochs[0]) == sorted(first_epochs[1])
    assert sorted(shuffled.rows) == sorted(plan.rows)
    highest = [order_by[plan.rows_of(step)].max() for step in range(len(plan))]
    lowest = [order_by[plan.rows_of(step)].min() for step in range(len(plan))]
    for step in range(1, len(plan)):
        if plan.epochs[step] <= 1 or plan.epochs[step - 1] > 1:
            assert highest[step - 1] <= lowest[step]
    rows, moved = count_moved(repeats, order_by, seed)
    assert rows == len(first_epochs[0])
    assert 0 <= moved <= rows


def test_a_sorted_plan_is_full_and_differs_by_its_seed_in_ties_alone():
    lengths = medmcqa_like(5_000)
    losses = np.random.default_rng(1).normal(size=5_000)
    settings = {"capacity": 2048, "global_tokens": 8 * 2048}
    plan = make_plan(lengths, order_by=losses, **settings)
    assert lengths.sum() / ((len(plan.bins) - 1) * 2048) > 0.97
    again = make_plan(lengths, order_by=losses, seed=1, **settings)
    assert plan.hash_steps() == again.hash_steps()
    ties = [make_plan(lengths, order_by=losses.round(), seed=s, **settings) for s in (0, 1)]
    assert ties[0].hash_steps() != ties[1].hash_steps()
    assert count_moved(np.ones(5_000), losses, 0)[1] > 4_950
    assert count_moved(np.ones(5_000), None, 0) == (5_000, 0)


def test_rows_one_by_one_are_for_one_process():
    with pytest.raises(PlanError, match="steps would depend on their number"):
        make_plan(np.array([8] * 20), capacity=64, global_tokens=128, ranks=2, packing=False)


def test_batch_arithmetic():
    assert count_bins(4096 * 8, 4096) == 8
    training = Training(global_batch_tokens=1024, max_tokens_per_batch=1024)
    assert describe_batch(training, 256, 3) == (
        "1,024 tokens per step = 3 x 1 micro-batch(es) of at most 598; 1 of 1,024 are divided among"
        " them, with the same rows"
    )
    with pytest.raises(PlanError, match="use 12288 or 8192"):
        count_bins(10_000, 4096)
    with pytest.raises(PlanError, match="over max_tokens_per_batch"):
        make_plan(np.array([200]), capacity=100, global_tokens=100)


@given(lengths_strategy, st.integers(64, 128))
def test_cap_batches_keeps_the_rows(lengths, budget):
    rows = np.arange(len(lengths))
    capped = cap_batches(lengths, [rows], budget)
    assert sorted(np.concatenate(capped)) == list(rows)
    assert all(lengths[chosen].sum() <= budget for chosen in capped)


def test_cap_batches_says_when_one_row_is_too_much():
    with pytest.raises(PlanError, match="single row"):
        cap_batches(np.array([100]), [np.array([0])], 50)


def test_collate_exact():
    table = TokenTable(
        np.array([1, 2, 3, 4, 5, 6, 7], np.int32),
        np.array([0, 3, 7]),
        np.array([2, 1], np.int32),
        ["a", "b"],
        np.array([0, 1], np.int32),
    )
    batch = collate(table, np.array([1, 0]))
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 1, 2, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch["cu_seqlens"].tolist() == [0, 4, 7]
    assert batch["max_seqlen"] == 4
    assert batch["predict_at"].tolist() == [0, 1, 2, 5]
    assert batch["targets"].tolist() == [5, 6, 7, 3]


def test_saved_arrays_are_memory_mapped_and_never_half_written(tmp_path):
    arrays = {"a": np.arange(5), "b": np.ones(2)}
    save_arrays(tmp_path / "x", arrays)
    save_arrays(tmp_path / "x", arrays)  # a second process with the same content
    loaded = load_arrays(tmp_path / "x", ["a", "b"])
    assert isinstance(loaded["a"], np.memmap)
    assert np.array_equal(loaded["a"], np.arange(5))
