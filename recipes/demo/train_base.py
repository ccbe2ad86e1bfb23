"""Train the demonstration's tiny base model from scratch, on everything but medicine.

    python recipes/demo/make_dataset.py --full --output_dir vocabulary
    python recipes/demo/train_base.py --data_dir vocabulary --output_dir recipes/demo/base \\
        --stage find --steps 5000
    python recipes/demo/train_base.py --data_dir vocabulary --output_dir recipes/demo/base \\
        --stage facts --steps 4000

The model (4 layers, 128 wide, one million parameters) learns to bind option letters to option
texts, first by finding the option that says what the question says (words drawn at random from its
vocabulary), then also by recalling facts of an invented world (pairs of everyday words, quantities
with a usual range). No clinical fact is in it: on the demonstration's questions it is near chance.
"""

import argparse
import copy
import json
import random
from dataclasses import replace
from pathlib import Path

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
    """Every word of the demonstration's questions and options, without its order or partner."""
    words = set(EVERYDAY)
    for line in (data_dir / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key in ("question", "opa", "opb", "opc", "opd"):
            words.update(
                word
                for word in row[key].replace("?", " ").replace(".", " ").split()
                if word.isalpha()
            )
    return sorted(words)


def train_tokenizer(data_dir: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, from the demonstration's texts and the everyday words."""
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
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rows = [
        json.loads(line)
        for line in (data_dir / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    texts = [
        " ".join(str(row[key]) for key in ("question", "opa", "opb", "opc", "opd")) for row in rows
    ]
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
    """Facts that exist nowhere else: pairs of everyday words, and invented quantities with a usual
    range.
    """

    def __init__(self, rng: random.Random, pairs: int = 120, ranges: int = 24):
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
            self.ranges.append(
                (
                    key,
                    low,
                    low * rng.uniform(1.1, 2.5),
                    decimals,
                    terms[2 * number],
                    terms[2 * number + 1],
                )
            )

    def ask_pair(self, rng: random.Random) -> tuple[str, list[str]]:
        kind = rng.choice(self.kinds)
        key, right = rng.choice(kind)
        wrong = rng.sample([value for _, value in kind if value != right], 3)
        return rng.choice(PAIR_TEMPLATES).format(
            key=key, thing=rng.choice(EVERYDAY), age=rng.randint(18, 90)
        ), [right, *wrong]

    def ask_range(self, rng: random.Random) -> tuple[str, list[str]]:
        key, low, high, decimals, under, over = rng.choice(self.ranges)
        width = high - low
        place = rng.randrange(3)
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
        return question, [terms[place], *(term for term in terms if term != terms[place]), other]


def make_question(
    rng: random.Random, words: list[str], longest: int, world: World | None
) -> MultipleChoice:
    """Find a phrase of random words among four; with a world, mostly recall one of its facts."""
    if world is not None and rng.random() < 0.7:
        question, options = (world.ask_pair if rng.random() < 0.6 else world.ask_range)(rng)
        right = options[0]
        rng.shuffle(options)
        return MultipleChoice(
            "", question, tuple(options), options.index(right), "base", "generated"
        )
    options = [" ".join(rng.choices(words, k=rng.randint(1, longest))) for _ in range(4)]
    right = rng.randrange(4)
    question = rng.choice(TEMPLATES).format(phrase=options[right])
    return MultipleChoice("", question, tuple(options), right, "base", "generated")


def make_batch(rng, words, tokenizer, size, longest, world):
    """-> ids [rows, length] right-padded, mask [rows, length], last [rows] position before the
    answer, forward [rows].

    Every third question is asked backwards (which option has this letter?): there the letters are
    bound to options first.
    """
    texts = []
    forward = []
    for number in range(size):
        question = make_question(rng, words, longest, world)
        forward.append(number % (6 if world else 3) != 0)
        answer = f" {LETTERS[question.answer]}"
        if not forward[-1]:
            answer = f" {question.options[question.answer]}"
            question = replace(
                question, question=rng.choice(TEMPLATES).format(phrase=LETTERS[question.answer])
            )
        texts.append(
            (
                render(question, "plain", "letter").user,
                answer + (tokenizer.eos_token if world else ""),
            )
        )
    prefixes = tokenizer([prefix for prefix, _ in texts])["input_ids"]
    encoded = tokenizer(
        [prefix + answer for prefix, answer in texts], padding=True, return_tensors="pt"
    )
    last = torch.tensor([len(ids) - 1 for ids in prefixes])
    return encoded["input_ids"], encoded["attention_mask"], last, torch.tensor(forward)


def compute_loss(model, ids, mask, last, forward):
    """Cross entropy of the first answer token, and a little of every token: copying is learned
    there first.

    -> loss, accuracy of the letters
    """
    # causal: padding on the right is never seen
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)  # [rows, length, vocab]
    every = F.cross_entropy(logits[:, :-1][mask[:, 1:] == 1], ids[:, 1:][mask[:, 1:] == 1])
    at = torch.arange(len(ids))
    chosen = logits[at, last]
    answers = ids[at, last + 1]
    right = (chosen.argmax(-1) == answers)[forward].float().mean().item()
    return F.cross_entropy(chosen, answers) + 0.3 * every, right


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--stage",
        choices=["find", "facts"],
        default="find",
        help="find: from scratch; facts: go on from there",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).parent / "base", help="folder to write to"
    )
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="questions whose words are the vocabulary"
    )
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps (default 5000)")
    parser.add_argument("--rows", type=int, default=48, help="questions per step (default 48)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(1)
    words = read_words(arguments.data_dir)
    if arguments.stage == "facts":
        tokenizer = AutoTokenizer.from_pretrained(arguments.output_dir)
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
    longest = 3 if world else 1
    recent = 0.0  # words in an option: one until those are found
    for step in range(1, arguments.steps + 1):
        batch = make_batch(rng, words, tokenizer, arguments.rows, longest, world)
        loss, right = compute_loss(model, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent = 0.98 * recent + 0.02 * right
        longest = 3 if recent > 0.85 else longest
        if step % 250 == 0:
            with torch.no_grad():
                _, held_out = compute_loss(
                    model, *make_batch(random.Random(2), words, tokenizer, 300, longest, world)
                )
            print(
                f"step {step}: options of up to {longest} word(s), loss {loss.item():.3f},"
                f" held-out accuracy {held_out:.3f}",
                flush=True,
            )
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(arguments.output_dir)
            tokenizer.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
