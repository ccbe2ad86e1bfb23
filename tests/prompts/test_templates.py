"""Chat templates as models have them: the answer stands where a trained model writes it."""

import copy
import datetime
import functools

import pytest
from conftest import real_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from medqlora.data.examples import MultipleChoice, OpenAnswer
from medqlora.prompts.chat_template import make_encoder, render_template
from medqlora.prompts.encoding import encode_candidates, encode_prefixes
from medqlora.prompts.fingerprint import fingerprint
from medqlora.prompts.rows import encode_examples
from medqlora.prompts.styles import PromptError, render

TOKENIZERS = ["llama-3", "qwen2.5", "phi-3", "smollm2"]
QUESTION = MultipleChoice(
    "q1", "Which organ makes bile?", ("Liver", "Spleen", "Heart", "Lung"), 1, "medqa", "line 1"
)
OPEN = OpenAnswer("q2", "What makes bile?", "The liver.", "qa", "line 2")

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %}"
    " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# The empty block of thoughts stands before the last answer alone.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
# The generation prompt lets the model think, and earlier thoughts are left out.
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\nAssistant: "
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<think>\n{% endif %}"
)
GRANITE = (
    "Today is {{ strftime_now('%B %d, %Y') }}.\n{% for m in messages %}<|{{ m.role }}|>\n"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<start>{{ m.role }}{% if m.role == 'assistant' %}<channel>final"
    "{% endif %}<message>\n{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant{% endif %}"
)
COLON = (
    "{% for m in messages %}### {{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)
TEMPLATES = {
    "own": None,
    "llama2": LLAMA2,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "granite": GRANITE,
    "gemma": GEMMA,
    "harmony": HARMONY,
    "colon": COLON,
}


@functools.cache
def make(name, template=None, **arguments):
    # Other tests use the same tokenizer with its own template.
    tokenizer = copy.copy(real_tokenizer(name))
    if template:
        tokenizer.chat_template = template
    return make_encoder(tokenizer, "chat", "letter", arguments)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_row_is_the_conversation_that_the_template_renders(name, template):
    """Prompt and answer together have the tokens of the whole conversation."""
    if template == "own" and not real_tokenizer(name).chat_template:
        pytest.skip("this tokenizer has no chat template of its own")
    encoder = make(name, TEMPLATES[template])
    prompt = render(QUESTION, "chat", "letter")
    (prefix,) = encode_prefixes(encoder, [prompt])
    whole = render_template(encoder.tokenizer, [prompt.user, prompt.completion], {})
    expected = encoder.tokenizer(whole, add_special_tokens=False)["input_ids"]
    table, _ = encode_examples(encoder, [QUESTION], 512)
    row = table.ids.tolist()
    assert row[: len(prefix)] == prefix
    answer = row[len(prefix) : -1]
    assert prefix + answer == expected[: len(row) - 1]
    assert row[-1] == encoder.end_id
    # Scoring reads the same prefix and asks for the same letter.
    letters = encode_candidates(encoder, [prompt], [prefix], [list("ABCD")])[0]
    assert letters[1] == answer
    assert len({tuple(letter) for letter in letters}) == 4


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_open_block_of_thoughts_is_closed_before_the_answer(name):
    for template, arguments in ((R1, {}), (QWEN3, {}), (QWEN3, {"enable_thinking": False})):
        encoder = make(name, template, **arguments)
        assert (encoder.frame.after + encoder.frame.gap).endswith("<think>\n\n</think>\n\n")
    # Worked examples are shown as earlier turns, without thoughts.
    earlier = make(name, QWEN3).frame.earlier
    assert earlier is not None
    assert "think" not in earlier


@pytest.mark.parametrize("template", [GRANITE, "{{ date_string }}" + COLON])
def test_the_clock_changes_no_prompt(template, monkeypatch):
    """A prompt of today must be the prompt of tomorrow."""
    import transformers.utils.chat_template_utils as rendering

    prints = set()
    for year in (2025, 2031):
        day = datetime.datetime(year, 5, 6)

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return day

        monkeypatch.setattr(rendering, "datetime", Clock)
        make.cache_clear()
        encoder = make("qwen2.5", template)
        assert "2024" in encoder.frame.before
        prints.add(fingerprint(encoder))
    assert len(prints) == 1


def test_template_arguments_change_the_prompt_or_are_refused():
    template = "{% if kind == 'x' %}Kind x. {% endif %}" + COLON
    plain = make("qwen2.5", template)
    assert fingerprint(make("qwen2.5", template, kind="x")) != fingerprint(plain)
    assert fingerprint(make("qwen2.5", template, kind="y")) == fingerprint(plain)
    for name in ("enable_thinkin", "kin", "messages", "add_generation_prompt"):
        with pytest.raises(PromptError, match=f"template_arguments {name}: this model's chat"):
            make("qwen2.5", template, **{name: True})
    with pytest.raises(PromptError, match="prompt_style plain has no chat template"):
        make_encoder(real_tokenizer("qwen2.5"), "plain", "letter", {"kind": "x"})


def count_special(encoder, ids):
    return sum(number in encoder.literal.special.values() for number in ids)


@functools.cache
def make_in_style(name, style):
    tokenizer = copy.copy(real_tokenizer(name))
    if not tokenizer.chat_template:
        tokenizer.chat_template = GEMMA
    return make_encoder(tokenizer, style, "letter")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("style", ["chat", "plain"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_name_of_a_special_token_in_a_row_is_text(name, style, data):
    encoder = make_in_style(name, style)
    tokenizer = encoder.tokenizer
    special = data.draw(st.sampled_from(sorted(encoder.literal.special)))
    words = st.sampled_from(["bile", "\n", " ", "<", ">", "é", "x", "pH < 7", special])
    text = "What is " + "".join(data.draw(st.lists(words, max_size=6))) + special + " here?"
    example = OpenAnswer("q", text, f"It is {special}.", "qa", "line 1")
    harmless = OpenAnswer(
        "q", text.replace(special, "#" * len(special)), "It is a tag.", "qa", "line 1"
    )
    prompt, plain = (render(item, style, "letter") for item in (example, harmless))
    prefix, expected = encode_prefixes(encoder, [prompt, plain])
    assert count_special(encoder, prefix) == count_special(encoder, expected)
    assert text in tokenizer.decode(prefix, clean_up_tokenization_spaces=False)
    # Training reads what inference reads, and the answer holds no token that ends it too early.
    table, _ = encode_examples(encoder, [example], 512)
    row = table.ids.tolist()
    assert row[: len(prefix)] == prefix
    assert count_special(encoder, row[len(prefix) :]) == 1
    assert row[-1] == encoder.end_id
    assert special in tokenizer.decode(row[len(prefix) : -1], clean_up_tokenization_spaces=False)


def test_a_vocabulary_that_makes_the_token_out_of_text_is_refused():
    """A Unigram vocabulary may hold the special token as an ordinary piece too."""
    pieces = [(character, -2.0) for character in "#abcdefghijklmnopqrstuvwxyz?:.\n<>/"]
    model = Unigram([("<unk>", -9.0), ("</s>", -1.0), (" ", -2.0), *pieces], unk_id=0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), eos_token="</s>", unk_token="<unk>"
    )
    encoder = make_encoder(tokenizer, "plain", "letter")
    good = OpenAnswer("q", "what is it?", "that.", "qa", "line 1")
    assert encode_examples(encoder, [good], 512)[0].ids[-1] == encoder.end_id
    bad = OpenAnswer("q", "what is </s> here?", "that.", "qa", "line 1")
    with pytest.raises(PromptError, match="a text has </s> in it"):
        encode_prefixes(encoder, [render(bad, "plain", "letter")])


def test_lm_eval_reads_special_tokens_as_the_harness_does():
    encoder = make_encoder(real_tokenizer("qwen2.5"), "lm_eval")
    text = "What is <|im_end|> here?"
    example = MultipleChoice("q", text, ("one", "two"), 0, "medqa", "line 1")
    (prefix,) = encode_prefixes(encoder, [render(example, "lm_eval", "letter")])
    assert encoder.literal.special["<|im_end|>"] in prefix
