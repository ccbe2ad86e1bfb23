"""The fingerprint of a prompt: a hash of the token ids of fixed probe examples.

It is part of the adapter metadata, because an adapter must be used with the prompts that it was
trained on.
"""

from __future__ import annotations

import hashlib
import json

from medqlora.data.examples import MultipleChoice, OpenAnswer
from medqlora.prompts.chat_template import Encoder, MessageEncoder, make_messages
from medqlora.prompts.encoding import encode_completions, encode_prefixes, prefix_text
from medqlora.prompts.styles import PromptError, render

# These examples use every rule of the styles: the numbers of options, an explanation, a context, an
# open question. A change of a probe would change the fingerprint of every saved adapter.
PROBES = (
    MultipleChoice(
        "p1",
        "Which?",
        ("one", "two", "three", "four"),
        2,
        "medmcqa",
        "probe",
        explanation="Because.",
    ),
    MultipleChoice(
        "p2",
        "Which?",
        ("one", "two", "three", "four", "five"),
        4,
        "medqa",
        "probe",
        explanation="Because.",
    ),
    MultipleChoice(
        "p3", "Is it?", ("yes", "no", "maybe"), 1, "pubmedqa", "probe", context=("Seen.", "Found.")
    ),
    OpenAnswer("p4", "What?", "That.", "medquad", "probe"),
)


def fingerprint(encoder: Encoder | MessageEncoder) -> str:
    """Return the SHA-256 of the token ids, or messages, of the probe examples.

    A probe that has no prompt in the encoder's style is left out.
    """
    encoded: list = []
    if isinstance(encoder, MessageEncoder) and encoder.template_arguments:
        # Token ids show what the arguments do; of a server's prompts only messages are known.
        encoded.append(dict(encoder.template_arguments))
    for probe in PROBES:
        try:
            prompt = render(probe, encoder.style, encoder.completion)
        except PromptError:
            continue
        if isinstance(encoder, MessageEncoder):
            encoded.append([make_messages(prompt), prompt.completion])
            continue
        completion = encode_completions(encoder, [prompt], [prompt.completion])[0]
        encoded.append([encode_prefixes(encoder, [prompt])[0], completion, encoder.end_id])
    return hashlib.sha256(json.dumps(encoded).encode()).hexdigest()


def show_probes(encoder: Encoder) -> dict[str, dict[str, str]]:
    """Return what a model reads and learns to write, for a probe of each kind of question.

    They show the form of the prompts without a row of anybody's data.

    Returns:
        "choice" and "open", for those that have a prompt in the encoder's style -> "prompt" and
        "completion".
    """
    shown = {}
    for kind, probe in (("choice", PROBES[0]), ("open", PROBES[-1])):
        try:
            prompt = render(probe, encoder.style, encoder.completion)
        except PromptError:
            continue
        shown[kind] = {"prompt": prefix_text(encoder, prompt), "completion": prompt.completion}
    return shown


def hash_tokenizer(encoder: Encoder) -> str:
    """Return the SHA-256 of the tokenizer and its chat template.

    For a tokenizer without a Rust backend the vocabulary alone is hashed.
    """
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        definition = backend.to_str()
    else:
        definition = json.dumps(sorted(encoder.tokenizer.get_vocab().items()))
    # The chat template is no part of the backend's own definition.
    return hashlib.sha256(f"{definition}{encoder.tokenizer.chat_template}".encode()).hexdigest()
