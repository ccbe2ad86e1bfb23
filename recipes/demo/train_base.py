"""Train the demonstration's tiny base model from scratch, on everything but medicine.

    python recipes/demo/train_base.py --output_dir recipes/demo/base

The model (4 layers, 128 wide, under 1.2 million parameters) learns to bind option letters to option texts, to look up a
fact *that stands in the prompt* and to compare a number with limits *that stand in the prompt*. Names are drawn at random
from its whole vocabulary, so no clinical fact is in it: on the demonstration's questions it is near chance.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_wsd_schedule

from medqlora.examples import LETTERS, MultipleChoice
from medqlora.prompts import render

EVERYDAY = ["apple", "bread", "river", "stone", "cloud", "table", "chair", "window", "garden", "forest", "mountain", "bridge", "castle", "tower", "ship", "wagon", "horse", "sheep", "goat", "eagle", "sparrow", "salmon", "lantern", "candle", "mirror", "basket", "hammer", "ladder", "needle", "thread", "cotton", "silk", "wool", "leather", "copper", "silver", "golden", "green", "purple", "yellow", "orange", "crimson", "violet", "large", "small", "heavy", "light", "round", "square", "narrow", "broad", "early", "late", "summer", "winter", "spring", "autumn", "morning", "evening", "music", "letter", "paper", "pencil", "carpet", "pillow", "blanket", "butter", "honey", "pepper", "sugar", "flour", "cherry", "lemon", "melon", "pear", "plum", "olive", "market", "harbour", "village", "valley", "island", "desert", "ocean", "meadow", "orchard"]


def read_words(data_dir: Path) -> list[str]:
    """Every word of the demonstration's questions and options, without its order or partner."""
    words = set(EVERYDAY)
    for line in (data_dir / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key in ("question", "opa", "opb", "opc", "opd"):
            words.update(word for word in row[key].replace("?", " ").replace(".", " ").split() if word.isalpha())
    return sorted(words)


def train_tokenizer(data_dir: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, from the demonstration's texts and the everyday words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1536, special_tokens=["<|pad|>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    rows = [json.loads(line) for line in (data_dir / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [" ".join(str(row[key]) for key in ("question", "opa", "opb", "opc", "opd")) for row in rows]
    texts += ["\nA. \nB. \nC. \nD. \nQuestion: \nContext: \nAnswer: A B C D"] * 200
    texts += [" " + " ".join(EVERYDAY)] * 20 + [". ".join(BASE_TEMPLATES)] * 50
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=512
    )


BASE_TEMPLATES = [
    "{key} goes with {value}.", "What goes with {key}?", "Which option says {key}?", "Which one is {key}?",
    "Limits {low} to {high}. Under is {under}, over is {over}, between is {between}.", "The {key} is {value}. Which name fits?",
]  # fmt: skip


def make_question(rng: random.Random, words: list[str], stage: int) -> list[MultipleChoice]:
    """Questions over one list of options, so that one prompt teaches several times.

    Stage 0: find a word among the options; 1: also phrases and told facts; 2: also numbers against told limits.
    """

    def phrase() -> str:
        return " ".join(rng.choices(words, k=rng.choice([1, 1, 2, 2, 3]) if stage else 1))

    kind = rng.random() * (0.35, 0.7, 1.0)[stage]
    options = [phrase() for _ in range(4)]
    if kind < 0.35:  # the option itself stands in the question
        asked = [(rng.choice(BASE_TEMPLATES[2:4]).format(key=option), option) for option in options]
    elif kind < 0.7:  # a fact that stands in the question
        facts = [(phrase(), option) for option in options]
        told = " ".join(BASE_TEMPLATES[0].format(key=key, value=value) for key, value in rng.sample(facts, 4)) + " "
        asked = [(BASE_TEMPLATES[1].format(key=key), value) for key, value in facts]
    else:  # a number against limits that stand in the question
        decimals = rng.choice([0, 0, 1])
        low = rng.uniform(0.5, 20) if decimals else rng.uniform(10, 300)
        width = low * rng.uniform(0.15, 1.5)
        high = low + width
        spans = [(max(low - width, low * 0.4), low - 0.1 * width), (high + 0.1 * width, high + width),
                 (low + 0.1 * width, high - 0.1 * width)]  # fmt: skip
        limits = {"low": f"{low:.{decimals}f}", "high": f"{high:.{decimals}f}"}
        told = BASE_TEMPLATES[4].format(**limits, under=options[0], over=options[1], between=options[2]) + " "
        asked = [
            (BASE_TEMPLATES[5].format(key=phrase(), value=f"{rng.uniform(*span):.{decimals}f}"), option)
            for span, option in zip(spans, options, strict=False)
        ]
    told = "" if kind < 0.35 else told
    rng.shuffle(options)
    asked = rng.choices(asked, k=4)  # with repetition: else the last answer follows by elimination
    return [
        MultipleChoice("", (told if first else "") + question, tuple(options), options.index(right), "base", "generated")
        for first, (question, right) in zip([True, False, False, False], asked, strict=True)
    ]


def make_batch(rng, words, tokenizer, letters, size, stage):
    """-> ids [rows, length] right-padded, places [answers, 2]: row and position before each answer, answers [answers]."""
    pieces, owners = [], []
    for row in range(size):
        for number, question in enumerate(make_question(rng, words, stage)):
            prompt = render(question, "plain", "letter").user
            pieces.append(prompt if number == 0 else f"\nQuestion: {question.question}\nAnswer:")
            owners.append((row, letters[question.answer]))
    rows, places, answers = [[] for _ in range(size)], [], []
    for ids, (row, answer) in zip(tokenizer(pieces)["input_ids"], owners, strict=True):
        rows[row] += ids
        places.append((row, len(rows[row]) - 1))
        rows[row].append(answer)
        answers.append(answer)
    longest = max(map(len, rows))
    padded = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor(places), torch.tensor(answers), tokenizer.pad_token_id


def compute_loss(model, ids, places, answers, pad):
    """Cross entropy of the answers, and a little of every token: copying is learned there first. -> loss, accuracy on first answers"""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # causal: padding on the right is never seen
    logits = model.lm_head(hidden)  # [rows, length, vocab]
    every = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad)
    chosen = logits[places[:, 0], places[:, 1]]
    first = torch.arange(0, len(answers), 4)  # the only one without another answer before it
    right = (chosen[first].argmax(-1) == answers[first]).float().mean().item()
    return F.cross_entropy(chosen, answers) + 0.2 * every, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "base", help="folder to write to")
    parser.add_argument("--data_dir", type=Path, default=Path(__file__).parent / "data", help="for the vocabulary only")
    parser.add_argument("--steps", type=int, default=9000, help="optimizer steps (default 9000)")
    parser.add_argument("--rows", type=int, default=32, help="questions per step (default 32)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate (default 1.5e-3)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rng, words = random.Random(1), read_words(arguments.data_dir)
    tokenizer = train_tokenizer(arguments.data_dir)
    letters = [tokenizer.encode(f" {letter}")[0] for letter in LETTERS[:4]]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, rms_norm_eps=1e-5,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, {len(words)} words")
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_wsd_schedule(
        optimizer, num_warmup_steps=200, num_decay_steps=arguments.steps // 4, num_training_steps=arguments.steps
    )
    stage, recent = 0, 0.0
    for step in range(1, arguments.steps + 1):
        batch = make_batch(rng, words, tokenizer, letters, arguments.rows, stage)
        loss, right = compute_loss(model, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent = 0.98 * recent + 0.02 * right
        if recent > 0.9 and stage < 2:
            stage, recent = stage + 1, 0.0
        if step % 250 == 0:
            with torch.no_grad():
                _, held_out = compute_loss(model, *make_batch(random.Random(2), words, tokenizer, letters, 300, stage))
            print(f"step {step}: stage {stage}, loss {loss.item():.3f}, held-out accuracy {held_out:.3f}", flush=True)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
