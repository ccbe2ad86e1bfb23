from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medqlora.data.cleaning import clean, decontaminate, deduplicate, squash
from medqlora.data.examples import MultipleChoice, OpenAnswer, Passage

QUESTION = MultipleChoice(
    "a",
    "Which  is\nright?",
    ("One ", "two", "three", "four"),
    1,
    "medmcqa",
    "f line 1",
    explanation="x\n\n\n\ny",
)
OPEN = OpenAnswer("o", "What is it?", "It.", "qa", "f line 1")


def test_whitespace_and_case():
    cleaned = clean(QUESTION)
    assert (cleaned.question, cleaned.options[0], cleaned.explanation) == (
        "Which is right?",
        "One",
        "x\n\ny",
    )
    assert clean(QUESTION, lowercase=True).question == "which is right?"


@given(st.text(), st.text(min_size=1))
def test_cleaning_twice_is_cleaning_once(question, answer):
    example = OpenAnswer("o", question, answer, "qa", "f")
    assert clean(clean(example)) == clean(example)


def test_exact_duplicates():
    kept, removals = deduplicate(
        [QUESTION, replace(QUESTION, id="b"), replace(QUESTION, answer=2)], "exact"
    )
    assert [e.answer for e in kept] == [1, 2]
    assert [r.id for r in removals] == ["b"]


def test_normalized_duplicates_ignore_case_punctuation_and_option_order():
    other = replace(
        clean(QUESTION),
        id="b",
        question="which is RIGHT",
        options=("four", "two", "three", "one"),
        answer=1,
    )
    assert len(deduplicate([QUESTION, other], "normalized")[0]) == 1
    assert len(deduplicate([QUESTION, other], "exact")[0]) == 2
    assert len(deduplicate([QUESTION, QUESTION], "none")[0]) == 2


def test_two_answers_to_one_open_question_are_two_rows():
    assert len(deduplicate([OPEN, replace(OPEN, answer="Other.")], "normalized")[0]) == 2


def test_decontamination_by_stem_and_options():
    same = replace(
        QUESTION, id="t", question="WHICH is right ?", options=("four", "three", "two", "One")
    )
    other_options = replace(QUESTION, id="u", options=("five", "six", "seven", "eight"))
    kept, removals = decontaminate([same, other_options], [QUESTION])
    assert [e.id for e in kept] == ["u"]
    assert removals[0].id == "t"
    assert "f line 1" in removals[0].reason


def test_decontamination_finds_a_long_stem_with_other_options():
    stem = (
        "A 54-year-old man comes to the emergency department with crushing chest pain that started"
        " two hours ago; what is it?"
    )
    four = MultipleChoice("e", stem, ("a", "b", "c", "d"), 0, "medqa", "e")
    five = MultipleChoice("t", stem, ("a", "b", "c", "d", "e"), 0, "medqa", "t")
    assert decontaminate([five], [four])[0] == []


def test_decontamination_of_open_questions_and_text():
    assert decontaminate([replace(OPEN, answer="Other")], [OPEN])[0] == []
    passage = Passage("p", "Some text.", "text", "f")
    assert decontaminate([passage], [passage])[0] == []


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [("pH 7.35!", "PH 7.35", True), ("7.35", "73.5", False), ("Na <135", "Na >135", False)],
)
def test_squash_keeps_what_changes_a_value(a, b, same):
    assert (squash(a) == squash(b)) is same


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("A) Liver", "B) Spleen"), ("Liver", "Spleen")),
        (("(a) Liver", "(b)Spleen"), ("Liver", "Spleen")),
        (("A. Liver", "B. Spleen", "C. Skin"), ("Liver", "Spleen", "Skin")),
        (("A: Liver", "B: Spleen"), ("Liver", "Spleen")),
        (("Liver", "Spleen", "c)\tHeart", "d)\tLung"), ("Liver", "Spleen", "Heart", "Lung")),
        # These are names and references, not labels.
        (("C. albicans", "B. fragilis", "C. difficile"), None),
        (("H. pylori", "S. aureus", "E. coli", "D. latum"), None),
        (("(a) and (b)", "(b) and (c)", "(c) only", "(d) only"), None),
        (("1.5 mg", "2.5 mg", "3.5 mg"), None),
        (("A", "B", "AB", "O"), None),
        (("A)", "B)"), None),
    ],
)
def test_options_lose_letters_of_their_own(options, shown):
    example = replace(QUESTION, options=options)
    assert clean(example).options == (shown or options)
    # With or without these letters it is the same question.
    kept, removals = decontaminate(
        [clean(replace(example, options=shown or options))], [clean(example)]
    )
    assert (kept, len(removals)) == ([], 1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Crohn&#39;s &amp; colitis", "Crohn's & colitis"),
        ("pH &lt; 7.35", "pH < 7.35"),
        ("pH &amp;lt; 7.35", "pH < 7.35"),
        ("5&nbsp;mg", "5 mg"),
        ("5&#xB5;g", "5\u00b5g"),
        ("\ufeffpara\u00adcetamol\u200b", "paracetamol"),
        ("R&D, AT&T, &copy", "R&D, AT&T, &copy"),
        ("&unknown;", "&unknown;"),
    ],
)
def test_entities_and_invisible_characters(text, shown):
    assert clean(replace(QUESTION, question=text)).question == shown
    assert clean(replace(OPEN, answer=text)).answer == shown
