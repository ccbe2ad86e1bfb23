"""The typed, frozen configuration of an experiment.

Every numeric fact has its default here and nowhere else.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Attention = Literal["auto", "varlen", "flash", "grouped", "flex", "sdpa"]
PromptStyle = Literal["auto", "chat", "plain", "lm_eval"]
Completion = Literal["letter", "letter_text", "explanation", "text"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(Section):
    base: str
    """Folder or hub id of the base model (safetensors)."""
    revision: str | None = None
    """Hub commit or tag; the commit it resolved to is kept in the manifest."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """Storage of the frozen linear weights."""
    double_quantization: bool = True
    """Quantize the 4-bit block constants too (saves about 0.4 bit per weight)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype. auto: bfloat16 where the hardware has it, else float16 on a GPU and float32 on
    a CPU.
    """
    attention: Attention = "auto"
    """Attention backend; auto takes the first of varlen, flash and grouped that works; varlen and
    flash need a GPU of 2020 or later, grouped runs everywhere."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave off unless you have read that code."""
    upcast_embeddings: bool = False
    """Hold embeddings and head in float32 (+2 GB on an untied 8B model)."""


class Lora(Section):
    r: int = Field(16, ge=1)
    """Rank of the adapter."""
    alpha: float = Field(32, gt=0)
    """Scale: the update is multiplied by alpha / r (rsLoRA: alpha / sqrt(r))."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability on the adapter's input."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linear layers to adapt; all-linear: attention and MLP, not the head."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """Parametrization of the update."""


class DataEntry(Section):
    format: str
    """Dataset, or layout of the records; the names are those of medqlora/data/formats/. mcq, qa and
    text are for layouts of your own and take `columns`.
    """
    path: str | None = None
    """File, folder or hub id; a dataset with a well-known hub home needs none."""
    split: str | None = None
    """Split name; default train for training data, validation for evaluation data."""
    weight: float = Field(1.0, gt=0)
    """Times each row is seen per epoch: 0.5 draws a new half every epoch, 2 shows each row
    twice.
    """
    share: float | None = Field(None, gt=0, lt=1)
    """Instead of weight: this entry's part of the mixture's rows, e.g. 0.15 general beside 0.85
    medical.
    """
    limit: int | None = Field(None, ge=1)
    """Read only the first rows."""
    columns: dict[str, str | list[str]] = {}
    """mcq, qa, text: our field -> the file's column; `options` may be a list of columns."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    revision: str | None = None
    """Hub commit or tag of the dataset."""
    test_pmids: str | None = None
    """pubmedqa: file with the 500 official test PMIDs (.txt, or the official
    test_ground_truth.json).
    """


class Data(Section):
    train: list[DataEntry] = []
    """Training data."""
    eval: list[DataEntry] = []
    """Labelled data for the evaluation loss during training."""
    test: list[DataEntry] = []
    """Labelled multiple-choice data scored before and after training."""
    prompt_style: PromptStyle = "auto"
    """auto: the model's chat template where it has one, plain otherwise."""
    completion: Completion = "letter"
    """What the model learns to write for a multiple-choice question. Open questions are always
    text.
    """
    max_length: int = Field(1024, ge=16)
    """Longest row in tokens; context and explanation are cut to fit, question, options and answer
    never.
    """
    drop_invalid: bool = False
    """Drop and list invalid rows instead of stopping at the first."""
    deduplicate: Literal["none", "exact", "normalized"] = "exact"
    """Which repeated training rows to drop; normalized ignores case, punctuation and option
    order.
    """
    decontaminate: bool = True
    """Remove training rows that stand in any evaluation or test entry."""
    lowercase: bool = False
    """Lower-case all text."""
    packing: bool = True
    """Pack many rows into one batch; false: one row per micro-batch, on one process only."""
    packing_window: int = Field(32_768, ge=1)
    """Rows shuffled and packed together: larger fills better, smaller mixes lengths less."""
    cache_dir: str = "runs/cache"
    """Folder of tokenized data and packing plans, named by hash."""


def check_checkpointing(value: str) -> str:
    if value in ("auto", "none", "full", "offload") or re.fullmatch(
        r"(every|first)_[1-9]\d*", value
    ):
        return value
    raise ValueError(
        "expected auto, none, full, offload, every_K (every K-th layer recomputed, e.g. every_2) or"
        " first_K (the first K layers)"
    )


class Training(Section):
    epochs: float = Field(1.0, gt=0)
    """Passes over the training data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever epochs says."""
    global_batch_tokens: int = Field(16_384, ge=1)
    """Tokens per optimizer step over all processes; a multiple of max_tokens_per_batch. Any number
    of processes shares them."""
    max_tokens_per_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = 4_096
    """Most tokens of a micro-batch on one process; accumulation is derived from the two, and
    micro-batches shrink where there are more processes than they divide among. auto: by forecast,
    the fastest that fits."""
    lr: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_steps: float = Field(0.03, ge=0)
    """Warm-up in optimizer steps; below 1: part of all steps."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """The 8-bit ones come from bitsandbytes."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay on adapter weights."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    gradient_checkpointing: Annotated[str, Field()] = "auto"
    """Decoder layers recomputed in the backward pass: none, full, every_K (every K-th), first_K;
    offload: full, what layers begin from waits in the host's memory (for long rows on a GPU); auto:
    by forecast, the fastest that fits."""
    deterministic: bool = False
    """On a GPU, use kernels that give the same bits in every run, where torch has them; they are
    slower. A resumed run is then expected to repeat an uninterrupted one to the bit."""
    compile: bool | Literal["auto"] = "auto"
    """Norms and gated activations as one kernel each, by torch's compiler; auto: on a GPU."""
    loss_chunk_tokens: int = Field(1_024, ge=1)
    """Labelled positions whose logits exist at one time."""
    eval_steps: int | None = Field(None, ge=1)
    """Evaluate every N steps (and at the end)."""
    save_steps: int | None = Field(None, ge=1)
    """Write a checkpoint every N steps (and at the end)."""
    keep_checkpoints: int = Field(2, ge=1)
    """Complete checkpoints kept."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a lower loss."""
    log_with: Literal["none", "tensorboard", "wandb"] = "none"
    """Optional experiment tracker."""
    seed: int = Field(0, ge=0)
    """Seed of adapter initialisation, dropout, row order and mixture."""

    _checkpointing = field_validator("gradient_checkpointing")(check_checkpointing)


class Config(Section):
    model: Model
    lora: Lora = Lora()
    data: Data = Data()
    training: Training = Training()

    @model_validator(mode="after")
    def check_budgets(self) -> Config:
        data = self.data
        training = self.training
        if (
            training.max_tokens_per_batch != "auto"
            and data.max_length > training.max_tokens_per_batch
        ):
            raise ValueError(
                f"data.max_length {data.max_length} is over training.max_tokens_per_batch"
                f" {training.max_tokens_per_batch}: a row must fit a micro-batch; lower the first"
                " or raise the second"
            )
        if training.early_stopping_patience and not (training.eval_steps and data.eval):
            raise ValueError(
                "training.early_stopping_patience needs training.eval_steps and data.eval"
            )
        if self.lora.variant == "dora" and self.model.quantization == "int8":
            raise ValueError(
                "lora.variant dora needs the base's weights at the start, which model.quantization"
                " int8 hides; use nf4 or lora"
            )
        if sum(entry.share or 0 for entry in data.train) >= 1 or (
            data.train and all(entry.share for entry in data.train)
        ):
            raise ValueError(
                "data.train: shares must sum to less than 1, with at least one entry without a"
                " share"
            )
        return self
