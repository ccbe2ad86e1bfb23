"""Settings of a model and its engine, how the model wants to be asked, and the engine itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from medqlora.core.config import Attention, Completion, Model, PromptStyle, Section
from medqlora.core.errors import ConfigError
from medqlora.core.json_reading import parse_json
from medqlora.core.reading import expand_path
from medqlora.engines.interface import Engine
from medqlora.engines.server_address import check_address
from medqlora.prompts.chat_template import Encoder, MessageEncoder, make_encoder
from medqlora.prompts.fingerprint import fingerprint

QUANTIZATIONS = ("nf4", "fp4", "int8")


def parse_object(value: Any, example: str) -> Any:
    """Read the JSON object of a flag; a YAML file has a mapping.

    Args:
        value: The flag's text, or another value, which is returned as it is.
        example: A right value, for the message.

    Raises:
        ValueError: The text is no JSON object.
    """
    if not isinstance(value, str):
        return value
    try:
        tree = parse_json(value)
    except ValueError as error:
        raise ValueError(f"expected a JSON object, e.g. '{example}': {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"expected a JSON object, e.g. '{example}'")
    return tree


class ModelSettings(Section):
    """Which model is asked, and in which words."""

    model: str
    """Folder or hub id of the base or merged model; --engine openai: the server's name for it."""
    adapter: Path | None = None
    """Adapter folder of a run."""
    revision: str | None = None
    """Hub commit or tag of the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "nf4", "fp4", "int8"] | None = None
    """Compute dtype, or a quantization. Without it, the adapter's own quantization and dtype are
    taken, or auto.
    """
    base_weights: Literal["dequantized", "original"] | None = None
    """With an adapter that was trained on quantized weights: dequantized computes with those, in
    the dtype that --dtype names; original with the 16-bit base, which is another model than the
    trained one. Without it, only the weights of the training are taken.
    """
    prompt_style: PromptStyle | None = None
    """How questions are rendered; by default as the adapter was trained, else auto."""
    completion: Completion | None = None
    """What the model writes; by default what the adapter was trained to write, else letter."""
    template_arguments: dict[str, Any] | None = None
    """Values of the chat template's own arguments, as a JSON object on the command line; by default
    those that the adapter was trained with.
    """

    @field_validator("adapter")
    @classmethod
    def expand_adapter(cls, value: Path | None) -> Path | None:
        return None if value is None else expand_path(value, "--adapter")

    @field_validator("template_arguments", mode="before")
    @classmethod
    def parse_arguments(cls, value: Any) -> Any:
        return parse_object(value, '{"enable_thinking": false}')


EngineName = Literal["hf", "vllm", "openai"]
ENGINES = get_args(EngineName)


class EngineSettings(Section):
    """What runs the model."""

    engine: EngineName = "hf"
    """hf is transformers with packed batches, vllm is vLLM in this process, openai is any
    OpenAI-compatible server.
    """
    attention: Attention = "auto"
    """hf: attention backend."""
    max_tokens: int | None = Field(None, ge=1)
    """hf: tokens per forward pass; by default as many as the free memory takes."""
    max_length: int | None = Field(None, ge=2)
    """Tokens that a prompt and its answer may have together; by default the model's positions."""
    gpu_memory: float = Field(0.9, gt=0, le=1)
    """vllm: share of the GPU's memory."""
    tensor_parallel: int = Field(1, ge=1)
    """vllm: GPUs per model."""
    server: str | None = None
    """openai: the server's address, as http://127.0.0.1:8000/v1."""
    api: Literal["completions", "chat"] = "completions"
    """openai: completions takes our token ids and needs --tokenizer; chat is for servers that take
    messages only.
    """
    tokenizer: str | None = None
    """openai: folder or hub id of the served model's tokenizer; by default --model."""
    api_key_variable: str = "OPENAI_API_KEY"
    """openai: the environment variable that holds the key."""
    concurrency: int = Field(32, ge=1)
    """openai: requests in flight."""
    timeout: float = Field(120, ge=0.001)
    """openai: seconds per request, from its beginning to the answer's last byte."""
    retries: int = Field(5, ge=0)
    """openai: further tries of a failed request."""
    served_model: str | None = None
    """openai: the model's name in the server's answers, where it is neither --model nor a dated
    version of it.
    """

    @model_validator(mode="after")
    def check_server(self) -> EngineSettings:
        if self.engine == "openai" and not self.server:
            raise ValueError(
                "--engine openai: give the server's address with --server, as"
                " http://127.0.0.1:8000/v1"
            )
        if self.server is not None:
            check_address(self.server)
        # The text of a key begins with its engine. Another engine would pass it over.
        for name in sorted(self.model_fields_set & EngineSettings.model_fields.keys()):
            owner = (EngineSettings.model_fields[name].description or "").partition(":")[0]
            if owner in ENGINES and owner != self.engine:
                raise ValueError(
                    f"--{name} is for --engine {owner}, not {self.engine}; leave it out"
                )
        if self.api == "chat" and self.max_length:
            raise ValueError(
                "--max_length counts tokens, which a chat server makes by itself; leave it out"
            )
        return self


class RunSettings(ModelSettings, EngineSettings):
    """A model and what runs it."""

    @property
    def name(self) -> str:
        """What rows of answers call the model: its base and its adapter."""
        return "+".join(str(part) for part in (self.model, self.adapter) if part)

    @model_validator(mode="after")
    def check_adapter_place(self) -> RunSettings:
        if self.engine == "openai" and self.adapter:
            raise ValueError(
                "--engine openai: the server owns its adapters; give the served adapter's name as"
                " --model, without --adapter"
            )
        if self.base_weights and not self.adapter:
            raise ValueError(
                f"--base_weights {self.base_weights} says what an adapter stands on; give it with"
                " --adapter, or leave it out"
            )
        if self.api == "chat" and self.prompt_style not in (None, "auto", "chat"):
            raise ValueError(
                f"--prompt_style {self.prompt_style}: a chat server takes messages only; leave it"
                " out, or use --api completions"
            )
        return self


@dataclass(frozen=True)
class Asking:
    """How one model is asked.

    Attributes:
        encoder: makes its prompts.
        metadata: how it was trained to be asked, as its adapter or merge says; empty if unknown.
        max_length: tokens that it can read; None if unknown.
        identity: what tells it from every other model.
    """

    encoder: Encoder | MessageEncoder
    metadata: dict[str, Any]
    max_length: int | None
    identity: dict[str, Any]


def prepare_asking(settings: RunSettings) -> Asking:
    """Read how the model is asked: tokenizer, prompt style, length. No weights are loaded.

    Raises:
        ConfigError: a length that the model does not have, or a tokenizer that does not give the
            prompts that the adapter was trained with.
    """
    if settings.engine == "openai":
        # Predictions are kept under a hash of the identity. Two models with one identity would
        # continue each other's predictions.
        identity = {"server": settings.server, "model": settings.model}
        if settings.api == "chat":
            # A chat server tokenizes by itself, so no length is known here.
            arguments = settings.template_arguments or {}
            encoder = MessageEncoder(settings.completion or "letter", "chat", arguments)
            return Asking(encoder, {}, None, identity)
        source = settings.tokenizer or settings.model
        # transformers takes seconds to import, and a chat server needs none of it.
        from medqlora.model.base import load_tokenizer

        tokenizer = load_tokenizer(source, settings.revision)
        encoder = open_encoder(settings, tokenizer, {})
        return Asking(encoder, {}, settings.max_length, identity)
    from medqlora.model.adapter import check_adapter
    from medqlora.model.adapter_metadata import check_present
    from medqlora.model.adapter_settings import read_settings
    from medqlora.model.adapter_tokenizer import choose_tokenizer
    from medqlora.model.base import read_model_config
    from medqlora.model.base_weights import check_quantizable
    from medqlora.model.hardware import choose_dtype, default_device
    from medqlora.model.identity import describe_model, read_merged_metadata

    config = read_model_config(settings.model, settings.revision)
    if settings.adapter:
        metadata = check_adapter(settings.adapter, config)
        check_present(settings.adapter, metadata)
        read_settings(settings.adapter, settings.engine)
    else:
        # This holds only how the model is asked: merged weights are not quantized.
        metadata = read_merged_metadata(settings.model)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if settings.max_length and positions and settings.max_length > positions:
        raise ConfigError(
            f"--max_length {settings.max_length}: the model has {positions} positions"
        )
    max_length = settings.max_length or positions
    if settings.engine == "vllm" and positions and not settings.max_length:
        max_length = positions - 1  # vLLM generates a token in order to score one.
    loading = describe_loading(settings, metadata)
    check_quantizable(loading, config)
    identity = describe_model(settings.model, settings.revision, settings.adapter) | {
        "quantization": loading.quantization,
        "dtype": str(choose_dtype(loading.dtype, default_device())),
    }
    tokenizer, _ = choose_tokenizer(settings.model, settings.revision, settings.adapter, config)
    encoder = open_encoder(settings, tokenizer, metadata)
    # Who names a style or a completion wants other prompts than those of the training.
    asked_otherwise = (
        settings.prompt_style or settings.completion or settings.template_arguments is not None
    )
    if settings.adapter and metadata and not asked_otherwise:
        check_prompts(encoder, settings.adapter, metadata)
    return Asking(encoder, metadata, max_length, identity)


def open_encoder(settings: RunSettings, tokenizer: Any, metadata: dict[str, Any]) -> Encoder:
    """Resolve how prompts are rendered."""
    return make_encoder(
        tokenizer,
        settings.prompt_style or metadata.get("prompt_style", "auto"),
        settings.completion or metadata.get("completion", "letter"),
        choose_arguments(settings, metadata),
    )


def choose_arguments(settings: RunSettings, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the chat template's arguments: those that are given, or else those of the training."""
    if settings.template_arguments is not None:
        return settings.template_arguments
    # Who asks in another style has no use for the arguments of the trained one.
    if settings.prompt_style not in (None, "auto", "chat"):
        return {}
    return metadata.get("template_arguments", {})


def check_prompts(encoder: Encoder, adapter: Path, metadata: dict[str, Any]) -> None:
    """Refuse a tokenizer whose prompts are not those of the adapter's training."""
    # The fingerprint is made of token ids, so it also notices a changed chat template.
    if fingerprint(encoder) != metadata.get("prompt_sha256"):
        raise ConfigError(
            f"--adapter {adapter}: this tokenizer does not give the prompts that the adapter was"
            f" trained with; use its base {metadata['base']}, or name a --prompt_style"
        )


def describe_loading(settings: RunSettings, metadata: dict[str, Any]) -> Model:
    """Return how the model is loaded: as the adapter was trained, unless flags say otherwise.

    Raises:
        ConfigError: An adapter would stand on other weights than in its training without a flag
            that says so.
    """
    quantization = settings.dtype if settings.dtype in QUANTIZATIONS else "none"
    # An adapter belongs to the dtype that its training computed in.
    dtype = "auto" if settings.dtype in QUANTIZATIONS else settings.dtype
    dtype = dtype or metadata.get("dtype", "auto")
    trained = metadata.get("quantization", "none")
    if trained != "none":
        check_base_weights(settings, trained)
        if settings.base_weights != "original":
            quantization = trained
            dtype = metadata.get("dtype", "auto") if settings.dtype == trained else dtype
    return Model(
        base=settings.model,
        revision=settings.revision,
        attention=settings.attention,
        quantization=quantization,
        double_quantization=metadata.get("double_quantization", True),
        dtype=dtype,
    )


def check_base_weights(settings: RunSettings, trained: str) -> None:
    """Refuse flags that would put an adapter on other weights than in its training.

    Args:
        settings: the model and what runs it.
        trained: the quantization of the adapter's training.

    Raises:
        ConfigError: the message says what each flag would compute.
    """
    place = f"--adapter {settings.adapter} was trained on {trained} weights"
    quantized = settings.dtype in QUANTIZATIONS
    if settings.base_weights == "original":
        if quantized:
            raise ConfigError(
                f"{place}: --base_weights original takes unquantized ones, not --dtype"
                f" {settings.dtype}; leave one of the two out"
            )
        return
    if settings.engine == "vllm":
        raise ConfigError(
            f"{place}, but vLLM would load the original ones; merge it (recipes/merge_adapter.py)"
            " and give the merged folder as --model, or take --base_weights original, which is"
            " another model than the trained one"
        )
    if quantized and settings.dtype != trained:
        raise ConfigError(f"{place}, not {settings.dtype}; leave --dtype out")
    computing = settings.dtype not in (None, "auto", *QUANTIZATIONS)
    if computing and settings.base_weights is None:
        raise ConfigError(
            f"{place}: --dtype {settings.dtype} can mean to compute with those in"
            f" {settings.dtype} (--base_weights dequantized), or with the unquantized base, which"
            " is another model (--base_weights original); say which"
        )


def open_engine(settings: RunSettings, asking: Asking, seed: int, key: str | None) -> Engine:
    """Load the model, or connect to the server.

    Args:
        settings: the model and what runs it.
        asking: what `prepare_asking` returned for them.
        seed: vLLM's seed.
        key: the server's key, or None.

    Raises:
        EngineError: an engine that cannot run here.
    """
    # Each engine is imported where it is used, because the packages of the others may be missing.
    if settings.engine == "openai":
        from medqlora.engines.openai import ChatEngine, CompletionsEngine, Connection

        connection = Connection(
            settings.server,
            settings.model,
            key,
            concurrency=settings.concurrency,
            timeout=settings.timeout,
            retries=settings.retries,
            served_model=settings.served_model,
        )
        if settings.api == "chat":
            return ChatEngine(connection, asking.encoder.template_arguments)
        return CompletionsEngine(connection, asking.encoder.tokenizer.decode)
    if settings.engine == "vllm":
        from medqlora.engines.vllm import VllmEngine

        return VllmEngine(
            settings.model,
            settings.adapter,
            dtype=settings.dtype or "auto",
            revision=settings.revision,
            max_length=settings.max_length,
            gpu_memory=settings.gpu_memory,
            tensor_parallel=settings.tensor_parallel,
            seed=seed,
        )
    from medqlora.engines.hf import HfEngine
    from medqlora.model.adapter import load_adapter
    from medqlora.model.base import load_base
    from medqlora.model.hardware import default_device

    model, backend = load_base(describe_loading(settings, asking.metadata), default_device())
    if settings.adapter:
        model = load_adapter(model, settings.adapter)
    return HfEngine(model, backend, settings.max_tokens)
