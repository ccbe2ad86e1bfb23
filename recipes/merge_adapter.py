"""Merge an adapter into its base, file by file, and check that the result is the trained model.

    python recipes/merge_adapter.py --adapter runs/mine/adapter --output merged

By default the adapter is merged into the dequantized weights, with which the training computed.
`--base_weights original` merges it into the original 16-bit weights instead. That is another model
than the trained one, and a second printed error says how much their logits differ.
"""

import argparse
import gc
import os
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from rich.progress import track

from medqlora.core.command import (
    CommandParser,
    make_console,
    quiet_libraries,
    run_command,
    run_early,
)
from medqlora.core.config import Model
from medqlora.core.environment import prefer_expandable_segments
from medqlora.core.reading import expand_path
from medqlora.core.staging import stage_folder


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter folder of a run")
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder to write, which must not exist"
    )
    parser.add_argument(
        "--base", help="folder or hub id of the base (default: the one that the adapter names)"
    )
    parser.add_argument(
        "--base_weights",
        choices=["dequantized", "original"],
        default="dequantized",
        help="the weights that the adapter is merged into (default dequantized)",
    )
    parser.add_argument(
        "--verify",
        choices=["true", "false"],
        default="true",
        help="compare the logits of the result with those of base + adapter (default true)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    # The arguments are checked before torch is imported, which takes seconds. The variable of its
    # allocator must be set before, because torch reads it while it is imported.
    ARGUMENTS = run_early(parse_arguments)
    prefer_expandable_segments(os.environ)

import torch

from medqlora.engines.packed_passes import run_packed
from medqlora.model.adapter import check_adapter, load_adapter, read_adapter_metadata
from medqlora.model.adapter_metadata import check_present, read_metadata
from medqlora.model.base import find_model, load_base, load_tokenizer, read_model_config, unwrap
from medqlora.model.base_weights import MERGED_WEIGHTS
from medqlora.model.hardware import default_device, name_dtype
from medqlora.model.head_loss import compute_logits
from medqlora.model.identity import resolve_base, sample_weights
from medqlora.model.merging import compare_logits, merge
from medqlora.model.weight_files import MergeError
from medqlora.prompts.chat_template import encode_text, make_encoder
from medqlora.prompts.encoding import encode_prefixes
from medqlora.prompts.fingerprint import PROBES
from medqlora.prompts.styles import PromptError, render
from medqlora.reporting.model_card import Merge, describe_upload, write_merged_card

# Upper bounds of the mean relative error of the logits, by the dtype of computing. Only rounding of
# the merged weights to that dtype makes a difference. In 16 bits, the error of a single prompt may
# be several times as large.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Training with int8 weights also rounds activations, which merged weights cannot reproduce.
INT8_BOUND = 5e-2
# These texts are not in a prompt style of this package.
VERIFY_TEXTS = (
    (
        "A 54-year-old man with diabetes presents with chest pain that radiates to the left arm."
        " The most likely diagnosis is"
    ),
    "The half-life of a drug that is eliminated by first-order kinetics depends on",
    (
        "Question: Which electrolyte falls first?\nA. Sodium\nB. Potassium\nC. Calcium\nD."
        " Chloride\nAnswer:"
    ),
)

console = make_console(soft_wrap=True)


def main() -> None:
    arguments = ARGUMENTS
    # Python's own form would add a file name and a line of source.
    warnings.showwarning = lambda message, *_: console.print(str(message), style="yellow")
    quiet_libraries()
    arguments.adapter = expand_path(arguments.adapter, "--adapter")
    arguments.output = expand_path(arguments.output, "--output")
    if os.path.lexists(arguments.output):
        raise MergeError(f"--output {arguments.output} exists; give a new folder")
    metadata = read_adapter_metadata(arguments.adapter)
    base_id = metadata.get("base") if arguments.base is None else arguments.base
    if base_id is None:
        raise MergeError(
            f"--adapter {arguments.adapter}: its metadata names no base; give the base with --base"
        )
    # The recorded revision is one of the hub; a folder has none.
    revision = None if find_model(base_id) else metadata.get("revision")
    config = read_model_config(base_id, revision)
    check_present(arguments.adapter, check_adapter(arguments.adapter, config))
    base = resolve_base(base_id, revision)
    if metadata.get("base_sha256") not in (None, sample_weights(base)):
        raise MergeError(
            f"--base {base_id}: its weights are not those the adapter was trained on"
            f" ({metadata['base']}); give that base"
        )

    # The folder gets its name after the comparison, so no wrong model ever stands under it.
    with stage_folder(arguments.output) as folder:
        steps = merge(arguments.adapter, base, folder, config, metadata, arguments.base_weights)
        total = next(steps)[1]
        for _ in track(steps, "merging", total - 1, console=console, transient=True):
            pass
        check = None
        if arguments.verify == "true":
            check = verify(arguments, metadata, base, folder)
        how = Merge(read_metadata(folder).get(MERGED_WEIGHTS, arguments.base_weights), check)
        unknown = write_merged_card(folder, arguments.output.name, arguments.adapter, how)
    quantized = metadata.get("quantization", "none") != "none"
    weights = arguments.base_weights if quantized else "unquantized"
    console.print(f"{arguments.output}: {total} tensors, {weights} base")
    if unknown is not None:
        console.print(f"the model card tells nothing of the training: {unknown}", style="yellow")
    console.print(describe_upload(arguments.output, arguments.output.name))


def verify(
    arguments: argparse.Namespace, metadata: dict, base: Path, folder: Path
) -> dict[str, float]:
    """Compare the logits of the merged model with those of the merged base + adapter.

    Only one model is in memory at a time.

    Args:
        arguments: The command line.
        metadata: The adapter metadata.
        base: The base's folder.
        folder: The merged model's folder.

    Returns:
        What compare_logits found.

    Raises:
        MergeError: The merged model differs by more than rounding.
    """
    device = default_device()
    rows = make_rows(metadata, folder)
    # An adapter of another program names no dtype; its merged model has that of the base.
    dtype = read_model_config(str(folder)).dtype
    # A CPU computes nothing in float16, so the rounded weights are used in float32 there.
    halved = device.type == "cpu" and dtype is torch.float16
    settings = {"dtype": "float32" if halved else name_dtype(dtype)}
    trained = settings | {
        "quantization": metadata.get("quantization", "none"),
        "double_quantization": metadata.get("double_quantization", True),
    }
    quantized = trained["quantization"] != "none"
    original = settings | {"quantization": "none"}
    base_settings = trained if arguments.base_weights == "dequantized" else original
    merged = read_logits(Model(base=str(folder), **original), None, rows, device)
    reference = read_logits(Model(base=str(base), **base_settings), arguments.adapter, rows, device)
    figures = compare_logits(reference, merged)
    console.print(f"merged model compared with base + adapter: {describe(figures)}")
    bound = BOUNDS[dtype]
    if base_settings["quantization"] == "int8":
        bound = max(bound, INT8_BOUND)
    if figures["mean_relative_error"] > bound:
        raise MergeError(
            f"the merged model is not the trained one: its mean logit error"
            f" {figures['mean_relative_error']:.1e} is above {bound:.0e}; {arguments.output} was"
            " not written, report this with the adapter's medqlora.json"
        )
    if arguments.base_weights == "original" and quantized:
        reference = read_logits(Model(base=str(base), **trained), arguments.adapter, rows, device)
        console.print(
            f"the adapter was trained on the {trained['quantization']} base; compared with that"
            f" model: {describe(compare_logits(reference, merged))}"
        )
    return figures


def make_rows(metadata: dict, output: Path) -> list[list[int]]:
    """Return the token ids of the prompts that the models are compared on."""
    encoder = make_encoder(
        load_tokenizer(str(output)),
        metadata.get("prompt_style", "auto"),
        metadata.get("completion", "letter"),
        metadata.get("template_arguments", {}),
    )
    prompts = []
    for probe in PROBES:
        try:
            prompts.append(render(probe, encoder.style, encoder.completion))
        except PromptError:  # Not every style can render every kind of question.
            continue
    texts = [encode_text(encoder.tokenizer, text) for text in VERIFY_TEXTS]
    return encode_prefixes(encoder, prompts) + texts


def describe(figures: dict[str, float]) -> str:
    """Return the result of compare_logits in words."""
    return (
        f"relative logit error {figures['mean_relative_error']:.1e} on average,"
        f" {figures['max_relative_error']:.1e} at most; same most likely token on"
        f" {figures['same_top_token']:.0%} of the prompts"
    )


def read_logits(
    settings: Model, adapter: Path | None, rows: list[list[int]], device: torch.device
) -> list[torch.Tensor]:
    """Return the logits of the last position of each row, [vocabulary] on the CPU."""
    model, backend = load_base(settings, device)
    model = load_adapter(model, adapter) if adapter else model
    model.eval()
    causal = unwrap(model)
    logits = []
    # The model is loaded outside of this, because overrides are proven with gradients.
    with torch.no_grad():
        for row in rows:
            hidden = run_packed(causal, backend, [row])
            logits.append(compute_logits(causal, hidden[-1:])[0].cpu())  # float32 [vocab]
    del model, causal
    # The next model needs this memory now, and not when Python next looks for cycles.
    gc.collect()
    return logits


if __name__ == "__main__":
    run_command(main)
