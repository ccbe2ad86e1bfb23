"""The vLLM engine: offline batches with prefix caching.

It takes a merged checkpoint, or a base with a LoRA adapter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from medqlora.engines.interface import Answer, EngineError, Request, Sampling, decode_answer
from medqlora.model.adapter_settings import read_settings
from medqlora.model.hardware import name_dtype

# A longer option, in tokens, costs less as part of the prompt than one request for each token.
LONG = 16
# vLLM allocates for these ranks only.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VllmEngine:
    """vLLM's LLM, to which prompts are given as token ids.

    Option log-probabilities come from `logprob_token_ids` (vLLM 0.16 and newer), with one request
    per question. Older versions offer `allowed_token_ids` only. Its ranking is the same, but its
    values are relative to the options, so that the letter mass is always 1. The attribute `exact`
    says whether the values are true log-probabilities.
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
        """Start vLLM.

        Args:
            model: folder or hub id of a merged model or a base.
            adapter: folder of a LoRA adapter in PEFT's format.
            dtype: auto, float32, bfloat16 or float16.
            revision: hub commit or tag of the model.
            max_length: tokens that a row may have; by default the model's positions.
            gpu_memory: share of the GPU's memory that vLLM takes, from 0 to 1.
            tensor_parallel: GPUs over which each layer is divided.
            seed: of vLLM's own random generator.
            prefix_caching: False where repeated prompts are to be timed.

        Raises:
            EngineError: vLLM is not installed or does not start, or cannot serve the dtype or the
                adapter.
        """
        if importlib.util.find_spec("vllm") is None:
            raise EngineError(
                "--engine vllm: the vllm package is not installed here; pip install"
                " -e '.[vllm]', or use --engine hf"
            )
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise EngineError(
                f"--engine vllm: --dtype {dtype} is not served; merge the adapter"
                " (recipes/merge_adapter.py), or use --engine hf"
            )
        import torch
        from vllm import LLM, SamplingParams

        self.exact = hasattr(SamplingParams(), "logprob_token_ids")
        settings: dict[str, Any] = {}
        if not self.exact:
            # These log-probabilities are taken after all tokens but the allowed ones are masked.
            settings["logprobs_mode"] = "processed_logprobs"
        if adapter:
            rank = check_vllm_adapter(adapter)
            settings["enable_lora"] = True
            settings["max_lora_rank"] = min(served for served in LORA_RANKS if served >= rank)
        folder = Path(model).expanduser()
        try:
            self.llm = LLM(
                model=str(folder) if folder.is_dir() else model,
                revision=revision,
                dtype=dtype,
                seed=seed,
                # Scoring generates one token, which needs a position too.
                max_model_len=None if max_length is None else max_length + 1,
                gpu_memory_utilization=gpu_memory,
                tensor_parallel_size=tensor_parallel,
                enable_prefix_caching=prefix_caching,
                # The model's own generation settings would make two engines disagree.
                generation_config="vllm",
                enforce_eager=not torch.cuda.is_available(),
                disable_log_stats=True,
                **settings,
            )
        except (ValueError, RuntimeError, OSError) as error:
            # The last line of a long text of vLLM says what is wrong.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise EngineError(
                f"--engine vllm: vLLM did not start with {model}: {lines[-1][:300]}"
            ) from None
        loaded = self.llm.llm_engine.model_config
        self.weights = loaded.quantization or name_dtype(loaded.dtype)
        self.lora = None
        self.adapters = adapter is not None
        if adapter:
            from vllm.lora.request import LoRARequest

            self.lora = LoRARequest("adapter", 1, str(adapter))
            self.unproven = has_learned_weights(adapter)

    def score(self, requests: Sequence[Request], shared: int = 0) -> list[list[float]]:
        """See interface.Engine.

        An option of several tokens costs further requests. Prefix caching reads their common
        beginning once, so `shared` is not used.

        Raises:
            EngineError: the adapter changes nothing although it holds learned weights; this version
                of vLLM cannot score options of several tokens; or vLLM refuses a request.
        """
        if self.lora is not None and self.unproven:
            self.prove_adapter(requests[:4])
        return self.score_with(requests, self.lora)

    def score_with(self, requests: Sequence[Request], lora: Any) -> list[list[float]]:
        """Score with an adapter, or with the base where `lora` is None.

        There is one prompt for each text after which tokens are needed: a question's prefix, and
        the prefix with the first tokens of a longer option. Long options are scored as part of the
        prompt instead, which vLLM cannot do with adapters enabled.
        """
        if not self.exact and any(
            len(option) > 1 for request in requests for option in request.options
        ):
            raise EngineError(
                "--engine vllm: this version cannot score options of several tokens; install vLLM"
                " 0.16 or newer, or use --engine hf"
            )
        # Tokens to score stand under the text that they follow, and long options as the number of
        # their request and their own.
        next_tokens: dict[tuple[int, ...], list[int]] = {}
        long_options: list[tuple[int, int]] = []
        for number, request in enumerate(requests):
            for index, option in enumerate(request.options):
                # Log-probabilities of the prompt switch prefix caching off for their request, which
                # only a long option is worth.
                if len(option) > LONG and not self.adapters:
                    long_options.append((number, index))
                    continue
                for offset, token in enumerate(option):
                    text = (*request.prefix, *option[:offset])
                    # Options that begin alike have texts in common, and each text is asked once.
                    next_tokens.setdefault(text, []).append(token)
        prompts = [list(text) for text in next_tokens]
        settings = [self.make_settings(sorted(set(tokens))) for tokens in next_tokens.values()]
        for number, index in long_options:
            option = requests[number].options[index]
            prompts.append(requests[number].prefix + option[:-1])
            # The prompt ends before the last token, which is scored as the next one.
            settings.append(self.make_settings([option[-1]], prompt_logprobs=0))
        outputs = self.run(prompts, settings, lora)
        short_outputs = outputs[: len(next_tokens)]
        # Each generated position has a dict from token ids to log-probabilities.
        after = {
            text: output.outputs[0].logprobs[0]
            for text, output in zip(next_tokens, short_outputs, strict=True)
        }
        long_outputs = dict(zip(long_options, outputs[len(next_tokens) :], strict=True))
        scores = []
        for number, request in enumerate(requests):
            values = []
            for index, option in enumerate(request.options):
                if (number, index) in long_outputs:
                    output = long_outputs[number, index]
                    values.append(sum_long_option(output, len(request.prefix), option))
                else:
                    values.append(
                        sum(
                            after[(*request.prefix, *option[:offset])][token].logprob
                            for offset, token in enumerate(option)
                        )
                    )
            scores.append(values)
        return scores

    def make_settings(self, tokens: list[int], prompt_logprobs: int | None = None) -> Any:
        """Return vLLM's settings for the log-probabilities of `tokens` as the next token.

        With `prompt_logprobs` 0 vLLM also gives the log-probability of each token of the prompt.
        """
        from vllm import SamplingParams

        if self.exact:
            wanted = {"logprob_token_ids": tokens}
        else:
            wanted = {"allowed_token_ids": tokens, "logprobs": len(tokens)}
        return SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            prompt_logprobs=prompt_logprobs,
            **wanted,
        )

    def run(self, prompts: Sequence[list[int]], settings: list[Any], lora: Any) -> list[Any]:
        """Return vLLM's outputs, one per prompt; what vLLM refuses becomes an EngineError."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            # Prompts are token ids and not text, so that every engine reads the same input.
            return self.llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                settings,
                use_tqdm=False,
                lora_request=lora,
            )
        except EngineDeadError:
            raise EngineError(
                "--engine vllm: vLLM's engine process died, and its own message stands above; try"
                " --engine hf"
            ) from None
        except ValueError as error:
            raise EngineError(f"--engine vllm: {str(error).splitlines()[0][:300]}") from None

    def prove_adapter(self, requests: Sequence[Request]) -> None:
        """Raise EngineError where the adapter changes no score.

        Otherwise the base's scores would pass as those of a tuned model, because vLLM can load an
        adapter without applying it.
        """
        base = self.score_with(requests, None)
        tuned = self.score_with(requests, self.lora)
        if base == tuned:
            raise EngineError(
                "--engine vllm: the adapter changes no score, so vLLM does not apply it to this"
                " model; merge it (recipes/merge_adapter.py) and give the merged folder as --model"
            )
        self.unproven = False

    def generate(self, prefixes: Sequence[list[int]], sampling: Sampling) -> list[list[Answer]]:
        """See interface.Engine.

        Sampled answers depend on the seed and on the prompt's place in `prefixes`.

        Raises:
            EngineError: vLLM refuses a prompt, or its engine process died.
        """
        from vllm import SamplingParams

        settings = [
            SamplingParams(
                n=sampling.samples,
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                # decode_answer makes the texts, so all engines cut and decode alike.
                detokenize=False,
                stop_token_ids=list(sampling.stop_ids),
                # With one seed, equal prompts would get equal answers.
                seed=sampling.seed + number,
            )
            for number in range(len(prefixes))
        ]
        outputs = self.run(prefixes, settings, self.lora)
        return [
            [decode_answer(list(answer.token_ids), sampling) for answer in output.outputs]
            for output in outputs
        ]

    def stream(self, prefix: list[int], sampling: Sampling, show: Callable[[str], None]) -> Answer:
        """See interface.Engine; vLLM's offline engine gives whole answers only."""
        ((answer,),) = self.generate([prefix], sampling)
        show(answer.text)
        return answer


def sum_long_option(output: Any, start: int, option: list[int]) -> float:
    """Return the log-probability of an option that was scored as part of the prompt.

    Args:
        output: vLLM's output for the prompt, which ends before the option's last token.
        start: place of the option's first token in the prompt.
        option: the option's token ids.
    """
    value = sum(
        output.prompt_logprobs[start + offset][token].logprob
        for offset, token in enumerate(option[:-1])
    )
    return value + output.outputs[0].logprobs[0][option[-1]].logprob


def check_vllm_adapter(adapter: Path) -> int:
    """Return the rank of an adapter.

    Raises:
        ModelError: the adapter is of a kind that vLLM does not serve.
        EngineError: vLLM does not serve its rank, or one of its tensors.
    """
    rank = read_settings(adapter, "vllm")["r"]
    if rank > LORA_RANKS[-1]:
        raise EngineError(
            f"--engine vllm: adapter {adapter} has rank {rank}, vLLM serves up to"
            f" {LORA_RANKS[-1]}; merge it first (recipes/merge_adapter.py)"
        )
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as weights:
        # Embeddings, heads and whole tensors have other names, or vLLM passes them over.
        for name in weights.keys():  # noqa: SIM118 - safe_open is no mapping
            plain = name.endswith((".lora_A.weight", ".lora_B.weight"))
            if not plain or ".lm_head." in name or ".embed_out." in name:
                raise EngineError(
                    f"--engine vllm: adapter {adapter} has the tensor {name}, which vLLM does not"
                    " serve; merge it first (recipes/merge_adapter.py)"
                )
    return rank


def has_learned_weights(adapter: Path) -> bool:
    """Whether any B matrix differs from the zeros that training starts with."""
    # LoRA starts with B = 0, and such an adapter rightly changes no score.
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as weights:
        # `weights` is not a dict: it can only be iterated over with keys().
        return any(weights.get_tensor(name).any() for name in weights.keys() if "lora_B" in name)  # noqa: SIM118
