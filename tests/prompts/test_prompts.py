import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from medqlora.data.examples import MultipleChoice, OpenAnswer
from medqlora.prompts.answers import parse_answer
from medqlora.prompts.styles import PromptError, candidates, render, render_answer

MCQ = MultipleChoice(
    "q", "Which?", ("one", "two", "three", "four"), 2, "medmcqa", "f", explanation="Because."
)
MEDQA = MultipleChoice("q", "Which?", ("one", "two", "three", "four"), 2, "medqa", "f")
PUBMEDQA = MultipleChoice(
    "q", "Is it?", ("yes", "no", "maybe"), 1, "pubmedqa", "f", context=("Seen.", "Found.")
)


def test_lm_eval_prompts_are_the_harness_own():
    prompt = render(MCQ, "lm_eval", "letter")
    assert prompt.user == "Question: Which?\nChoices:\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    assert prompt.completion == " C"
    assert (
        render(MEDQA, "lm_eval", "letter").user
        == "Question: Which?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )
    prompt = render(PUBMEDQA, "lm_eval", "letter")
    assert prompt.user == "Abstract: Seen.\nFound.\nQuestion: Is it?\nAnswer:"
    assert prompt.completion == " no"


def test_completions():
    assert render(MCQ, "chat", "letter").completion == "C"
    assert render(MCQ, "plain", "letter").completion == " C"
    assert render(MCQ, "chat", "letter_text").completion == "C. three"
    assert render(MCQ, "chat", "explanation").completion == "Because.\nAnswer: C"
    assert (
        render(OpenAnswer("o", "What?", "That.", "qa", "f"), "plain", "letter").completion
        == " That."
    )


def test_unlabelled_has_no_completion():
    assert (
        render(
            MultipleChoice("q", "Which?", ("a", "b"), None, "mcq", "f"), "plain", "letter"
        ).completion
        is None
    )


def test_text_completion_of_a_choice_question_is_refused():
    with pytest.raises(PromptError, match="open questions"):
        render(MCQ, "plain", "text")
    with pytest.raises(PromptError, match="multiple-choice questions only"):
        render(OpenAnswer("o", "What?", "That.", "qa", "f"), "lm_eval", "text")


line = (
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp", "Cs")), min_size=1)
    .map(str.strip)
    .filter(bool)
)


@given(
    st.lists(line, min_size=2, max_size=8),
    st.data(),
    st.sampled_from(["letter", "letter_text", "explanation"]),
    st.text(),
)
def test_parse_is_the_exact_inverse_of_render(options, data, completion, explanation):
    answer = data.draw(st.integers(0, len(options) - 1))
    example = MultipleChoice("q", "Which?", tuple(options), answer, "mcq", "f")
    assume("Answer:" not in "".join(options))
    text = render_answer(example, completion, explanation)
    assert parse_answer(text, example.options, completion) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I do not know",
        "Aspirin",
        "E",
        "Z. none",
        "A or B",
        "Because A is",
        "The answer is not B",
        "Option A or option B",
        "no effect",
        "The answer is a mixture",
        "Answers B",
        "the answer is Because",
        "The correct answer is A CT scan of the chest.",
        "Answer: A CT scan",
        "The answer is B or D.",
        "Answer: B and C",
        "A, B and D are correct",
        "Answer: A, B and D",
        "Option B is incorrect because of fever",
        "The correct option is not B; option B is contraindicated",
    ],
)
def test_parse_never_guesses(text):
    assert parse_answer(text, ("one", "two", "three", "four")) is None


def test_parse_reads_common_forms():
    for text in (
        "C",
        "C.",
        "(C)",
        "C) three",
        "Answer: C",
        "three",
        "Three.",
        "three, because",
        "**C**",
        "The answer is C.",
        "the correct answer is (C)",
        "The answer is C; option A is wrong",
        "Option A is wrong. Answer: C",
        r"Therefore the answer is \boxed{C}",
        "I would pick option C.",
        "**Answer:** C",
        "Answer: B. No, wait. Answer: C",
    ):
        assert parse_answer(text, MCQ.options) == 2, text
    for text in ("Yes.", "yes, it does", "yes"):
        assert parse_answer(text, PUBMEDQA.options) == 0


def test_cloze_hides_the_options():
    prompt = render(MCQ, "plain", "cloze")
    assert prompt.user == "Question: Which?\nAnswer:"
    assert prompt.completion == " three"
    assert candidates(MCQ, "plain", "cloze") == [" one", " two", " three", " four"]
    assert candidates(MCQ, "chat", "cloze") == ["one", "two", "three", "four"]
    assert "one" not in render(MCQ, "chat", "cloze").user


def test_lm_eval_prompts_of_mmlu_and_headqa():
    """lm_eval 0.4.13: tasks/mmlu/default/_default_template_yaml with mmlu_anatomy's description;
    tasks/headqa/headqa_en.yaml.
    """
    mmlu = MultipleChoice(
        "q", " Which? ", ("one", "two", "three", "four"), 2, "mmlu", "f", subject="college_biology"
    )
    prompt = render(mmlu, "lm_eval", "letter")
    assert (
        prompt.lead
        == "The following are multiple choice questions (with answers) about college biology.\n\n"
    )
    assert prompt.user == "Which?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    headqa = MultipleChoice("q", "Which?", ("one", "two"), 1, "headqa", "f")
    assert render(headqa, "lm_eval", "cloze").user == "Question: Which?\nAnswer:"
    assert candidates(headqa, "lm_eval", "cloze") == [" one", " two"]
    with pytest.raises(PromptError, match="use --scoring cloze"):
        render(headqa, "lm_eval", "letter")
