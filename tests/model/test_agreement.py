"""What is computed is what the model computes, or it is refused in one line.

The reference is always transformers: eager attention, one row at a time, the model's own head.
"""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_model
from small_architectures import ALL, KINDS, small_model
from test_losses import make_batch, make_table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    LlamaConfig,
    Phi3Config,
    PhimoeConfig,
)

from medqlora.core.config import Config, Data, Lora, Model, Training
from medqlora.core.errors import UserError
from medqlora.engines.hf import HfEngine
from medqlora.engines.interface import Request, Sampling
from medqlora.model.adapter import attach_adapter
from medqlora.model.adapter_preview import preview_adapter
from medqlora.model.agreement import prove_agreement
from medqlora.model.attention.backends import AttentionError
from medqlora.model.attention.documents import DOCUMENTS
from medqlora.model.base import compute_hidden, freeze, load_base
from medqlora.model.head_loss import AnswerLoss, compute_logits
from medqlora.model.overrides import list_overrides, undo_overrides
from medqlora.model.rotation import find_short_length, prove_rotation
from medqlora.training.session import build, load, prove

CPU = torch.device("cpu")
LENGTHS = (20, 33, 9)
UNQUANTIZED = {"quantization": "none", "dtype": "float32"}


def frozen(model: torch.nn.Module) -> torch.nn.Module:
    """The model as load_base leaves it."""
    freeze(model, Model(base="random", **UNQUANTIZED), torch.float32)
    return model


def draw_rows(lengths=LENGTHS, vocabulary: int = 199) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def run_alone(model: torch.nn.Module, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """The reference's logits of each row, [tokens, vocab]."""
    return [model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows]


def sum_losses(logits: list[torch.Tensor], rows: list[torch.Tensor]) -> float:
    return sum(
        F.cross_entropy(scores[:-1], row[1:], reduction="sum").item()
        for scores, row in zip(logits, rows, strict=True)
    )


def lay_side_by_side(rows: list[torch.Tensor], backend: str) -> dict:
    """Rows whose tokens are all supervised, as a training packs them."""
    lengths = torch.tensor([len(row) for row in rows])
    table = replace(
        make_table(len(rows)),
        ids=torch.cat(rows).int().numpy(),
        offsets=F.pad(lengths.cumsum(0), (1, 0)).numpy(),
        prompt_lengths=np.ones(len(rows), np.int32),
    )
    return make_batch(table, range(len(rows)), backend)


def train(folder, rows: list[torch.Tensor]) -> float:
    """The loss of the rows as a training computes it."""
    config = Config(
        model=Model(base=str(folder), **UNQUANTIZED),
        lora=Lora(r=4),
        data=Data(train=[], eval=[], max_length=128),
        training=Training(gradient_checkpointing="none", max_tokens_per_batch=256),
    )
    preview_adapter(AutoConfig.from_pretrained(folder), config.lora)
    built = build(load(config, CPU), config)
    prove(built, config)
    built.loss_model.eval()
    return float(built.loss_model(**lay_side_by_side(rows, built.backend)))


def score(folder, rows: list[torch.Tensor]) -> list[list[float]]:
    """The scores of each row's last three tokens, and of the first of them."""
    model, backend = load_base(Model(base=str(folder), **UNQUANTIZED), CPU)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="attention")
        engine = HfEngine(model, backend, 100)
    requests = [
        Request(row[:-3].tolist(), [row[-3:].tolist(), row[-3:-2].tolist()]) for row in rows
    ]
    return engine.score(requests)


def expected_scores(logits: list[torch.Tensor], rows: list[torch.Tensor]) -> list[list[float]]:
    scores = []
    for values, row in zip(logits, rows, strict=True):
        logprobs = values.log_softmax(-1)[:-1].gather(1, row[1:, None])[-3:, 0].tolist()
        scores.append([sum(logprobs), logprobs[0]])
    return scores


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "architecture",
    [
        *KINDS.split(),
        *(pytest.param(name, marks=pytest.mark.full) for name in ALL if name not in KINDS.split()),
    ],
)
def test_every_architecture_is_right_or_refused_in_one_line(architecture, tmp_path):
    """Never another number, and never a traceback."""
    small_model(architecture).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    rows = draw_rows()
    expected = run_alone(reference.eval(), rows)
    for compute, wanted in (
        (train, sum_losses(expected, rows)),
        (score, expected_scores(expected, rows)),
    ):
        try:
            found = torch.tensor(compute(tmp_path, rows))
        except UserError as error:
            refusal = str(error)
        else:
            assert torch.allclose(found, torch.tensor(wanted), rtol=1e-4, atol=1e-3)
            continue
        assert "\n" not in refusal
        assert any(part in refusal for part in ("use --", "set --", "not supported", "target_mod"))


# ---- what the proof catches ----------------------------------------------------------------------


def with_another_head(change) -> torch.nn.Module:
    """A model that changes its logits behind its head, in a way that its config does not tell."""
    model = build_model("llama", DOCUMENTS)
    forward = model.forward

    def changed(*arguments, **keywords):
        out = forward(*arguments, **keywords)
        out.logits = change(out.logits)
        return out

    model.forward = changed
    return model


def without_window(window: int) -> torch.nn.Module:
    """A model whose layers do not tell the attention the window that its mask has."""
    model = small_model("gemma2", DOCUMENTS, sliding_window=window)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    return model


@pytest.mark.parametrize(
    ("make", "model_class"),
    [
        (lambda: small_model("gpt_oss", DOCUMENTS), "GptOssForCausalLM"),  # drops the sinks
        (lambda: small_model("bloom", DOCUMENTS), "BloomForCausalLM"),  # drops the causal mask
        (lambda: small_model("xglm", DOCUMENTS), "XGLMForCausalLM"),
        (lambda: small_model("bert", DOCUMENTS), "BertLMHeadModel"),  # has more than a linear head
        (lambda: with_another_head(lambda logits: logits * 1.5), "LlamaForCausalLM"),
        (lambda: with_another_head(lambda logits: 3 * torch.tanh(logits / 3)), "LlamaForCausalLM"),
        (lambda: with_another_head(lambda logits: logits + logits.flip(-1)), "LlamaForCausalLM"),
        (lambda: without_window(300), "Gemma2ForCausalLM"),
    ],
)
def test_another_computation_is_refused_by_the_names_of_both(make, model_class):
    model = frozen(make())
    with pytest.raises(AttentionError, match=f"attention grouped.*{model_class}'s own eager"):
        prove_agreement(model, "grouped", 512, AnswerLoss(model, 16))


def test_a_window_that_no_row_reaches_is_no_reason_to_refuse():
    assert prove_agreement(without_window(300), "grouped", 300).logits < 1e-4


@pytest.mark.parametrize("factor", [{"lm_head_multiplier": 0.3}, {"logits_scaling": 4.0}])
def test_factors_of_falcon_h1_and_granite_reach_the_logits(factor):
    name = "falcon_h1" if "lm_head_multiplier" in factor else "granite"
    model = small_model(name, **factor)
    (row,) = draw_rows((20,))
    with torch.no_grad():
        logits = compute_logits(model, compute_hidden(model, row[None], torch.arange(20)[None])[0])
    assert torch.allclose(logits, run_alone(model, [row])[0], atol=1e-5)


def test_a_wrong_gradient_is_refused_where_the_logits_are_right():
    model = frozen(build_model("llama", DOCUMENTS))
    layer = model.model.layers[0].mlp

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 2

    # The reference undoes our methods, so this one stands for an override with a wrong backward.
    forward = layer.forward
    layer.forward = lambda x: forward(Halved.apply(x))
    assert prove_agreement(model, "grouped", 64).logits < 1e-4
    with pytest.raises(AttentionError, match="input gradients"):
        prove_agreement(model, "grouped", 64, AnswerLoss(model, 16))


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_the_proof_leaves_no_trace(name):
    """Whether it passes or refuses."""
    model = attach_adapter(frozen(small_model(name, DOCUMENTS)), Lora(r=4, dropout=0.1), 0)
    model.train()
    model.get_base_model().model.layers[0].eval()
    loss_model = AnswerLoss(model, 16)

    def look() -> tuple:
        modes = [module.training for module in model.modules()]
        methods = [module.__dict__.get("forward") is not None for module in model.modules()]
        windows = [getattr(module, "sliding_window", None) for module in model.modules()]
        config = model.get_base_model().config
        attention = config._attn_implementation, getattr(config, "sliding_window", None)
        gradients = [parameter.grad for parameter in model.parameters()]
        return modes, methods, windows, attention, gradients, list_overrides(model)

    torch.manual_seed(3)
    state = torch.get_rng_state()
    before = look()
    try:
        prove_agreement(model, "grouped", 512, loss_model)
        assert name == "llama"
    except AttentionError:
        assert name == "gpt_oss"
    assert look() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_moe"])
def test_rounding_is_no_reason_to_refuse(name, dtype):
    """Experts that are chosen otherwise after rounding enlarge it."""
    model = small_model(name, DOCUMENTS, num_hidden_layers=8).to(dtype)
    freeze(model, Model(base="random", quantization="none"), dtype)
    prove_agreement(model, "grouped", 512, AnswerLoss(model, 16))


def test_rows_that_cannot_be_packed_run_alone_and_are_right():
    model = frozen(small_model("bloom", DOCUMENTS))
    with pytest.warns(UserWarning, match="one at a time"):
        engine = HfEngine(model, "grouped", 100)
    rows = draw_rows()
    requests = [Request(row[:-1].tolist(), [row[-1:].tolist()]) for row in rows]
    expected = [
        [scores.log_softmax(-1)[-2, row[-1]].item()]
        for scores, row in zip(run_alone(small_model("bloom"), rows), rows, strict=True)
    ]
    assert torch.tensor(engine.score(requests)) == pytest.approx(torch.tensor(expected), abs=1e-4)


# ---- rotary factors that depend on the length ----------------------------------------------------

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FACTORS = {"short_factor": [1.0, 1.1] * 4, "long_factor": [1.5, 4.0] * 4}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 32} | FACTORS
LENGTH_DEPENDENT = {
    "phi3": lambda: Phi3Config(
        **SMALL, original_max_position_embeddings=32, rope_parameters=LONGROPE | {"rope_theta": 1e4}
    ),
    "llama": lambda: LlamaConfig(**SMALL, rope_parameters=LONGROPE | {"rope_theta": 1e4}),
    "phimoe": lambda: PhimoeConfig(
        **SMALL,
        num_local_experts=4,
        rope_parameters=LONGROPE | {"rope_theta": 1e4, "short_mscale": 1.1, "long_mscale": 1.4},
    ),
    "dynamic": lambda: LlamaConfig(
        **SMALL | {"max_position_embeddings": 32},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    ),
}


def length_dependent(name: str, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LENGTH_DEPENDENT[name]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_rotary_factors_do_not_depend_on_pack_mates(name):
    """Rows around the border, of 32 tokens, in one pack and in any order."""
    rows = draw_rows((20, 100, 32, 33, 7, 60))
    reference = [run_alone(length_dependent(name, "eager"), [row])[0] for row in rows]
    model = frozen(length_dependent(name, DOCUMENTS))
    for order in (range(6), reversed(range(6))):
        order = list(order)
        batch = lay_side_by_side([rows[i] for i in order], "grouped")
        keys = ("input_ids", "position_ids", "documents")
        with torch.no_grad():
            hidden = compute_hidden(model, **{key: batch[key] for key in keys})
            logits = compute_logits(model, hidden[0]).split([len(rows[i]) for i in order])
        for number, found in zip(order, logits, strict=True):
            assert torch.allclose(found, reference[number], atol=1e-4), len(rows[number])
        expected = sum_losses(reference, rows)
        assert AnswerLoss(model, 64)(**batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_a_rotation_that_depends_on_pack_mates_is_refused(name):
    model = frozen(length_dependent(name, DOCUMENTS))
    prove_rotation(model, 100)
    assert find_short_length(model) == 32
    undo_overrides(model)
    prove_rotation(model, 31)
    with pytest.raises(AttentionError, match=r"RotaryEmbedding rotates.*32 tokens or less"):
        prove_rotation(model, 100)


@pytest.mark.parametrize("shared", [0, 40])
def test_scores_of_long_rows_are_the_models_own(shared):
    """Options of one request that lie on both sides of the border, and a common beginning."""
    reference = length_dependent("phi3", "eager")
    engine = HfEngine(frozen(length_dependent("phi3", DOCUMENTS)), "grouped", 1_000)
    common = draw_rows((shared,))[0].tolist() if shared else []
    rows = [(common + row.tolist()) for row in draw_rows((10, 31, 32, 50, 24, 70))]
    requests = [Request(row, [[5], [6, 7], [8, 9, 10]]) for row in rows]
    found = engine.score(requests, shared)
    for request, scores in zip(requests, found, strict=True):
        for option, value in zip(request.options, scores, strict=True):
            ids = torch.tensor([*request.prefix, *option])
            (logits,) = run_alone(reference, [ids[:-1]])
            logprobs = logits.log_softmax(-1)[-len(option) :]
            expected = logprobs.gather(1, torch.tensor(option)[:, None]).sum().item()
            assert value == pytest.approx(expected, abs=1e-3), (len(request.prefix), option)


def test_generated_answers_do_not_depend_on_the_longest_prompt():
    sampling = Sampling(max_new_tokens=6, temperature=0.0, stop_ids=(2,), decode=str)
    engine = HfEngine(frozen(length_dependent("phi3", DOCUMENTS)), "grouped", 1_000)
    prompts = [row.tolist() for row in draw_rows((20, 60, 29, 12))]
    together = engine.generate(prompts, sampling)
    assert together == [engine.generate([prompt], sampling)[0] for prompt in prompts]


# ---- what is trained -----------------------------------------------------------------------------


def test_all_linear_leaves_vision_towers_and_projectors_alone_unless_told():
    text = {key: value for key, value in SMALL.items()} | {"head_dim": 16, "sliding_window": 8}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=198
    )
    for targets, towers in (("all-linear", False), (["q_proj", "fc1"], True)):
        lora = Lora(r=4, target_modules=targets)
        model = attach_adapter(AutoModelForCausalLM.from_config(config), lora, 0)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert any("language_model" in name for name in trained)
        assert any("vision_tower" in name for name in trained) is towers
        preview = preview_adapter(config, lora)
        assert preview.trained_parameters == sum(
            parameter.numel() for parameter in trained.values()
        )
