"""A random Llama for comparisons of speed and memory, which do not depend on the weights' values.

    python bench/peers/build_base.py --tokenizer DIR --output DIR [--shape 1b]

The shape of SmolLM2-135M with 13 of its 30 layers (74 million parameters with a vocabulary of
49,000), or that of Llama-3.2-1B, and the given tokenizer.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from medqlora.core.entry import enter

    enter()

SHAPES = {
    "74m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 13,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
# The head of a tiny vocabulary would cost nothing, so the model has at least so many tokens.
LEAST_VOCABULARY = {"74m": 0, "1b": 32_000}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="folder of a tokenizer with 32k tokens or more",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--shape", choices=list(SHAPES), default="74m", help="default %(default)s")
    arguments = parser.parse_args()

    # Importing these takes seconds, so mistakes are reported before.
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    # Every call makes the same weights.
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=max(len(tokenizer), LEAST_VOCABULARY[arguments.shape]),
        **SHAPES[arguments.shape],
        max_position_embeddings=8192,
        # Both originals use the embeddings as their head.
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
