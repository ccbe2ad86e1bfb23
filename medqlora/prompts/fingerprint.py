"""The fingerprint of a prompt: a hash of the token ids of fixed probe examples.

It travels with an adapter, whose prompts must be the same wherever it is used.
"""

from __future__ import annotations

import hashlib
import json

from medqlora.data.examples import MultipleChoice, OpenAnswer
from medqlora.prompts.chat_template import Encoder, MessageEncoder, make_messages
from medqlora.prompts.encoding import encode_completions, encode_prefixes
from medqlora.prompts.styles import PromptError, render

# Renders that together show every rule above; their ids are the prompt's fingerprint (see
# tokens.fingerprint).
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
    """SHA-256 over the token ids of the probe examples: equal if and only if the prompts are (for
    all that they show).
    """
    shown = []
    for probe in PROBES:
        try:
            prompt = render(probe, encoder.style, encoder.completion)
        except PromptError:
            continue
        if isinstance(encoder, MessageEncoder):
            shown.append([make_messages(prompt), prompt.completion])
            continue
        completion = encode_completions(encoder, [prompt], [prompt.completion])[0]
        shown.append([encode_prefixes(encoder, [prompt])[0], completion, encoder.end_id])
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def hash_tokenizer(encoder: Encoder) -> str:
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    facts = (
        backend.to_str()
        if backend is not None
        else json.dumps(sorted(encoder.tokenizer.get_vocab().items()))
    )
    return hashlib.sha256(f"{facts}{encoder.tokenizer.chat_template}".encode()).hexdigest()
