"""Small random instances of every decoder architecture that transformers has."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Each number with the names that configs give it.
SIZES = {
    199: "vocab_size vocab_size_per_layer_input",
    512: "max_position_embeddings n_positions max_seq_len",
    128: "mamba_d_ssm",
    96: (
        "intermediate_size ffn_dim ffn_hidden_size n_inner d_ff dff decoder_ffn_dim "
        "encoder_ffn_dim ffn_hidden"
    ),
    64: "hidden_size d_model n_embd dim word_embed_proj_dim lru_width index_topk",
    48: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size",
    32: "q_lora_rank",
    24: "qk_head_dim",
    16: (
        "head_dim kv_lora_rank qk_nope_head_dim v_head_dim mamba_d_state mamba_d_head "
        "mamba_head_dim state_size hidden_size_per_layer_input linear_key_head_dim "
        "linear_value_head_dim query_pre_attn_scalar index_head_dim"
    ),
    8: (
        "sliding_window attention_chunk_size attention_window_size window_size chunk_size "
        "mamba_chunk_size mamba_n_heads mamba_num_heads qk_rope_head_dim rotary_dim"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
        "encoder_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts "
        "linear_num_value_heads index_n_heads"
    ),
    2: (
        "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers "
        "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k linear_num_key_heads "
        "mamba_expand"
    ),
    1: (
        "n_group topk_group n_groups mamba_n_groups first_k_dense_replace n_shared_experts "
        "bos_token_id"
    ),
    0: "pad_token_id num_kv_shared_layers",
}
# Latent attention rotates a part of each head, and its config calls that part the head.
LATENT = {"num_key_value_heads": 4, "head_dim": 8}
SPECIAL = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "bamba": {"attn_layer_indices": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "minicpm3": LATENT,
    "sarvam_mla": LATENT,
    "youtu": LATENT,
}
# These lists have one entry per layer and are left for the config to make.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "block_types")
# Encoder-decoders, encoders and towers for pictures and sound are no causal language models, and of
# the others a small instance takes many megabytes or cannot be made from these sizes.
LEFT_OUT = """
axk1 axk2 bailing_hybrid bart bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small
blt camembert cohere_compass_text cpmant data2vec-text dbrx dots3_note dots3_note_text emu3 ernie
fuyu gemma4_assistant git got_ocr2 inkling2_loop_text inkling2_text inkling_text kimi_linear
longcat_flash marian mbart megatron-bert mllama moshi musicgen musicgen_melody mvp pegasus
phi4_multimodal plbart prophetnet reformer rembert roberta roberta-prelayernorm roc_bert roformer
trocr whisper xlm xlm-roberta xlm-roberta-xl xmod zamba zamba2
"""
# Several names may be of one class, and then stand for the last of them.
CLASSES = {
    model_class: name
    for name, model_class in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    if name not in LEFT_OUT.split()
}
ALL = list(CLASSES.values())
# At least one of each kind of attention, positions, head and state.
KINDS = """
llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 phimoe gpt2 gpt_neox gptj bloom mpt xglm
falcon gpt_neo opt biogpt gpt_oss falcon_h1 recurrent_gemma jamba mamba llama4_text deepseek_v3
cohere granite mixtral qwen3_next olmo2 stablelm nemotron bert electra
"""


def small_config(model_type: str, **changes) -> PretrainedConfig:
    """A narrow config of two layers, with windows of 8 tokens."""
    kind = AutoConfig.for_model(model_type).get_text_config(decoder=True)
    keys = kind.to_dict()
    sizes = {name: size for size, names in SIZES.items() for name in names.split() if name in keys}
    if "eos_token_id" in keys:
        sizes["eos_token_id"] = 2
    settings = sizes | SPECIAL.get(model_type, {}) | changes
    derived = {name: None for name in PER_LAYER if name in keys} | settings
    try:
        return type(kind)(**derived)
    # Some configs take no None for such a list, and have a default of any length.
    except (TypeError, ValueError):
        return type(kind)(**settings)


def small_model(model_type: str, attention: str = "eager", **changes) -> torch.nn.Module:
    """A small random model whose outputs are not all alike."""
    torch.manual_seed(0)
    config = small_config(model_type, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "sink" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()
