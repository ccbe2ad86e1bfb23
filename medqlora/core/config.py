"""The typed, frozen configuration of an experiment.

Every numeric fact has its default here and nowhere else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Attention = Literal["auto", "varlen", "flash", "grouped", "flex", "sdpa", "eager"]
PromptStyle = Literal["auto", "chat", "plain", "lm_eval"]
Completion = Literal["letter", "letter_text", "explanation", "text"]
LARGEST = 2**53  # A float of 64 bits holds every whole number up to this one.
ANSWER_TOKENS = 256  # A generated answer ends here, unless the user says otherwise.


class Section(BaseModel):
    # An unknown key is refused, because a misspelt one would leave its default in force without a
    # word. The text below each field becomes its description, which --help prints. pydantic's lax
    # mode stays on, because YAML 1.1 reads 2e-4 as text and pydantic makes it a number.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def refuse_odd_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would take and no later stage could use."""
        kind = cls.model_fields[info.field_name].annotation
        # pydantic would read true and false as 1 and 0.
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise ValueError("true and false are no values of this key")
        if isinstance(value, str) and value.startswith("~"):
            try:
                Path(value).expanduser()
            except RuntimeError:
                raise ValueError("no user of this name has a home here; give the path") from None
        return value

    @field_validator("*", mode="after")
    @classmethod
    def refuse_large_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse numbers that the 64-bit integers of files and tensors cannot count with."""
        # A seed of any size is brought to a size that each generator takes.
        if info.field_name == "seed":
            return value
        if isinstance(value, (int, float)) and abs(value) > LARGEST:
            raise ValueError(f"the largest number is {LARGEST}")
        return value


class Model(Section):
    base: str
    """The base model: a folder with safetensors files, or a hub id (owner/name)."""
    revision: str | None = None
    """Commit or tag of the base on the hub. The adapter metadata record the commit that was used.
    """
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the weights of the frozen linear layers are stored. none keeps them in the compute dtype.
    """
    double_quantization: bool = True
    """With nf4 and fp4: quantize the constants of the 4-bit blocks too, which saves about 0.4 bit
    per weight.
    """
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The dtype of computation. auto takes bfloat16 where the hardware multiplies it natively,
    otherwise float16 on a GPU and float32 on a CPU.
    """
    attention: Attention = "auto"
    """The attention backend. auto takes the first of varlen, flash and grouped that works here.
    varlen and flash need a GPU of compute capability 8.0 or newer; grouped runs everywhere. eager
    is the model's own attention, for models that no other backend computes rightly; it keeps
    tokens x tokens scores.
    """
    template_arguments: dict[str, Any] = {}
    """Values of the chat template's own arguments, such as {enable_thinking: false}. They are part
    of the prompt and are recorded with the adapter.
    """
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""
    upcast_embeddings: bool = False
    """Hold embeddings and head in float32, which takes about 2 GB more on an 8B model whose head is
    not tied to its embeddings.
    """


class Lora(Section):
    r: int = Field(16, ge=1)
    """Rank of the adapter's matrices."""
    alpha: float = Field(32, gt=0)
    """Scale of the update, which is multiplied by alpha / r; rslora multiplies by alpha / sqrt(r).
    """
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that an element of the adapter's input is dropped in training."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the linear layers that get an adapter. all-linear takes those of attention and MLP,
    but not the head, and neither towers for images or sound nor their projectors.
    """
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """How the update is parametrized. dora also learns the norms of the weights' rows."""
    init_adapter: str | None = None
    """Adapter folder of a run whose weights the training begins with. The base and its
    quantization, r, alpha, target_modules and variant must be those of that run.
    """


class DataEntry(Section):
    format: str
    """Name of the dataset or of the layout of its records (docs/data_formats.md). mcq, qa and text
    are for layouts of your own and take `columns`.
    """
    path: str | None = None
    """File, folder or hub id. A dataset with a well-known home on the hub needs none."""
    split: str | None = None
    """Name of the split. The default is train in data.train, validation in data.eval and test in
    data.test.
    """
    weight: float = Field(1.0, gt=0)
    """How often each row is seen per epoch: 0.5 draws another half of the rows every epoch, 2 shows
    each row twice.
    """
    share: float | None = Field(None, gt=0, lt=1)
    """The part of all training rows that this entry makes up, e.g. 0.15. It replaces weight: rows
    are repeated or left out to reach it.
    """
    split_by: Literal["hash"] | None = None
    """hash divides a file, or the train split of a hub dataset, into 80 % train, 10 % validation
    and 10 % test by a hash of each question, so that no question is in two of them. `split` names
    the part.
    """
    subjects: Annotated[list[str], Field(min_length=1)] | None = None
    """Take only rows of these subjects, as [Cardiology]; capitals do not matter."""
    limit: int | None = Field(None, ge=1)
    """Take only the first rows, at most this many."""
    columns: dict[str, str | list[str]] = {}
    """For mcq, qa and text: which column of the file holds which field, as {field: column}.
    `options` may name a list of columns.
    """
    subset: str | None = None
    """Configuration name of a hub dataset, or the name of a set in a .json file or in a dataset's
    published folder that has several.
    """
    answer_is: Literal["letter", "text", "index0", "index1"] | None = None
    """How the file writes its answers: as the letter or the text of an option, or as its index from
    0 or from 1. All rows of a file decide it; set this where they can be read in two ways.
    """
    revision: str | None = None
    """Commit or tag of the dataset on the hub."""
    keep: list[str] = []
    """Columns of the file that prediction rows keep, such as [difficulty]. `eval/score.py --by`
    scores the answers in groups of their values.
    """
    test_pmids: str | None = None
    """For pubmedqa: the file with the 500 official test PMIDs, a .txt with one per line or the
    official test_ground_truth.json.
    """


class Data(Section):
    train: list[DataEntry] = []
    """What is trained on."""
    eval: list[DataEntry] = []
    """Labelled data whose loss is measured during training; the adapter or model with the lowest is
    kept.
    """
    test: list[DataEntry] = []
    """Labelled questions that are answered before and after training: multiple-choice questions or
    open ones, not both.
    """
    max_new_tokens: int = Field(ANSWER_TOKENS, ge=1)
    """Tokens that the model may write for an open question of data.test."""
    prompt_style: PromptStyle = "auto"
    """The form of prompts. auto takes the model's chat template where it has one, and plain text
    otherwise; lm_eval takes the prompts of lm-evaluation-harness.
    """
    completion: Completion = "letter"
    """What the model learns to write for a multiple-choice question: the letter, the letter with
    the option's text, or the explanation and then the letter. text is for data without
    multiple-choice questions; open questions are always answered in text.
    """
    max_length: int = Field(1024, ge=16)
    """Longest row in tokens. Context is cut to fit, then the explanation; question, options and the
    letter of an answer never are. Plain text fills rows of this length, document by document.
    """
    truncate: Literal["context", "answer"] = "context"
    """What may be cut of an open question that is too long. answer also cuts the end of an answer,
    and such a row does not teach the model to stop; context refuses the row, or drops it with
    drop_invalid.
    """
    retrieval: str | None = None
    """File or folder of plain texts. Each question is shown the passages of it that are most
    similar by BM25, with numbers by which an answer may cite them.
    """
    num_passages: int = Field(3, ge=1)
    """Passages per question, at most; each has up to 1,000 characters. Passages that do not fit
    max_length are left out before context is cut.
    """
    drop_invalid: bool = False
    """Drop invalid rows and list them in removed.jsonl, instead of stopping at the first."""
    deduplicate: Literal["none", "exact", "normalized"] = "exact"
    """Which repeated training rows are dropped. exact drops equal ones; normalized ignores case,
    punctuation and the order of options.
    """
    decontaminate: bool = True
    """Remove training rows that also stand in data.eval or data.test."""
    lowercase: bool = False
    """Lower-case all text."""
    packing: bool = True
    """Pack many rows into one micro-batch. false puts one row into each, and works on one process
    only.
    """
    packing_window: int = Field(32_768, ge=1)
    """Rows are shuffled and packed this many at a time. A larger number fills micro-batches better;
    a smaller one brings rows of different lengths together. It has no effect in another order than
    shuffled.
    """
    order: Literal["shuffled", "short_to_long", "easy_to_hard"] = "shuffled"
    """The order of the rows in every epoch; its rows are the same in each order. short_to_long goes
    by their tokens. easy_to_hard goes by the base's own loss per supervised token, which is
    measured before the training begins.
    """
    temperature: float | None = Field(None, ge=1)
    """Mix the entries of data.train in proportion to their rows to the power 1 / temperature: 1
    takes them by their rows, and higher values bring them nearer to equal parts. An epoch keeps its
    number of rows. It takes the place of weight and share.
    """
    cache_dir: str = "runs/cache"
    """Folder for tokenized rows and packing plans, which are named by a hash of what they are made
    of.
    """


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
    method: Literal["adapter", "full"] = "adapter"
    """What is trained. adapter trains LoRA matrices on the frozen base: QLoRA where
    model.quantization stores the base in 4 or 8 bits, LoRA where it is none. full trains every
    weight of the language model, embeddings and head included, but neither towers for images or
    sound nor their projectors; it needs model.quantization none and keeps float32 master weights.
    """
    epochs: float = Field(1.0, gt=0)
    """Passes over the training data; 0.5 is half a pass."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever epochs says. The learning rate then falls
    within these steps.
    """
    global_batch_tokens: int = Field(16_384, ge=1)
    """Tokens per optimizer step, of all processes together; a multiple of max_tokens_per_batch. It
    does not change with the number of processes.
    """
    max_tokens_per_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = 4_096
    """Tokens that a micro-batch of one process holds at most. Gradients are accumulated until
    global_batch_tokens are reached; micro-batches become smaller where they cannot be dealt out
    evenly among the processes. auto takes the fastest size that fits the memory by forecast.
    """
    lr: float = Field(2e-4, gt=0)
    """Highest learning rate, which is reached after warm-up."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up. cosine and linear fall to zero."""
    warmup_steps: float = Field(0.03, ge=0)
    """Optimizer steps in which the learning rate rises to lr. A value below 1 is a part of all
    steps.
    """
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """The optimizer of the trained weights. The 8-bit ones come from bitsandbytes; paged states
    move to the host's memory when the GPU is full.
    """
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of the trained weights."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest global norm of the gradients; larger ones are scaled down to it."""
    gradient_checkpointing: Annotated[str, Field()] = "auto"
    """Which decoder layers are computed again in the backward pass instead of kept: none, full,
    every_K (every K-th layer), first_K (the first K layers), or offload (every layer, and their
    inputs wait in the host's memory, for long rows on a GPU). auto takes the fastest of none,
    first_K, full and offload that fits the memory by forecast.
    """
    deterministic: bool = False
    """On a GPU, use kernels that give the same bits in every run, where torch has them. They are
    slower. A resumed run is then expected to repeat an uninterrupted one to the bit.
    """
    compile: bool | Literal["auto"] = "auto"
    """Compile norms and gated activations into one kernel each with torch's compiler. auto does so
    on a GPU.
    """
    loss_chunk_tokens: int = Field(1_024, ge=1)
    """Labelled positions whose logits are computed at one time. Fewer take less memory."""
    eval_steps: int | None = Field(None, ge=1)
    """Measure the loss on data.eval every this many steps, and at the end."""
    save_steps: int | None = Field(None, ge=1)
    """Write a checkpoint every this many steps, and at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest complete checkpoints are kept."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations in a row without a lower loss."""
    log_with: Literal["none", "tensorboard", "wandb"] = "none"
    """Experiment tracker that gets the lines of train_log.jsonl as well."""
    seed: int = Field(0, ge=0)
    """Seed of the adapter's initial weights, of dropout, and of the order and choice of rows."""

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
        # A row is never divided over micro-batches. For auto, `budgets.list_budgets` offers only
        # sizes that hold a row of max_length.
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
        if training.method == "full":
            self.check_full()
        if self.lora.variant == "dora" and self.model.quantization == "int8":
            raise ValueError(
                "lora.variant dora needs the base's weights at the start, which model.quantization"
                " int8 hides; use nf4 or lora"
            )
        return self

    @model_validator(mode="after")
    def check_mixture(self) -> Config:
        data = self.data
        # `order.count_repeats` divides the rows of the entries without a share by 1 minus the
        # sum of the shares. Neither may be zero.
        if sum(entry.share or 0 for entry in data.train) >= 1 or (
            data.train and all(entry.share for entry in data.train)
        ):
            raise ValueError(
                "data.train: shares must sum to less than 1, with at least one entry without a"
                " share"
            )
        if data.temperature is None:
            return self
        if len(data.train) < 2:
            raise ValueError(
                "data.temperature mixes several entries of data.train, and there are"
                f" {len(data.train)}; leave it out"
            )
        for index, entry in enumerate(data.train):
            if entry.share is not None or entry.weight != 1:
                key = "weight" if entry.share is None else "share"
                raise ValueError(
                    f"data.train[{index}].{key} and data.temperature both say how often its rows"
                    " are seen; leave one of them out"
                )
        return self

    def check_full(self) -> None:
        """Refuse what training.method full cannot use."""
        model = self.model
        if model.quantization != "none":
            raise ValueError(
                f"training.method full trains the base's own weights, which model.quantization"
                f" {model.quantization} would freeze; set model.quantization to none"
                " (--model.quantization none)"
            )
        if self.lora.init_adapter is not None:
            raise ValueError(
                f"lora.init_adapter {self.lora.init_adapter}: training.method full has no adapter;"
                " merge it (recipes/merge_adapter.py) and give the merged folder as model.base"
            )
        if model.dtype == "float16":
            raise ValueError(
                "training.method full with model.dtype float16: its gradients would overflow; set"
                " model.dtype to bfloat16 or float32"
            )
        if model.upcast_embeddings:
            raise ValueError(
                "model.upcast_embeddings: training.method full keeps float32 masters of every"
                " weight; leave it out"
            )
