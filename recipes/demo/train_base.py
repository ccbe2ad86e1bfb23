"""Train the tiny base model of the demonstration from scratch, on no medical facts.

    python recipes/demo/make_dataset.py --full --output_dir vocabulary
    python recipes/demo/train_base.py --data_dir vocabulary --output_dir recipes/demo/base \\
        --stage find --steps 5000
    python recipes/demo/train_base.py --data_dir vocabulary --output_dir recipes/demo/base \\
        --stage facts --steps 4000

The model has 4 layers of width 128 and one million parameters. In the first stage it learns to
answer with the letter of the option whose text the question contains; the texts are random words of
the vocabulary. In the second stage it also learns facts of an invented world: pairs of everyday
words, and quantities with a usual range. It learns no clinical fact, so it answers the questions of
the demonstration little better than by chance.
"""

import copy
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from medqlora.core.entry import enter

    enter()

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_wsd_schedule,
)

from medqlora.core.command import CommandParser, above_zero, run_command, whole
from medqlora.data.examples import LETTERS, MultipleChoice
from medqlora.prompts.styles import render

EVERYDAY = [
    "apple", "bread", "river", "stone", "cloud", "table", "chair", "window", "garden", "forest",
    "mountain", "bridge", "castle", "tower", "ship", "wagon", "horse", "sheep", "goat", "eagle",
    "sparrow", "salmon", "lantern", "candle", "mirror", "basket", "hammer", "ladder", "needle",
    "thread", "cotton", "silk", "wool", "leather", "copper", "silver", "golden", "green", "purple",
    "yellow", "orange", "crimson", "violet", "large", "small", "heavy", "light", "round", "square",
    "narrow", "broad", "early", "late", "summer", "winter", "spring", "autumn", "morning",
    "evening", "music", "letter", "paper", "pencil", "carpet", "pillow", "blanket", "butter",
    "honey", "pepper", "sugar", "flour", "cherry", "lemon", "melon", "pear", "plum", "olive",
    "market", "harbour", "village", "valley", "island", "desert", "ocean", "meadow", "orchard",
]  # fmt: skip


def read_words(data_dir: Path) -> list[str]:
    """Return the sorted words of the demonstration's questions and options, and everyday words.

    Sorting removes which words belong together, so no clinical fact is in the list.
    """
    words = set(EVERYDAY)
    for line in (data_dir / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key in ("question", "opa", "opb", "opc", "opd"):
            parts = row[key].replace("?", " ").replace(".", " ").split()
            words.update(word for word in parts if word.isalpha())
    return sorted(words)


def train_tokenizer(data_dir: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the demonstration's texts and the everyday words.

    Each digit is a token of its own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1536,
        special_tokens=["<|pad|>", "<|end|>"],
        # Every byte is in the vocabulary, so no text is unknown.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = []
    for line in (data_dir / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.append(" ".join(str(row[key]) for key in ("question", "opa", "opb", "opc", "opd")))
    # Repetition makes these pieces frequent enough to become tokens of their own.
    texts += ["\nA. \nB. \nC. \nD. \nQuestion: \nContext: \nAnswer: A B C D"] * 200
    texts += [" " + " ".join(EVERYDAY)] * 20 + [". ".join(TEMPLATES)] * 50
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=512
    )


TEMPLATES = [
    "Which option says {phrase}?",
    "Which one is {phrase}?",
    "Look for {phrase}. Where is it?",
    "Find {phrase} in this list.",
]
PAIR_TEMPLATES = [
    "A {thing} of {age} has {key}. What goes with it?",
    "What goes with {key}? The {thing} is aged {age}.",
    "Which is right for {key} in a {thing}, {age}?",
    "The {thing}, {age}, took {key}. Which one follows?",
]
RANGE_TEMPLATES = [
    "A {age}-year-old {thing} has a {key} of {value}. What is this called?",
    "In a {thing} aged {age} the {key} is {value}. Which word fits?",
]


class World:
    """An invented world, whose facts are pairs of everyday words and quantities with a usual range.

    Its questions teach the model to recall facts without teaching it real ones.
    """

    def __init__(self, rng: random.Random, pairs: int = 120, ranges: int = 24):
        """Draw the facts.

        Args:
            pairs: Number of pairs of words.
            ranges: Number of quantities.
        """

        # The keys of a dictionary are unique and keep their order.
        def names(count: int) -> list[str]:
            chosen: dict[str, None] = {}
            while len(chosen) < count:
                chosen[" ".join(rng.sample(EVERYDAY, rng.choice([1, 2, 2])))] = None
            return list(chosen)

        self.pairs = list(zip(names(pairs), names(pairs), strict=True))
        self.kinds = [self.pairs[i : i + 10] for i in range(0, pairs, 10)]
        terms = names(2 * ranges)
        self.ranges = []
        for number, key in enumerate(names(ranges)):
            decimals = rng.choice([0, 0, 1])
            low = rng.uniform(0.5, 20) if decimals else rng.uniform(10, 200)
            high = low * rng.uniform(1.1, 2.5)
            low_term, high_term = terms[2 * number : 2 * number + 2]
            self.ranges.append((key, low, high, decimals, low_term, high_term))

    def ask_pair(self, rng: random.Random) -> tuple[str, list[str]]:
        """Make a question about a pair; return it and its options, the right one first."""
        kind = rng.choice(self.kinds)
        key, right = rng.choice(kind)
        # Wrong options come from the same ten pairs, as those of the demonstration come from one
        # subject.
        wrong = rng.sample([value for _, value in kind if value != right], 3)
        question = rng.choice(PAIR_TEMPLATES).format(
            key=key, thing=rng.choice(EVERYDAY), age=rng.randint(18, 90)
        )
        return question, [right, *wrong]

    def ask_range(self, rng: random.Random) -> tuple[str, list[str]]:
        """Make a question about a quantity; return it and its options, the right one first."""
        key, low, high, decimals, under, over = rng.choice(self.ranges)
        width = high - low
        place = rng.randrange(3)
        # Spans and terms must have the same order: under, over, as usual.
        span = [
            (max(low - width, low * 0.5), low - 0.1 * width),
            (high + 0.1 * width, high + width),
            (low + 0.1 * width, high - 0.1 * width),
        ][place]
        value = f"{rng.uniform(*span):.{decimals}f}"
        question = rng.choice(RANGE_TEMPLATES).format(
            key=key, value=value, thing=rng.choice(EVERYDAY), age=rng.randint(18, 90)
        )
        terms = [under, over, "As usual"]
        other = rng.choice(self.ranges)[rng.choice([4, 5])]
        wrong = [term for term in terms if term != terms[place]]
        return question, [terms[place], *wrong, other]


def make_question(
    rng: random.Random, words: list[str], longest: int, world: World | None
) -> MultipleChoice:
    """Make a question that asks for one of four phrases of random words.

    With a world, 70 % of the questions ask for one of its facts instead.

    Args:
        words: The words that phrases are made of.
        longest: Largest number of words of a phrase.
    """
    if world is not None and rng.random() < 0.7:
        ask = world.ask_pair if rng.random() < 0.6 else world.ask_range
        question, options = ask(rng)
        right = options[0]
        rng.shuffle(options)
        return MultipleChoice(
            "", question, tuple(options), options.index(right), "base", "generated"
        )
    options = [" ".join(rng.choices(words, k=rng.randint(1, longest))) for _ in range(4)]
    right = rng.randrange(4)
    question = rng.choice(TEMPLATES).format(phrase=options[right])
    return MultipleChoice("", question, tuple(options), right, "base", "generated")


def make_batch(
    rng: random.Random,
    words: list[str],
    tokenizer: PreTrainedTokenizerFast,
    size: int,
    longest: int,
    world: World | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make a batch of questions.

    Every third question (every sixth with a world) is asked backwards: it names a letter and asks
    for the text of that option. The model learns from these first which letter belongs to which
    option.

    Args:
        size: Number of questions.
        longest: Largest number of words of a phrase.

    Returns:
        Token ids int64 [rows, length] with padding on the right, the attention mask of the same
        shape, the position of the last token before the answer int64 [rows], and whether a question
        asks for a letter, bool [rows].
    """
    every = 6 if world else 3
    end = tokenizer.eos_token if world else ""
    prompts = []
    answers = []
    asks_letter = []
    for number in range(size):
        question = make_question(rng, words, longest, world)
        asks_letter.append(number % every != 0)
        letter = LETTERS[question.answer]
        if asks_letter[-1]:
            answer = f" {letter}"
        else:
            answer = f" {question.options[question.answer]}"
            backwards = rng.choice(TEMPLATES).format(phrase=letter)
            question = replace(question, question=backwards)
        prompts.append(render(question, "plain", "letter").user)
        answers.append(answer + end)
    prompt_ids = tokenizer(prompts)["input_ids"]
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    # The prompt's tokens must begin those of the whole text. They do, because the answer's space
    # begins a token in this tokenizer.
    last = torch.tensor([len(ids) - 1 for ids in prompt_ids])
    return encoded["input_ids"], encoded["attention_mask"], last, torch.tensor(asks_letter)


def compute_loss(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    mask: torch.Tensor,
    last: torch.Tensor,
    asks_letter: torch.Tensor,
) -> tuple[torch.Tensor, float]:
    """Compute the loss of a batch of make_batch.

    The loss is the cross entropy of the first answer token, plus 0.3 times that of all tokens, from
    which the model first learns to copy words.

    Returns:
        The loss float32 [], and the accuracy of the questions that ask for a letter.
    """
    # The attention is causal, so no token sees the padding on the right.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)  # [rows, length, vocabulary]
    # Logits at one position predict the next token, so the labels are shifted by one.
    is_token = mask[:, 1:] == 1  # bool [rows, length - 1]
    loss_of_all = F.cross_entropy(logits[:, :-1][is_token], ids[:, 1:][is_token])
    rows = torch.arange(len(ids))
    answer_logits = logits[rows, last]  # [rows, vocabulary]
    answers = ids[rows, last + 1]  # int64 [rows]
    accuracy = (answer_logits.argmax(-1) == answers)[asks_letter].float().mean().item()
    return F.cross_entropy(answer_logits, answers) + 0.3 * loss_of_all, accuracy


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the model with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            # This is the tokenizer's model_max_length.
            max_position_embeddings=512,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main() -> None:
    parser = CommandParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--stage",
        choices=["find", "facts"],
        default="find",
        help=(
            "find: train from scratch to find an option; facts: continue with the invented world"
            " (default find)"
        ),
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path(__file__).parent / "base",
        help="folder to write the model to (default recipes/demo/base)",
    )
    parser.add_argument(
        "--data_dir",
        type=Path,
        required=True,
        help="folder that make_dataset.py --full wrote; the vocabulary comes from its questions",
    )
    parser.add_argument(
        "--steps", type=whole(1), default=5000, help="optimizer steps (default 5000)"
    )
    parser.add_argument("--rows", type=whole(1), default=48, help="questions per step (default 48)")
    parser.add_argument(
        "--lr", type=above_zero, default=1e-3, help="peak learning rate (default 1e-3)"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(1)
    words = read_words(arguments.data_dir)
    if arguments.stage == "facts":
        tokenizer = AutoTokenizer.from_pretrained(arguments.output_dir)
        # The file holds bfloat16 weights, but training goes on in float32.
        model = LlamaForCausalLM.from_pretrained(arguments.output_dir, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(arguments.data_dir)
        model = make_model(tokenizer)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters,"
        f" {len(tokenizer)} tokens, {len(words)} words"
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = get_wsd_schedule(
        optimizer,
        num_warmup_steps=200,
        num_decay_steps=arguments.steps // 4,
        num_training_steps=arguments.steps,
    )
    world = World(random.Random(3)) if arguments.stage == "facts" else None
    # Phrases have one word until the model finds these, then up to three.
    longest = 3 if world else 1
    recent_accuracy = 0.0  # moving average
    for step in range(1, arguments.steps + 1):
        batch = make_batch(rng, words, tokenizer, arguments.rows, longest, world)
        loss, accuracy = compute_loss(model, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent_accuracy = 0.98 * recent_accuracy + 0.02 * accuracy
        longest = 3 if recent_accuracy > 0.85 else longest
        if step % 250 == 0:
            # A generator of its own draws the same questions at every check. The draws of the
            # training stay as they are.
            batch = make_batch(random.Random(2), words, tokenizer, 300, longest, world)
            with torch.no_grad():
                _, held_out = compute_loss(model, *batch)
            print(
                f"step {step}: options of up to {longest} word(s), loss {loss.item():.3f},"
                f" held-out accuracy {held_out:.3f}",
                flush=True,
            )
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
            # A copy is converted, because `to` changes a module in place.
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(arguments.output_dir)
            tokenizer.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    run_command(main)
