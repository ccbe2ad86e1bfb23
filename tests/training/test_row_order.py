"""Rows go from easy to hard by the base's own loss, measured once, for any number of processes."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEMO, ROOT, run_script

from medqlora.batches.plan import make_plan
from medqlora.core.config import Config
from medqlora.prompts.rows import TokenTable
from medqlora.training.row_order import (
    FILE,
    find_unseen,
    measure_rows,
    read_losses,
    write_losses,
)
from medqlora.training.session import Loaded, TrainingError, load

RECIPE = ROOT / "recipes" / "sft_qlora.py"


def make_table(rows: int = 40, longest: int = 60) -> TokenTable:
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, longest, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    prompts = np.array([generator.integers(1, length) for length in lengths], np.int32)
    ids = generator.integers(3, 300, offsets[-1]).astype(np.int32)
    names = [f"row {number}" for number in range(rows)]
    return TokenTable(ids, offsets, prompts, names, np.arange(rows, dtype=np.int32))


def load_demo() -> Loaded:
    config = Config(model={"base": str(DEMO / "base"), "dtype": "float32", "quantization": "none"})
    return load(config, torch.device("cpu"))


def test_a_row_has_the_mean_loss_that_it_has_alone():
    table = make_table()
    loaded = load_demo()
    losses = measure_rows(loaded, table, chunk=7)
    for row, first in enumerate(table.offsets[:-1]):
        ids = torch.from_numpy(table.ids[first : table.offsets[row + 1]].astype(np.int64))
        with torch.no_grad():
            logits = loaded.base(ids[None], use_cache=False).logits[0]
        begin = int(table.prompt_lengths[row])
        alone = F.cross_entropy(logits[begin - 1 : -1].float(), ids[begin:])
        assert losses[row] == pytest.approx(alone.item(), rel=1e-4)


def test_a_loss_that_is_not_finite_names_its_row():
    loaded = load_demo()
    table = make_table()
    with torch.no_grad():
        loaded.base.get_input_embeddings().weight[int(table.ids[table.offsets[5]])] = np.nan
    with pytest.raises(TrainingError, match=r"rows is not finite, such as .*row 5"):
        measure_rows(loaded, table, chunk=64)


def test_losses_come_back_from_their_file_to_the_bit(tmp_path):
    table = make_table()
    losses = np.random.default_rng(2).normal(3, 1, 40).astype(np.float32)
    write_losses(tmp_path, table, losses)
    assert np.array_equal(read_losses(tmp_path), losses)
    path = tmp_path / FILE
    text = path.read_text()
    for damage in ('{"id": "x"}\n', '{"loss": NaN}\n', "[]\n"):
        path.write_text(text + damage)
        assert len(read_losses(tmp_path)) == 0
    assert len(read_losses(tmp_path / "none")) == 0


def flags(output, cache, *more: str) -> list[str]:
    return [
        *("--output_dir", str(output), "--data.cache_dir", str(cache), "--data.test", "[]"),
        *("--data.train.0.limit", "60", "--data.train.1.limit", "20", "--data.eval", "[]"),
        *("--training.max_tokens_per_batch", "512", "--training.global_batch_tokens", "1024"),
        *("--training.gradient_checkpointing", "none", "--training.max_steps", "100"),
        *("--training.epochs", "2", "--lora.r", "4", "--model.dtype", "float32"),
        *("--training.save_steps", "2", "--data.order", "easy_to_hard", *more),
    ]


def read_run(folder) -> tuple[list[float], dict]:
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in log], json.loads((folder / "environment.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = run_script(RECIPE, *flags(folder / "run", folder / "cache"))
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def test_a_run_goes_from_easy_to_hard_and_says_so(whole):
    run, shown = whole
    losses, environment = read_run(run)
    half = len(losses) // 2  # the steps of one epoch
    assert losses[0] < losses[half - 1]
    order = environment["order"]
    assert (order["name"], order["seed"]) == ("easy_to_hard", 0)
    assert order["first_tenth_loss"] < order["last_tenth_loss"]
    assert f"{order['moved_rows']:,} of {order['rows']:,} rows stand at another place" in shown
    assert "not finite" not in shown
    origin = json.loads((run / "origin.json").read_text())
    assert origin["row_losses_sha256"] == environment["row_losses_sha256"]


def test_a_resumed_run_keeps_the_order_without_measuring_again(whole, tmp_path):
    """The cache is gone, so only the run's own file knows the losses."""
    shutil.copytree(whole[0], tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    shutil.rmtree(newest)
    (tmp_path / "run" / "metrics.json").unlink()
    done = run_script(RECIPE, *flags(tmp_path / "run", tmp_path / "cache"), "--resume")
    assert done.returncode == 0, done.stderr
    assert read_run(tmp_path / "run")[0] == read_run(whole[0])[0]
    assert not list((tmp_path / "cache").glob("losses-*"))
    # A changed loss would be another order.
    path = tmp_path / "run" / FILE
    first = json.loads(path.read_text().splitlines()[0])
    path.write_text(path.read_text().replace(str(first["loss"]), "99.5", 1))
    done = run_script(RECIPE, *flags(tmp_path / "run", tmp_path / "cache"), "--resume")
    assert done.returncode == 2
    assert "the base's losses of the training rows (row_losses_sha256 was" in done.stderr


def test_a_training_that_ends_inside_an_epoch_is_warned_of():
    lengths = np.full(40, 10)
    config = Config(model={"base": "x"}, data={"order": "short_to_long"})
    for epochs, warned in ((1, False), (2, False), (1.5, True)):
        plan = make_plan(lengths, capacity=50, global_tokens=50, epochs=epochs, order_by=lengths)
        assert bool(find_unseen(config, plan)) == warned
    shuffled = Config(model={"base": "x"})
    assert find_unseen(shuffled, plan) == []
