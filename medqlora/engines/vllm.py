"""The vLLM engine: offline batches with prefix caching, for a merged checkpoint or a base with a
LoRA adapter.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from medqlora.engines.interface import EngineError, Request, Sampling, decode_answer

LONG = 16  # tokens; a longer option costs less as part of the prompt than one request per token
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM allocates for


class VllmEngine:
    """vLLM's LLM, fed with token ids.

    Option log-probabilities come from `logprob_token_ids` (vLLM 0.16 and newer: one request per
    question). Older versions can only be asked with `allowed_token_ids`: the ranking is the same,
    but values are relative to the options, so that the letter mass is always 1; `exact` tells
    which.
    """

    name = "vllm"

    def __init__(
        self,
        model: str,
        adapter: Path | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        max_length: int | None = None,
        gpu_memory: float = 0.9,
        tensor_parallel: int = 1,
        seed: int = 0,
        prefix_caching: bool = True,
    ):
        """dtype: auto, float32, bfloat16 or float16; gpu_memory: share of the card; max_length:
        tokens a row may have; prefix_caching: off where repeated prompts are to be timed.

        Raises: EngineError: vLLM is not installed or does not start, a dtype or adapter it cannot
            serve.
        """
        if importlib.util.find_spec("vllm") is None:
            raise EngineError(
                "--engine vllm: the vllm package is not installed here; pip install"
                " 'medqlora[vllm]', or use --engine hf"
            )
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise EngineError(
                f"--engine vllm: --dtype {dtype} is not served; merge the adapter"
                " (recipes/merge_adapter.py), or use --engine hf"
            )
        import torch
        from vllm import LLM, SamplingParams

        self.exact = hasattr(SamplingParams(), "logprob_token_ids")
        settings: dict[str, Any] = {} if self.exact else {"logprobs_mode": "processed_logprobs"}
        rank = check_adapter_config(adapter) if adapter else 0
        if adapter:
            settings |= {
                "enable_lora": True,
                "max_lora_rank": min(r for r in LORA_RANKS if r >= rank),
            }
        try:
            self.llm = LLM(
                model=str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model,
                revision=revision,
                dtype=dtype,
                seed=seed,
                max_model_len=None if max_length is None else max_length + 1,
                gpu_memory_utilization=gpu_memory,
                tensor_parallel_size=tensor_parallel,
                enable_prefix_caching=prefix_caching,
                generation_config="vllm",
                enforce_eager=not torch.cuda.is_available(),
                disable_log_stats=True,
                **settings,
            )
        except (ValueError, RuntimeError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
            raise EngineError(f"--engine vllm: vLLM did not start with {model}: {reason}") from None
        self.lora = None
        self.adapters = adapter is not None
        if adapter:
            from vllm.lora.request import LoRARequest

            self.lora = LoRARequest("adapter", 1, str(adapter))
            self.unproven = learned_anything(adapter)

    def score(self, requests: Sequence[Request], shared: int = 0) -> list[list[float]]:
        """See interface.Engine. Options of several tokens cost further requests; prefix caching
        reads what is shared once.

        Raises:
            EngineError: the adapter changes nothing although it holds learned weights.
        """
        if self.lora is not None and self.unproven:
            self.prove_adapter(requests[:4])
        return self.score_with(requests, self.lora)

    def score_with(self, requests: Sequence[Request], lora: Any) -> list[list[float]]:
        """One prompt for each text that tokens are asked after: a question's prefix, and what
        options of several tokens add to it. Long options (texts) are scored as part of the prompt
        instead, which vLLM cannot do with adapters enabled.
        """
        asked: dict[tuple[int, ...], list[int]] = {}  # text -> tokens asked for after it
        whole: list[tuple[int, int]] = []  # options scored as part of the prompt
        for number, request in enumerate(requests):
            for index, option in enumerate(request.options):
                if len(option) > LONG and not self.adapters:
                    whole.append((number, index))
                    continue
                for at, token in enumerate(option):
                    asked.setdefault((*request.prefix, *option[:at]), []).append(token)
        prompts = [list(text) for text in asked]
        settings = [self.limit_to(sorted(set(tokens))) for tokens in asked.values()]
        prompts += [
            requests[number].prefix + requests[number].options[index][:-1]
            for number, index in whole
        ]
        settings += [
            self.limit_to([requests[number].options[index][-1]], prompt_logprobs=0)
            for number, index in whole
        ]
        if not self.exact and any(
            len(option) > 1 for request in requests for option in request.options
        ):
            raise EngineError(
                "--engine vllm: this version cannot score options of several tokens; install vLLM"
                " 0.16 or newer, or use --engine hf"
            )
        outputs = self.run(prompts, settings, lora)
        after = {
            text: output.outputs[0].logprobs[0]
            for text, output in zip(asked, outputs[: len(asked)], strict=True)
        }
        prompted = dict(zip(whole, outputs[len(asked) :], strict=True))
        scores = []
        for number, request in enumerate(requests):
            values = []
            for index, option in enumerate(request.options):
                if (number, index) in prompted:
                    output = prompted[number, index]
                    start = len(request.prefix)
                    value = sum(
                        output.prompt_logprobs[start + at][token].logprob
                        for at, token in enumerate(option[:-1])
                    )
                    values.append(value + output.outputs[0].logprobs[0][option[-1]].logprob)
                else:
                    values.append(
                        sum(
                            after[(*request.prefix, *option[:at])][token].logprob
                            for at, token in enumerate(option)
                        )
                    )
            scores.append(values)
        return scores

    def limit_to(self, tokens: list[int], **more: Any) -> Any:
        """Settings that give the log-probabilities of these tokens as the next one."""
        from vllm import SamplingParams

        known = (
            {"logprob_token_ids": tokens}
            if self.exact
            else {"allowed_token_ids": tokens, "logprobs": len(tokens)}
        )
        return SamplingParams(max_tokens=1, temperature=0, detokenize=False, **known, **more)

    def run(self, prompts: Sequence[list[int]], settings: list[Any], lora: Any) -> list[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return self.llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                settings,
                use_tqdm=False,
                lora_request=lora,
            )
        except EngineDeadError:
            raise EngineError(
                "--engine vllm: vLLM's engine process died, its own message stands above; try"
                " --engine hf"
            ) from None
        except ValueError as error:
            raise EngineError(f"--engine vllm: {str(error).splitlines()[0][:300]}") from None

    def prove_adapter(self, requests: Sequence[Request]) -> None:
        """An adapter that vLLM loads but does not apply would pass as a tuned model: its scores are
        the base's.
        """
        base = self.score_with(requests, None)
        tuned = self.score_with(requests, self.lora)
        if base == tuned:
            raise EngineError(
                "--engine vllm: the adapter changes no score, so vLLM does not apply it to this"
                " model; merge it (recipes/merge_adapter.py) and give the merged folder as --model"
            )
        self.unproven = False

    def generate(self, prefixes: Sequence[list[int]], sampling: Sampling) -> list[list[str]]:
        """See interface.Engine. Sampled answers depend on the seed and the prompt's number."""
        from vllm import SamplingParams

        settings = [
            SamplingParams(
                n=sampling.samples,
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                detokenize=False,
                stop_token_ids=list(sampling.stop_ids),
                seed=sampling.seed + number,
            )
            for number in range(len(prefixes))
        ]
        outputs = self.run(prefixes, settings, self.lora)
        return [
            [decode_answer(list(answer.token_ids), sampling) for answer in output.outputs]
            for output in outputs
        ]


def check_adapter_config(adapter: Path) -> int:
    """-> rank. Raises EngineError for what vLLM does not serve."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for key, what in (("use_dora", "DoRA"), ("modules_to_save", "modules_to_save")):
        if config.get(key):
            raise EngineError(
                f"--engine vllm: adapter {adapter} uses {what}, which vLLM does not serve; merge it"
                " first (recipes/merge_adapter.py)"
            )
    if config["r"] > LORA_RANKS[-1]:
        raise EngineError(
            f"--engine vllm: adapter {adapter} has rank {config['r']}, vLLM serves up to"
            f" {LORA_RANKS[-1]}; merge it first"
        )
    return config["r"]


def learned_anything(adapter: Path) -> bool:
    """Whether any B matrix differs from the zeros that training starts with."""
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as weights:
        # not a dict
        return any(weights.get_tensor(name).any() for name in weights.keys() if "lora_B" in name)  # noqa: SIM118
