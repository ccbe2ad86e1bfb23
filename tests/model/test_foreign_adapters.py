"""Adapters that PEFT made elsewhere are computed as PEFT computes them, or refused in one line."""

import json

import pytest
import torch
from conftest import DEMO, ROOT, build_model, run_script
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from medqlora.core.config import Model
from medqlora.core.errors import UserError
from medqlora.engines.hf import HfEngine
from medqlora.engines.interface import EngineError, Request
from medqlora.engines.vllm import check_vllm_adapter
from medqlora.model.adapter import check_adapter, load_adapter
from medqlora.model.adapter_settings import read_settings
from medqlora.model.base import ModelError, load_base
from medqlora.model.merging import merge

CPU = torch.device("cpu")
ROWS = [[5, 6, 7, 8, 9, 10], [20, 30, 3, 40], list(range(50, 70))]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = [3, 7, 60]

# What PEFT lets a LoRA adapter do, beside its rank. Each is evaluated and merged.
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {
        "rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 6},
        "alpha_pattern": {"q_proj": 3, "^model.layers.1.mlp.down_proj": 30},
    },
    "ranks and rslora": {"rank_pattern": {"v_proj": 2}, "use_rslora": True},
    "one layer": {"layers_to_transform": [1]},
    "without a module": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "trained head": {"modules_to_save": ["lm_head"]},
    "trained embedding": {"modules_to_save": ["embed_tokens"]},
    "trained head and embedding": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "trained norm": {"modules_to_save": ["norm"]},
    "embedding": {"target_modules": [*ALL, "embed_tokens"]},
    "head": {"target_modules": [*ALL, "lm_head"]},
    "embedding and head": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "dora on all": {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_dora": True},
    "tokens": {"trainable_token_indices": TOKENS},
    "tokens by module": {"trainable_token_indices": {"embed_tokens": TOKENS}},
    "wrong fan_in_fan_out": {"target_modules": ["q_proj", "o_proj"], "fan_in_fan_out": True},
    "lora_bias": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "all biases": {"bias": "all"},
    "biases of the adapter": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
}
# vLLM serves these; the others are merged for it.
SERVED = ("plain", "rslora", "one layer", "without a module", "wrong fan_in_fan_out")
# These are evaluated, and a merge or vLLM would need more.
EVALUATED = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "repeated layers": {"layer_replication": [(0, 2), (1, 2)]},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]},
}


def train(folder, config, model):
    """Save a base and an adapter on it whose weights are all random; returns PEFT's logits."""
    model.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    adapted = get_peft_model(base, config)
    torch.manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    return read_logprobs(PeftModel.from_pretrained(base, folder / "adapter").eval())


def read_logprobs(model):
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([row]), use_cache=False)
            .logits[0, -1]
            .float()
            .log_softmax(-1)
            for row in ROWS
        ]


def score(folder, model):
    engine = HfEngine(*model)
    vocabulary = engine.causal.get_output_embeddings().weight.shape[0]
    scores = engine.score([Request(row, [[token] for token in range(vocabulary)]) for row in ROWS])
    return [torch.tensor(row) for row in scores]


def load(folder):
    return load_base(Model(base=str(folder), quantization="none", dtype="float32"), CPU)


def largest_difference(first, second):
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def check(folder, expected, merged=True):
    """Compare our evaluation and our merge with PEFT's log-probabilities."""
    base, backend = load(folder / "base")
    assert (
        largest_difference(
            score(folder, (load_adapter(base, folder / "adapter"), backend)), expected
        )
        < 1e-4
    )
    if not merged:
        with pytest.raises(ModelError, match="cannot be merged"):
            run_merge(folder)
        return
    run_merge(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder / "merged", attn_implementation="eager")
    assert largest_difference(read_logprobs(plain), expected) < 1e-4


def run_merge(folder):
    config = AutoConfig.from_pretrained(folder / "base")
    for _ in merge(
        folder / "adapter", folder / "base", folder / "merged", config, {}, "dequantized"
    ):
        pass


def lora(settings):
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ALL} | settings
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_every_kind_is_evaluated_and_merged_as_peft_does(tmp_path, kind, tied):
    # Only a base with biases can hold those of an adapter.
    biased = "bias" in kind
    model = build_model("llama", tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased)
    check(tmp_path, train(tmp_path, lora(KINDS[kind]), model))
    if kind in SERVED:
        assert check_vllm_adapter(tmp_path / "adapter") == 4
        return
    with pytest.raises(UserError, match=r"merge .* first \(recipes/merge_adapter.py\)"):
        check_vllm_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("kind", EVALUATED)
def test_what_only_transformers_computes_is_not_merged(tmp_path, kind):
    check(tmp_path, train(tmp_path, lora(EVALUATED[kind]), build_model("llama")), merged=False)
    with pytest.raises(ModelError, match="not served by vLLM; use --engine hf"):
        read_settings(tmp_path / "adapter", "vllm")


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(target_modules=ALL, r=4),
        LoKrConfig(target_modules=ALL, r=4),
        LNTuningConfig(),
        VeraConfig(target_modules=["q_proj", "v_proj"], r=4),
        OFTConfig(target_modules=ALL, oft_block_size=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_types_that_replace_modules_are_evaluated(tmp_path, config):
    config.task_type = "CAUSAL_LM"
    check(tmp_path, train(tmp_path, config, build_model("llama")), merged=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT_TUNING"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PREFIX_TUNING"),
        (lora({"alora_invocation_tokens": [5, 6]}), "alora_invocation_tokens"),
    ],
)
def test_what_peft_computes_outside_of_the_model_is_refused(tmp_path, config, message):
    train(tmp_path, config, build_model("llama"))
    with pytest.raises(ModelError, match=f"{message}.* cannot be evaluated; merge it"):
        load_adapter(load(tmp_path / "base")[0], tmp_path / "adapter")


@pytest.mark.parametrize("use", ["hf", "merge", "vllm"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("a_setting_of_a_later_version", {"x": 1}),
        ("use_qalora", True),
        ("init_lora_weights", "corda"),
        ("task_type", "SEQ_CLS"),
        ("peft_type", "XLORA"),
    ],
)
def test_unknown_settings_are_refused_everywhere(tmp_path, key, value, use):
    settings = lora({}).to_dict() | {"peft_type": "LORA", "target_modules": ALL, key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=f"{key} .* in adapter_config.json"):
        read_settings(tmp_path, use)


@pytest.mark.parametrize("weights", ["dequantized", "original"])
def test_the_command_calls_a_right_merge_right(tmp_path, weights):
    """The adapter of another program says nothing of quantization: its base is as the files are."""
    settings = lora({"rank_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]})
    train(tmp_path, settings, build_model("llama", vocab_size=1536).to(torch.bfloat16))
    AutoTokenizer.from_pretrained(DEMO / "base").save_pretrained(tmp_path / "base")
    folders = ("--adapter", tmp_path / "adapter", "--base", tmp_path / "base")
    script = ROOT / "recipes" / "merge_adapter.py"
    output = ("--output", tmp_path / "merged", "--base_weights", weights)
    done = run_script(script, *folders, *output)
    assert done.returncode == 0, done.stderr
    assert "merged model compared with base + adapter" in done.stdout


def test_an_adapter_of_another_model_is_one_line(tmp_path):
    train(tmp_path, lora({}), build_model("llama"))
    wider = build_model("llama", intermediate_size=96)
    with pytest.raises(ModelError, match=r"has 96 inputs, and 128 in the adapter"):
        check_adapter(tmp_path / "adapter", wider.config)
    for other in (
        wider,
        build_model("llama", num_hidden_layers=1),
        build_model("phi3"),
    ):
        with pytest.raises(ModelError, match="does not fit this model") as caught:
            load_adapter(other, tmp_path / "adapter")
        assert "\n" not in str(caught.value)


def test_biases_that_the_base_cannot_hold_are_not_merged(tmp_path):
    check_model = build_model("llama")
    train(tmp_path, lora({"lora_bias": True}), check_model)
    with pytest.raises(Exception, match="bias of the adapter is not in the base's files"):
        run_merge(tmp_path)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_are_evaluated_and_merged(tmp_path, tied):
    model = build_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    base.resize_token_embeddings(330, mean_resizing=False)
    for embedding in (base.get_input_embeddings(), base.get_output_embeddings()):
        torch.nn.init.normal_(embedding.weight, std=0.15)
    adapted = get_peft_model(base, lora({}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    expected = read_logprobs(adapted.eval())
    assert len(expected[0]) == 330
    check(tmp_path, expected)
    with pytest.raises(EngineError, match=r"has the tensor .*, which vLLM does not serve"):
        check_vllm_adapter(tmp_path / "adapter")
