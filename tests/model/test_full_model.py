"""training.method full: which weights train, their gradients and masters, and the model that is
written.
"""

import os
import sys

import pytest
import torch
from conftest import ARCHITECTURES, DEMO, ROOT, build_model, run_inside
from safetensors.torch import load_file, save_file
from test_losses import make_batch, make_table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    MixtralConfig,
)

from medqlora.core.config import Model, Training
from medqlora.model.adapter import read_adapter_metadata
from medqlora.model.agreement import prove_agreement
from medqlora.model.attention.backends import IMPLEMENTATIONS, set_attention
from medqlora.model.base import ModelError, freeze
from medqlora.model.full_model import (
    check_writable,
    list_trained,
    load_trained,
    read_full_metadata,
    save_model,
    unfreeze,
)
from medqlora.model.head_loss import AnswerLoss
from medqlora.model.overrides import list_overrides
from medqlora.model.recomputation import set_checkpointing
from medqlora.training.methods import FullMethod
from medqlora.training.optimizers import make_optimizer
from medqlora.training.strategies.launch import Strategy
from medqlora.training.strategies.replicated import Replicated

CPU = torch.device("cpu")


def make_trained(architecture: str, mode: str = "none", **changes):
    """A small model as a training has it, and the same model of transformers."""
    ours = build_model(architecture, **changes)
    theirs = build_model(architecture, **changes)
    set_attention(ours, IMPLEMENTATIONS["grouped"])
    freeze(ours, Model(base="", quantization="none"), torch.float32)
    unfreeze(ours)
    set_checkpointing(ours, mode)
    return ours, theirs


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_has_the_gradient_of_transformers(architecture, tied):
    """Norms, embeddings and heads included, whatever is packed, recomputed or cut into chunks."""
    ours, theirs = make_trained(architecture, "every_2", tie_word_embeddings=tied)
    loss_model = AnswerLoss(ours, chunk=7)
    assert prove_agreement(ours, "grouped", 512, loss_model).gradients < 1e-4
    assert list_overrides(ours)  # The replaced norms are among what is compared.
    table = make_table()
    rows = range(len(table.lengths))
    loss = loss_model.train()(**make_batch(table, rows, "grouped"))
    loss.backward()
    expected = 0.0
    for row in rows:
        ids = torch.from_numpy(table.ids[table.offsets[row] : table.offsets[row + 1]]).long()
        labels = ids.clone()
        labels[: table.prompt_lengths[row]] = -100
        logits = theirs(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        expected = expected + torch.nn.functional.cross_entropy(
            logits, labels[1:], ignore_index=-100, reduction="sum"
        )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = dict(theirs.named_parameters())
    found = dict(ours.named_parameters())
    assert found.keys() == wanted.keys()
    assert any("norm" in name for name in found)
    for name, parameter in found.items():
        difference = (parameter.grad - wanted[name].grad).norm()
        assert difference <= 1e-4 * wanted[name].grad.norm(), name


def test_towers_do_not_train():
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Gemma3Config(
        text_config=small | heads | {"vocab_size": 64},
        vision_config=small | {"num_attention_heads": 4, "image_size": 28, "patch_size": 14},
    )
    model = AutoModelForCausalLM.from_config(config)
    trained = list_trained(model)
    kept = {name for name, _ in model.named_parameters()} - trained.keys()
    assert kept
    assert all("vision" in name or "projector" in name for name in kept)
    assert not any("vision" in name or "projector" in name for name in trained)


def test_weights_in_another_dtype_are_refused():
    model = build_model("llama").bfloat16()
    model.model.norm.float()
    with pytest.raises(ModelError, match=r"model\.norm\.weight in float32 beside .* bfloat16"):
        unfreeze(model)


# ---- masters -------------------------------------------------------------------------------------


def make_trainer(dtype: torch.dtype, optimizer: str = "adamw") -> Replicated:
    torch.manual_seed(0)
    model = unfreeze(build_model("llama").to(dtype))
    training = Training(lr=1e-6, optimizer=optimizer)
    return Replicated(
        Strategy("one"),
        AnswerLoss(model, 64),
        lambda weights: make_optimizer(training, weights),
        max_grad_norm=1e9,
        device=CPU,
        scale=False,
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_updates_that_bfloat16_rounds_away_add_up_in_the_masters(optimizer):
    trainer = make_trainer(torch.bfloat16, optimizer)
    name = "model.norm.weight"
    start = trainer.read_weights()[name].clone()
    batch = make_batch(make_table(), range(4), "grouped")
    set_attention(trainer.module.model, IMPLEMENTATIONS["grouped"])
    for _ in range(3):
        trainer.backward(trainer(**batch))
        trainer.step(1e-6)
    moved = (trainer.read_weights()[name] - start).abs()
    assert float(moved.max()) == pytest.approx(3e-6, rel=0.2)
    # One step of bfloat16 at 1 is 0.0078: the rounded weight has not moved, and the master has.
    assert trainer.computed[name].dtype is torch.bfloat16
    assert torch.equal(trainer.computed[name], trainer.weights[name].bfloat16())


def test_gradients_of_micro_batches_add_up_in_float32():
    trainer = make_trainer(torch.bfloat16)
    set_attention(trainer.module.model, IMPLEMENTATIONS["grouped"])
    table = make_table()
    parts = []
    for row in range(6):
        trainer.drop_gradients()
        trainer.backward(trainer(**make_batch(table, [row], "grouped")))
        parts.append({name: value.clone() for name, value in trainer.read_gradients().items()})
    trainer.drop_gradients()
    for row in range(6):
        trainer.backward(trainer(**make_batch(table, [row], "grouped")))
    for name, value in trainer.read_gradients().items():
        assert value.dtype is torch.float32
        expected = parts[0][name]
        for part in parts[1:]:
            expected = expected + part[name]
        assert torch.equal(value, expected), name
        assert trainer.computed[name].grad is None


def test_masters_survive_reading_and_writing():
    trainer = make_trainer(torch.bfloat16)
    values = {name: value + 1e-5 for name, value in trainer.read_weights().items()}
    trainer.write_weights(values)
    for name, value in trainer.read_weights().items():
        assert torch.equal(value, values[name])
        assert torch.equal(trainer.computed[name], value.bfloat16())
    assert trainer.read_weights(keep=False) == {}


# ---- the folder ----------------------------------------------------------------------------------

METADATA = {"base": "base", "dtype": "bfloat16", "prompt_style": "plain", "step": 3}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def parts(request, tmp_path):
    """A base in several files, its config, and weights for it."""
    base = tmp_path / "base"
    model = build_model("llama", tie_word_embeddings=request.param)
    model.save_pretrained(base, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(DEMO / "base").save_pretrained(base)
    weights = {name: torch.randn_like(value) for name, value in list_trained(model).items()}
    return base, AutoConfig.from_pretrained(base), weights


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_is_the_trained_model(parts, tmp_path):
    base, config, weights = parts
    folder = tmp_path / "model"
    save_model(folder, *parts, METADATA)
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype is torch.bfloat16
    parameters = dict(loaded.named_parameters())
    assert parameters.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(parameters[name], value.bfloat16()), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is config.tie_word_embeddings
    ids = [AutoTokenizer.from_pretrained(part)("fever").input_ids for part in (base, folder)]
    assert ids[0] == ids[1]
    metadata = read_full_metadata(folder)
    assert metadata.items() >= (METADATA | {"method": "full"}).items()
    again = load_trained(folder, config)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name].bfloat16()) for name in weights)


@pytest.mark.parametrize("parts", [True], indirect=True)
def test_a_copy_of_a_tied_head_in_the_files_follows_the_embeddings(parts, tmp_path):
    base, _, weights = parts
    name = "model.embed_tokens.weight"
    tensors = {}
    for path in (*base.glob("*.safetensors"), base / "model.safetensors.index.json"):
        tensors |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    save_file(tensors | {"lm_head.weight": tensors[name].clone()}, base / "model.safetensors")
    save_model(tmp_path / "model", *parts, METADATA)
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], weights[name].bfloat16())


def test_a_weight_that_could_not_be_written_is_named_before_training(tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    config = MixtralConfig(**small, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"makes .*experts.* of other tensors .* train an adapter"):
        check_writable(tmp_path / "base", config)


def test_what_is_not_finite_or_was_changed_is_refused(parts, tmp_path):
    folder = tmp_path / "model"
    save_model(folder, *parts, METADATA)
    before = read_all(folder)
    # This number is finite in float32 and infinite in bfloat16.
    parts[2]["model.norm.weight"][0] = torch.finfo(torch.float32).max
    with pytest.raises(ModelError, match=r"model\.norm\.weight is not finite in bfloat16"):
        save_model(folder, *parts, METADATA)
    assert read_all(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model"]
    shard = next(folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ModelError, match=r"are not those that medqlora\.json describes"):
        read_full_metadata(folder)


def die_at(operation: int, work) -> bool:
    """Work in a fork that ends without any cleaning at its file operation of a number; say whether
    it got there.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    left = [operation]

    def count(event, arguments):
        # Python reports these operations to audit hooks before they are done.
        changes = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")
        if changes and ".model." in str(arguments[0]):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)

    sys.addaudithook(count)
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.full
@pytest.mark.parametrize("parts", [True], indirect=True)
def test_a_kill_at_any_file_operation_leaves_a_whole_model_or_none(parts, tmp_path):
    """The checkpoint that shares its files keeps them, and the model is put back from it."""
    base, config, weights = parts
    newer = {name: value + 1 for name, value in weights.items()}
    model = tmp_path / "model"
    checkpoint = tmp_path / "checkpoint"
    save_model(model, base, config, weights, METADATA)
    checkpoint.mkdir()
    for name, path in FullMethod().list_best(model).items():
        FullMethod().keep_file(path, checkpoint / name)
    expected = read_all(model)
    kept = read_all(checkpoint)
    operation = 0
    wholes = 0
    killed = True
    while killed:
        killed = die_at(operation, lambda: save_model(model, base, config, newer, METADATA))
        if model.exists():
            read_full_metadata(model)  # It refuses a model that is not whole.
            wholes += 1
        assert read_all(checkpoint) == kept
        FullMethod().put_back(checkpoint, model)
        assert read_all(model) == expected
        operation += 1
    assert operation > 12
    assert wholes > operation / 2


def test_the_folder_is_no_adapter(parts, tmp_path, monkeypatch):
    save_model(tmp_path / "model", *parts, METADATA)
    with pytest.raises(ModelError, match="nothing to merge") as caught:
        read_adapter_metadata(tmp_path / "model")
    assert "\n" not in str(caught.value)
    flags = ["--adapter", tmp_path / "model", "--output", tmp_path / "merged"]
    code, said = run_inside(ROOT / "recipes" / "merge_adapter.py", flags, monkeypatch)
    assert code == 2
    assert "give this folder as --model" in said
    assert not (tmp_path / "merged").exists()
