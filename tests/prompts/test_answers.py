"""Generated texts are read for the option that they name, and never for another one."""

import random

import pytest
from conftest import real
from hypothesis import given
from hypothesis import strategies as st

from medqlora.core.config import DataEntry
from medqlora.data.examples import LETTERS, MultipleChoice
from medqlora.data.reading import read_examples
from medqlora.prompts.answers import find_final, parse_answer
from medqlora.prompts.styles import render_answer

DRUGS = ("Aspirin", "Clopidogrel", "Vitamin K", "C. difficile colitis")
FILES = (
    "medmcqa/validation_part.jsonl",
    "medmcqa/train_partial.jsonl",
    "medqa/dev_4_options.jsonl",
    "medqa/dev_5_options.jsonl",
    "medqa/train_partial.jsonl",
)
# l is the option's letter and o its text.
FORMS = (
    "{o}",
    "{l}. {o}",
    "({l}) {o}",
    "{l}) {o}",
    "{l}: {o}",
    "**{l}. {o}**",
    "The answer is {o}",
    "The correct answer is {o}.",
    "Answer: {l}. {o}",
    "The answer is {o} ({l})",
    r"\boxed{{{o}}}",
    "<answer>{o}</answer>",
)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C. difficile is a common cause here, so the answer is B", "B"),
        ("B. cereus is unlikely; the correct answer is (A)", "A"),
        ("B. Aspirin is contraindicated; the correct answer is A", "A"),
        ("C. difficile colitis", "D"),
        ("The answer is C. difficile colitis.", "D"),
        ("D. C. difficile", None),
        ("C. difficile", None),
        ("A, fumigatus", None),
        ("E. coli", None),
        ("A. it blocks COX", "A"),
        ("A. Aspirin blocks COX", "A"),
        ("B. Clop", "B"),
        ("B.Clopidogrel", "B"),
        ("A. Clopidogrel", None),
        ("The answer is B (Aspirin)", None),
        ("The answer is vitamin K", "C"),
        ("Answer: Vitamin D", None),
        ("The answer is B cells", None),
        ("Answer: B-cell lymphoma", None),
        ("The answer is D-dimer", None),
        ("The diagnosis is hepatitis B", None),
        ("Group A streptococcus", None),
        ("A is wrong, B is right", None),
        ("(A) is wrong, (B) is right", None),
        ("A. Aspirin is incorrect. B. Clopidogrel is correct.", None),
        ("A) Incorrect", None),
        ("Answer A (Aspirin) is incorrect", None),
        ("Not A. The answer is B", "B"),
        ("The answer is A, not B", "A"),
        ("The answer cannot be A", None),
        ("If the answer is A, the fever is odd", None),
        ("One might think the answer is A, but it is B", None),
        ("The wrong answer is A; the right answer is B", "B"),
        ("Is the answer A? No, the answer is B.", "B"),
        ("A and B", None),
        ("Answer: A/B", None),
        ("The answer is B. Vitamin K is for warfarin", "B"),
        ("B\n\nQuestion: Which?\nAnswer: C", "B"),
        ("So the answer is B.\n\nQuestion 2: Which?\nAnswer: C", "B"),
        ("B\n\nWait, the answer is C", "C"),
        ("B\n\nThe answer is C", None),
        ("The answer is A. No, wait, it is B", None),
        ("The answer is A. B is also correct.", None),
        ("Answer: A; B", None),
        ("A\nB\nC\nD", None),
        ("A. Aspirin and heparin", None),
        ("A) Aspirin B) Clopidogrel C) Vitamin K", None),
        ("Aspirin with clopidogrel", None),
        ("The answer is Aspirin in children", None),
        ("Therefore B is the correct answer", "B"),
        ("A. Aspirin\nB. Clopidogrel\nC. Vitamin K\nD. C. difficile colitis", None),
        ("Aspirin\nClopidogrel\nVitamin K\nC. difficile colitis", None),
        ("Aspirin is the correct answer.", "A"),
        ("B is the answer", "B"),
        ("A CT scan", None),
        ("<answer>C</answer>", "C"),
        ("<answer>(C) Vitamin K</answer>", "C"),
        (r"\boxed{C}", "C"),
        (r"The final answer is $\boxed{\text{C. Vitamin K}}$.", "C"),
        ("## Thinking\n\nA? Answer: A\n\n## Final Response\n\nThe answer is C.", "C"),
        ("## Thinking\n\nThe answer is A.", None),
        ("<think>The answer is A.</think>\n\nC", "C"),
        ("The answer is A.\n</think>\n\nThe answer is C", "C"),
        ("<think>The answer is A.", None),
        ("B\n<think>The answer is A.", None),
    ],
)
def test_sentences(text, letter):
    index = parse_answer(text, DRUGS)
    assert (None if index is None else LETTERS[index]) == letter


def test_options_with_letters_in_their_names():
    options = ("E. coli", "A. fumigatus", "Vitamin D", "Both A and B", "B antigen")
    for index, option in enumerate(options):
        for form in ("{o}", "The answer is {o}.", "Answer: {o} because it grows", r"\boxed{{{o}}}"):
            assert parse_answer(form.format(o=option), options) == index, (form, option)
    vitamins = ("Vitamin D", "Vitamin C", "Vitamin B12", "Vitamin A")
    for text in ("D. Vitamin K", "D. Vitamin D", "The answer is D (Vitamin D)", "Vitamin A excess"):
        assert parse_answer(text, vitamins) is None, text
    assert parse_answer("Vitamin A", vitamins) == 3
    # A denial behind "No" belongs to the answer.
    for text in ("No, it does not.", "No. It is not associated.", "B. No, they are not"):
        assert parse_answer(text, ("yes", "no", "maybe")) == 1, text
    assert parse_answer("No effect", ("yes", "no", "maybe")) is None
    # A letter alone is the letter that the prompt asked for, whatever the options' texts are.
    assert parse_answer("Answer: B", ("B", "C", "A", "D")) == 1


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize(
    "form", [FORMS[0], FORMS[1], *(pytest.param(f, marks=pytest.mark.full) for f in FORMS[2:])]
)
def test_options_of_published_files(form, path):
    """Each option word for word is itself or nothing, and nearly always itself."""
    entry = DataEntry(format=path.split("/")[0], path=str(real(path)))
    examples, _ = read_examples(entry, "all", drop_invalid=True)
    unread = total = 0
    for example in examples:
        for index, option in enumerate(example.options):
            if form != "{l}. {o}" and option in LETTERS:
                continue  # This text is an option's letter, too.
            text = form.format(l=LETTERS[index], o=option)
            found = parse_answer(text, example.options)
            assert found in (index, None), (text, example.options)
            total += 1
            unread += found is None
    assert unread < 0.01 * total


SPECIES = {
    "Aspergillus": ("fumigatus", "niger"),
    "Acinetobacter": ("baumannii",),
    "Bacillus": ("cereus", "anthracis"),
    "Bordetella": ("pertussis",),
    "Clostridium": ("difficile", "perfringens", "tetani"),
    "Candida": ("albicans",),
    "Corynebacterium": ("diphtheriae",),
    "Diphyllobothrium": ("latum",),
    "Escherichia": ("coli",),
    "Enterococcus": ("faecalis",),
    "Fusobacterium": ("nucleatum",),
    "Giardia": ("lamblia",),
    "Helicobacter": ("pylori",),
}
NOUNS = (
    "vitamin X",
    "hepatitis X",
    "group X streptococcus",
    "blood group X",
    "factor X",
    "X cells",
    "X antigen",
    "X-dimer",
    "X-reactive protein",
    "X peptide",
    "immunoglobulin X",
)
# l and o are an option's letter and text, m and p another one's; name is any organism, vitamin or
# antigen.
NAMING = (
    "{name} is unlikely, so the answer is {l}",
    "{name} is unlikely; the correct answer is ({l})",
    "{name} grew. Therefore, the answer is {l}.",
    "{name} was considered. Answer: {l}. {o}",
    "Could it be {name}? No. The correct answer is {l}.",
    "{name} should be ruled out. Final answer: {l}",
    "The answer is {o} ({l})",
    "{p} is wrong. The answer is {o}.",
    "{l}. {o}",
    "({l}) {o}",
    "{o} because it is common",
    "<think>Perhaps {name}, answer: {m}</think>The answer is {l}",
    "## Thinking\n\n{name} would fit: answer {m}.\n\n## Final Response\n\nThe answer is {l}. {o}",
    "The answer is {l}, not {m}.",
    "The wrong answer is {m}; the right answer is {l}",
    r"\boxed{{\text{{{l}}}}}",
    "<answer>{o}</answer>",
)
SILENT = (
    "{name} was found in the culture",
    "The answer is {name} infection of the gut",
    "{name}, {p} and {o} are wrong",
    "The answer is not {m}",
    "{m} or {l}",
    "({m}) and ({l})",
    "{m} is wrong",
    "If the answer is {m}, {name} is odd.",
    "Neither {m} nor {l}",
    "Vitamin {m} deficiency",
    "The answer is {m}-cell lymphoma",
    "The answer is {m} lymphocytes, as in {name}",
    "<think>{name}, so the answer is {m}",
    "## Thinking\n\n{name}. Answer: {m}",
)


def draw_names(draw: random.Random) -> list[str]:
    """Return distinct names of organisms, or of things that are told apart by letters."""
    if draw.random() < 0.5:
        names = [(genus, word) for genus, words in SPECIES.items() for word in words]
        drawn = draw.sample(names, 6)
        short = draw.random() < 0.7
        return [f"{genus[0]}. {word}" if short else f"{genus} {word}" for genus, word in drawn]
    nouns = draw.sample(NOUNS, 2)
    return draw.sample([noun.replace("X", letter) for noun in nouns for letter in "ABCDEK"], 6)


def test_names_of_organisms_vitamins_and_antigens():
    """Of thousands of texts with names that hold a letter, none is read as another option."""
    draw = random.Random(0)
    read = total = 0
    for _ in range(250):
        *options, name, other = draw_names(draw)
        first, second = draw.sample(range(len(options)), 2)
        words = {
            "l": LETTERS[first],
            "o": options[first],
            "m": LETTERS[second],
            "p": options[second],
        }
        for form in NAMING:
            found = parse_answer(form.format(name=name, **words), tuple(options))
            assert found in (first, None), (form, name, options)
            total += 1
            read += found is not None
        for form in SILENT:
            text = form.format(name=other, **words)
            assert parse_answer(text, tuple(options)) is None, (text, options)
    assert read > 0.95 * total


PIECES = (
    *("A", "B", "C", "D", "a", "answer", "is", "not", "or", "and", "option", "the", "because"),
    *("(", ")", ".", ",", ":", ";", "*", "}"),
    *("<think>", "</think>", "<answer>", r"\boxed{", "\n", "Question:", "Answer:"),
    *("Aspirin", "Vitamin", "K", "difficile", "cells"),
)
words = st.lists(st.sampled_from(PIECES), max_size=14).map(" ".join)


@given(st.one_of(st.text(), words))
def test_any_text_is_read_or_left(text):
    assert parse_answer(text, DRUGS) in (None, 0, 1, 2, 3)
    assert parse_answer(text, DRUGS, "explanation") in (None, 0, 1, 2, 3)


@given(words, st.sampled_from(["think", "thinking", "Reasoning"]))
def test_thoughts_are_never_read(thoughts, tag):
    thoughts = thoughts.replace("</think>", "")
    assert parse_answer(f"<{tag}>{thoughts}", DRUGS) is None
    assert find_final(f"B <{tag}>{thoughts}") is None
    for answer in ("C", "The answer is C.", "I do not know"):
        spoken = parse_answer(answer, DRUGS)
        assert parse_answer(f"<{tag}>{thoughts}</{tag}>\n{answer}", DRUGS) == spoken
        assert parse_answer(f"{thoughts.replace('<think>', '')}</{tag}>{answer}", DRUGS) == spoken


ODD = (
    *("A", "a", "A.", "(A)", "B. coli", "A or B", "Both A and B", "not A", "B’s", "C:", "**B**"),
    *("the answer is A", "answer A", "A is wrong", r"\boxed{A}", "yes", "no", "...", "1", '"x"'),
)


@given(
    st.lists(st.sampled_from(ODD), min_size=2, max_size=5, unique=True),
    st.lists(st.sampled_from((*ODD, *PIECES[:12])), min_size=1, max_size=6).map(" ".join),
    st.data(),
)
def test_odd_options_and_explanations_are_read_as_written(options, explanation, data):
    answer = data.draw(st.integers(0, len(options) - 1))
    example = MultipleChoice("q", "Which?", tuple(options), answer, "mcq", "f")
    for completion in ("letter", "letter_text", "explanation"):
        text = render_answer(example, completion, explanation)
        assert parse_answer(text, example.options, completion) == answer


@given(st.permutations(DRUGS), st.sampled_from(DRUGS), st.sampled_from(FORMS[6:]))
def test_the_order_of_options_does_not_matter(options, option, form):
    index = options.index(option)
    assert parse_answer(form.format(l=LETTERS[index], o=option), tuple(options)) == index


def test_long_answers_are_read_quickly():
    """A text without a match takes no square of its length."""
    for piece in ("answer is ", "*", "\n", "(", "<think>", "A. ", "\\boxed{", "answer "):
        assert parse_answer(piece * 2_000, DRUGS) is None
