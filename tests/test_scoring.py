"""Option log-probabilities against transformers' own logits, with single- and several-token letters."""

import numpy as np
import pytest
import torch
from conftest import DEMO, real
from transformers import AutoModelForCausalLM, AutoTokenizer

from medqlora.config import DataEntry, Model
from medqlora.engines.hf import EngineError, score_options
from medqlora.examples import LETTERS, read_examples
from medqlora.models import load_base
from medqlora.prompts import render
from medqlora.scoring import predict_letters
from medqlora.tokens import encode_candidates, encode_prefixes, make_encoder

CPU = torch.device("cpu")


def reference(model, prefix, options):
    """Sum of log-probabilities of each option's tokens after the prefix, one unpacked row at a time."""
    values = []
    for option in options:
        ids = torch.tensor([prefix + option])
        with torch.no_grad():
            logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        values.append(sum(logprobs[len(prefix) - 1 + i, token].item() for i, token in enumerate(option)))
    return values


@pytest.mark.parametrize("folder", ["demo", "stories260k"])
@pytest.mark.parametrize("max_tokens", [300, 4096])
def test_packed_scores_equal_transformers(folder, max_tokens):
    path = DEMO / "base" if folder == "demo" else real("models/stories260k")
    examples, _ = read_examples(DataEntry(format="medmcqa", path=str(DEMO / "data" / "test.jsonl"), limit=25), "test")
    encoder = make_encoder(AutoTokenizer.from_pretrained(path), "plain")
    prompts = [render(example, "plain", "letter") for example in examples]
    prefixes = encode_prefixes(encoder, prompts)
    candidates = [encode_candidates(encoder, example, prompt) for example, prompt in zip(examples, prompts, strict=True)]
    lengths = {len(option) for options in candidates for option in options}
    assert (lengths == {1}) is (folder == "demo"), "the small real model splits letters"
    model, backend = load_base(Model(base=str(path), quantization="none", dtype="float32"), CPU)
    found = dict(score_options(model, backend, prefixes, candidates, max_tokens))
    assert sorted(found) == list(range(25))
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for number, scores in found.items():
        expected = reference(plain, prefixes[number], candidates[number])
        assert scores.logprobs == pytest.approx(expected, abs=1e-4)
        assert scores.mass == pytest.approx(np.exp(expected).sum(), rel=1e-4)


def test_prediction_rows(demo_tokenizer):
    examples, _ = read_examples(DataEntry(format="medmcqa", path=str(DEMO / "data" / "test.jsonl"), limit=10), "test")
    model, backend = load_base(Model(base=str(DEMO / "base"), dtype="float32"), CPU)
    rows = list(predict_letters(model, backend, make_encoder(demo_tokenizer), examples, "demo", 512))
    assert {row["id"] for row in rows} == {example.id for example in examples}
    for row in rows:
        assert row["prediction"] == max(row["option_logprobs"], key=row["option_logprobs"].get)
        assert set(row["option_logprobs"]) == set(LETTERS[:4])
        assert 0 < row["letter_mass"] <= 1.0001


def test_row_over_the_models_positions_is_refused():
    model, backend = load_base(Model(base=str(DEMO / "base"), quantization="none", dtype="float32"), CPU)
    with pytest.raises(EngineError, match="question 1 has 600 tokens, the model 512"):
        list(score_options(model, backend, [[5] * 600], [[[6], [7]]]))
