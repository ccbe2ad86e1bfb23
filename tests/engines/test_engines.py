"""The transformers engine on architectures with windows and caps, out of memory, and
OpenAI-compatible servers good and bad.
"""

import time
import warnings

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, build_model
from replying_server import Server

from medqlora.engines.hf import HfEngine
from medqlora.engines.interface import Answer, ChatRequest, EngineError, Request, Sampling
from medqlora.engines.openai import ChatEngine, CompletionsEngine, Connection
from medqlora.engines.packed_requests import count_tokens, lay_out
from medqlora.model.attention.documents import DOCUMENTS

RANDOM = np.random.default_rng(0)


def make_requests(count: int, common: int = 0) -> list[Request]:
    """Random prompts with a common beginning; options of one, two and three tokens."""
    start = RANDOM.integers(3, 300, common).tolist()
    draw = lambda low, high: RANDOM.integers(3, 300, RANDOM.integers(low, high)).tolist()  # noqa: E731
    return [
        Request(start + draw(5, 60), [draw(1, 2), draw(1, 2), draw(2, 3), draw(3, 4)])
        for _ in range(count)
    ]


def plain_scores(model, request: Request) -> list[float]:
    values = []
    for option in request.options:
        with torch.no_grad():
            logits = (
                model(input_ids=torch.tensor([request.prefix + option]), use_cache=False)
                .logits[0]
                .float()
                .log_softmax(-1)
            )
        values.append(
            sum(logits[len(request.prefix) - 1 + i, token].item() for i, token in enumerate(option))
        )
    return values


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("common", [0, 48])
def test_scores_do_not_depend_on_packing_or_sharing(architecture, common):
    """Sliding windows shorter than the shared beginning (Gemma-2: 16, Phi-3: 24 tokens) and soft
    caps included.
    """
    requests = make_requests(9, common)
    expected = np.array([plain_scores(build_model(architecture), request) for request in requests])
    engine = HfEngine(build_model(architecture, DOCUMENTS), "varlen", 200)
    assert abs(np.array(engine.score(requests, common)) - expected).max() < 2e-4
    assert bool(engine.shared_states) is (common > 0), "the common beginning was read once"
    single = HfEngine(build_model(architecture, DOCUMENTS), "varlen", 1)
    assert abs(np.array(single.score(requests, 0)) - expected).max() < 2e-4


def test_backends_without_nesting_repeat_the_prompt():
    requests = make_requests(5)
    model = build_model("llama", "sdpa")
    engine = HfEngine(model, "sdpa", 300)
    assert (
        abs(
            np.array(engine.score(requests))
            - np.array([plain_scores(model, request) for request in requests])
        ).max()
        < 2e-4
    )


def test_layout_counts_are_right():
    for nested in (True, False):
        for shared in (0, 4) if nested else (0,):
            requests = make_requests(3, 4)
            segments, parents, _, asked = lay_out(requests, shared, nested)
            assert sum(map(len, segments)) == sum(
                count_tokens(request, shared, nested) for request in requests
            )
            assert len(asked) == sum(
                len(option) for request in requests for option in request.options
            )
            assert nested or set(parents) == {None}


def test_a_wrong_shared_reading_is_noticed(monkeypatch):
    """A model whose layers do not read the kept states (here: they are spoilt) is asked without
    sharing, with a warning.
    """
    requests = make_requests(4, 40)
    engine = HfEngine(build_model("llama", DOCUMENTS), "varlen", 400)
    expected = engine.score(requests, 0)
    real_run = engine.run_pack

    def spoilt(requests, shared):
        if shared:
            engine.shared_states = {
                layer: (keys * 3, values) for layer, (keys, values) in engine.shared_states.items()
            }
        return real_run(requests, shared)

    monkeypatch.setattr(engine, "run_pack", spoilt)
    with pytest.warns(UserWarning, match="read with every question"):
        found = engine.score(requests, 40)
    assert not engine.sharing
    assert np.allclose(found, expected, atol=1e-4)


def test_out_of_memory_halves_the_batch(monkeypatch):
    requests = make_requests(8)
    engine = HfEngine(build_model("llama", DOCUMENTS), "varlen", 4096)
    expected = engine.score(requests)
    real_run = engine.run_pack

    def limited(requests, shared):
        if len(requests) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real_run(requests, shared)

    monkeypatch.setattr(engine, "run_pack", limited)
    assert np.allclose(engine.score(requests), expected, atol=1e-4)
    assert engine.max_tokens < 4096
    monkeypatch.setattr(
        engine, "run_pack", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    )
    with pytest.raises(EngineError, match="out of memory on one question"):
        engine.score(requests)


def test_row_over_the_models_positions_is_refused():
    engine = HfEngine(build_model("llama", DOCUMENTS), "varlen")
    with pytest.raises(EngineError, match="question 1 has 600 tokens, the model 512 positions"):
        engine.score([Request([5] * 600, [[6], [7]])])
    with pytest.raises(EngineError, match="need 516 tokens"):
        engine.generate([[5] * 500], Sampling(16, (2,), str))


def test_generation_is_that_of_one_row_alone():
    """Left padding changes nothing, and the model's own generation settings are not mixed in."""
    model = build_model("llama", DOCUMENTS)
    model.generation_config.repetition_penalty = 5.0
    engine = HfEngine(model, "varlen", 4096)
    prefixes = [request.prefix for request in make_requests(6)]
    sampling = Sampling(8, (2,), lambda ids: " ".join(map(str, ids)))
    together = engine.generate(prefixes, sampling)
    assert together == [engine.generate([prefix], sampling)[0] for prefix in prefixes]
    ids = list(prefixes[0])
    for _ in range(8):
        with torch.no_grad():
            ids.append(
                int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            )
    assert together[0][0].text == " ".join(map(str, ids[len(prefixes[0]) :]))
    assert model.config._attn_implementation == DOCUMENTS
    assert model.generation_config.repetition_penalty == 5.0


# ---- servers -------------------------------------------------------------------------------------


MODEL = build_model("llama")


def logprobs_of(ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return (
            MODEL(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
        )


def completions(ways: tuple[str, ...]):
    """A server in front of a real small model that knows some of the ways to ask for
    log-probabilities.
    """

    def reply(path, body):
        ids = body["prompt"]
        table = logprobs_of(body["prompt"])
        if "logprob_token_ids" in body and "ids" in ways:
            top = {
                f"token_id:{token}": table[-1, token].item() for token in body["logprob_token_ids"]
            }
            return 200, {"choices": [{"text": "", "logprobs": {"top_logprobs": [top]}}]}
        if body.get("echo"):
            if "echo" not in ways:
                return 400, {"error": {"message": "echo is not supported"}}
            values = [None, *[table[i, token].item() for i, token in enumerate(ids[1:])], -0.5]
            return 200, {"choices": [{"text": "", "logprobs": {"token_logprobs": values}}]}
        best = table[-1].topk(20)
        top = {
            f"<{token}>": value
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        }
        return 200, {"choices": [{"text": "", "logprobs": {"top_logprobs": [top]}}]}

    return reply


def decode(ids: list[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


@pytest.mark.parametrize("ways", [("ids", "echo"), ("echo",), ()])
def test_servers_score_as_the_model_itself(ways):
    requests = make_requests(6)
    if not ways:  # only what is among the twenty likeliest tokens can be known
        requests = [
            Request(r.prefix, [[int(t)] for t in logprobs_of(r.prefix)[-1].topk(2).indices] + [[3]])
            for r in requests
        ]
    expected = np.array([plain_scores(MODEL, request) for request in requests])
    with Server(completions(ways)) as server:
        connection = Connection(server.url, "m", key="secret", concurrency=3, retries=0)
        engine = CompletionsEngine(connection, decode)
        found = np.array(engine.score(requests))
    assert engine.scoring == (ways[0] if ways else "top")
    known = ~np.isnan(found)
    assert abs(found - expected)[known].max() < 1e-4
    assert known.all() if ways else known[:, :2].all() and not known[:, 2].all()
    assert all(headers["authorization"] == "Bearer secret" for headers in server.headers)


def test_chat_servers_get_messages():
    def reply(path, body):
        assert path == "/v1/chat/completions"
        if body["max_tokens"] == 1:
            top = [
                {"token": token, "logprob": value}
                for token, value in ((" B", -0.2), ("A", -2.0), ("B", -3.0), ("The", -4.0))
            ]
            return 200, {
                "choices": [
                    {
                        "message": {"role": "assistant", "content": " B"},
                        "logprobs": {
                            "content": [{"token": " B", "logprob": -0.2, "top_logprobs": top}]
                        },
                    }
                ]
            }
        return 200, {
            "choices": [
                {"message": {"role": "assistant", "content": f"Answer: {'AB'[i]}"}}
                for i in range(body["n"])
            ]
        }

    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Two?"},
    ]
    with Server(reply) as server:
        engine = ChatEngine(Connection(server.url, "m", retries=0))
        (scores,) = engine.score([ChatRequest(messages, ["A", "B", "C"])])
        answers = engine.generate([messages], Sampling(20, temperature=1.0, samples=2))
    assert scores[:2] == [-2.0, -0.2]
    assert np.isnan(scores[2])
    assert answers == [[Answer("Answer: A"), Answer("Answer: B")]]
    assert all(body["messages"] == messages for body in server.bodies)
    assert not any("chat_template_kwargs" in body for body in server.bodies)
    with Server(reply) as server:
        engine = ChatEngine(Connection(server.url, "m", retries=0), {"enable_thinking": False})
        engine.score([ChatRequest(messages, ["A", "B"])])
        engine.generate([messages], Sampling(20, samples=1))
    assert len(server.bodies) == 2
    for body in server.bodies:
        assert body["chat_template_kwargs"] == {"enable_thinking": False}


def test_failed_requests_are_tried_again():
    failures = iter(
        [(503, {"error": {"message": "busy"}}), (429, {"error": {"message": "slow down"}})]
    )
    good = completions(("ids",))
    requests = make_requests(1)[:1]
    requests = [Request(requests[0].prefix, requests[0].options[:2])]
    with Server(lambda path, body: next(failures, None) or good(path, body)) as server:
        engine = CompletionsEngine(Connection(server.url, "m", retries=3), decode)
        found = engine.score(requests)
    assert found[0] == pytest.approx(plain_scores(MODEL, requests[0]), abs=1e-4)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((200, b"<html>hello</html>"), "is it an OpenAI-compatible server"),
        ((200, {"hello": 1}), "without choices"),
        ((401, {"error": {"message": "bad key sk-123"}}), "refuses the key"),
        (
            (404, {"error": {"message": "no such model"}}),
            "answers 404 for model m: .*no such model",
        ),
        (
            (200, {"choices": [{"text": "A", "logprobs": None}]}),
            "without log-probabilities; use --scoring generate",
        ),
    ],
)
def test_bad_servers(reply, message):
    with Server(lambda path, body: reply) as server:
        engine = CompletionsEngine(Connection(server.url, "m", retries=0), decode)
        with pytest.raises(EngineError, match=message) as caught:
            engine.score(make_requests(1))
    assert "\n" not in str(caught.value)
    assert "sk-123" not in str(caught.value)


def test_server_that_is_down_or_slow():
    down = CompletionsEngine(Connection("http://127.0.0.1:9/v1", "m", retries=0), decode)
    with pytest.raises(EngineError, match="cannot be reached"):
        down.score(make_requests(1))
    with Server(lambda path, body: time.sleep(1) or (200, {})) as server:
        slow = CompletionsEngine(Connection(server.url, "m", timeout=0.2, retries=0), decode)
        with pytest.raises(EngineError, match=r"did not answer in 0\.2 s, once; raise --timeout"):
            slow.score(make_requests(1))


@pytest.mark.parametrize("architecture", ["mamba", "stablelm"])
def test_models_that_packing_would_mix_are_asked_row_by_row(architecture):
    """A state-space model carries its state over packed rows: noticed at the start, then every row
    runs alone.
    """
    import transformers

    torch.manual_seed(0)
    if architecture == "mamba":
        config = transformers.MambaConfig(
            vocab_size=320, hidden_size=64, num_hidden_layers=2, state_size=8
        )
    else:
        config = transformers.StableLmConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    requests = make_requests(4)
    expected = np.array([plain_scores(model, request) for request in requests])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = HfEngine(model, "varlen", 512)
        assert abs(np.array(engine.score(requests)) - expected).max() < 2e-4
