"""Write the questions of the demonstration, in the file format of MedMCQA.

    python recipes/demo/make_dataset.py --output_dir recipes/demo/data

    # Questions from all tables; the vocabulary of the demonstration's base model comes from them.
    python recipes/demo/make_dataset.py --full --output_dir vocabulary

Every answer follows from a table of this file: public adult reference ranges, and associations from
textbooks. Therefore it can be checked what fine-tuning has taught. The data is a demonstration, not
a medical resource. Do not use it for care.
"""

import json
import random
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import CommandParser, run_command, whole

# Each row: name, unit, lower limit, upper limit, decimals, term for a low value, for a high value.
RANGES = [
    ("serum sodium", "mmol/L", 135, 145, 0, "Hyponatraemia", "Hypernatraemia"),
    ("serum potassium", "mmol/L", 3.5, 5.0, 1, "Hypokalaemia", "Hyperkalaemia"),
    ("serum calcium", "mmol/L", 2.1, 2.6, 1, "Hypocalcaemia", "Hypercalcaemia"),
    ("serum magnesium", "mmol/L", 0.7, 1.0, 1, "Hypomagnesaemia", "Hypermagnesaemia"),
    ("serum phosphate", "mmol/L", 0.8, 1.5, 1, "Hypophosphataemia", "Hyperphosphataemia"),
    ("fasting glucose", "mmol/L", 3.9, 5.5, 1, "Hypoglycaemia", "Hyperglycaemia"),
    ("platelet count", "x10^9/L", 150, 400, 0, "Thrombocytopenia", "Thrombocytosis"),
    ("white cell count", "x10^9/L", 4.0, 11.0, 1, "Leukopenia", "Leukocytosis"),
    ("haemoglobin", "g/L", 120, 160, 0, "Anaemia", "Polycythaemia"),
    ("arterial carbon dioxide", "mmHg", 35, 45, 0, "Hypocapnia", "Hypercapnia"),
    ("heart rate", "per minute", 60, 100, 0, "Bradycardia", "Tachycardia"),
    ("respiratory rate", "per minute", 12, 20, 0, "Bradypnoea", "Tachypnoea"),
    ("systolic blood pressure", "mmHg", 90, 140, 0, "Hypotension", "Hypertension"),
    ("body mass index", "kg/m2", 18.5, 25.0, 1, "Underweight", "Overweight"),
]
VALUE_STEMS = [
    "A {age}-year-old {person} has a {name} of {value} {unit}. What is this called?",
    "The {name} of a {age}-year-old {person} is {value} {unit}. Which term fits?",
    "In a {person} aged {age} the {name} is {value} {unit}. Which finding is this?",
]
TERM_STEMS = [
    "A {person}, {age}, has a {name} of {value} {unit}, {side} {low} to {high}."
    " What is this called?",
    "In a {person} aged {age} the {name} is {value} {unit}, {side} its range of {low} to {high}."
    " Which term fits?",
]
# kind -> the stems of its questions, and its pairs of a key and the right option
PAIRS = {
    "Vitamins": (
        [
            "Lack of {key} leads to which disease in this {person}, {age}?",
            "A {person} of {age} lacks {key}. What follows?",
        ],
        [
            ("vitamin C", "Scurvy"),
            ("vitamin D", "Rickets"),
            ("thiamine", "Beriberi"),
            ("niacin", "Pellagra"),
            ("vitamin A", "Night blindness"),
            ("iodine", "Goitre"),
            ("vitamin K", "Bleeding tendency"),
            ("vitamin B12", "Megaloblastic anaemia"),
        ],
    ),
    "Toxicology": (
        [
            "A {person}, {age}, took too much {key}. Which antidote is given?",
            "Which antidote is right for {key} poisoning in a {person} aged {age}?",
        ],
        [
            ("paracetamol", "Acetylcysteine"),
            ("morphine", "Naloxone"),
            ("heparin", "Protamine"),
            ("warfarin", "Phytomenadione"),
            ("diazepam", "Flumazenil"),
            ("methanol", "Fomepizole"),
            ("iron", "Desferrioxamine"),
            ("digoxin", "Digoxin antibody"),
            ("carbon monoxide", "Oxygen"),
            ("organophosphate", "Atropine"),
        ],
    ),
    "Endocrinology": (
        [
            "A {person} of {age} makes too little {key}. Which gland has failed?",
            "Which gland makes {key}? The patient is a {person} aged {age}.",
        ],
        [
            ("insulin", "Pancreas"),
            ("thyroxine", "Thyroid"),
            ("cortisol", "Adrenal cortex"),
            ("adrenaline", "Adrenal medulla"),
            ("melatonin", "Pineal"),
            ("prolactin", "Anterior pituitary"),
            ("oxytocin", "Posterior pituitary"),
            ("parathormone", "Parathyroid"),
        ],
    ),
    "Microbiology": (
        [
            "A {person}, {age}, has {key}. Which organism is the cause?",
            "What causes {key}, seen in a {person} aged {age}?",
        ],
        [
            ("tetanus", "Clostridium tetani"),
            ("tuberculosis", "Mycobacterium tuberculosis"),
            ("cholera", "Vibrio cholerae"),
            ("syphilis", "Treponema pallidum"),
            ("malaria", "Plasmodium"),
            ("whooping cough", "Bordetella pertussis"),
            ("anthrax", "Bacillus anthracis"),
            ("plague", "Yersinia pestis"),
            ("diphtheria", "Corynebacterium diphtheriae"),
            ("leprosy", "Mycobacterium leprae"),
        ],
    ),
    "Anatomy": (
        [
            "The {key} of a {person}, {age}, is injured. Which function is lost?",
            "A {person} of {age} has a cut {key}. What fails?",
        ],
        [
            ("optic nerve", "Sight"),
            ("olfactory nerve", "Smell"),
            ("facial nerve", "Facial expression"),
            ("vestibulocochlear nerve", "Hearing"),
            ("hypoglossal nerve", "Tongue movement"),
            ("trigeminal nerve", "Facial sensation"),
            ("phrenic nerve", "Movement of the diaphragm"),
            ("accessory nerve", "Shrugging of the shoulder"),
        ],
    ),
}
DEMO_RANGES = ("serum sodium", "serum potassium", "fasting glucose", "platelet count")
NORMAL = "Within the reference range"
PEOPLE = [
    "man",
    "woman",
    "teacher",
    "farmer",
    "nurse",
    "student",
    "driver",
    "cook",
    "painter",
    "baker",
]


def choose_tables(full: bool) -> tuple[list, dict]:
    """Return the tables of measurements and of pairs that questions are made from.

    The demonstration uses four measurements and the first five pairs of each kind, because a tiny
    model learns these in two minutes.
    """
    if full:
        return RANGES, PAIRS
    ranges = [row for row in RANGES if row[0] in DEMO_RANGES]
    # A question needs three wrong options of its kind, so four pairs are the least.
    return ranges, {subject: (stems, pairs[:5]) for subject, (stems, pairs) in PAIRS.items()}


def make_value_question(rng: random.Random, ranges: list) -> dict:
    """Make a question about a value that is below, within or above its reference range."""
    name, unit, low, high, decimals, low_term, high_term = rng.choice(ranges)
    width = high - low
    kind = rng.choice(["low", "normal", "high"])
    # A tenth of the range is left out at each limit, so that rounding seldom crosses it. Half the
    # lower limit bounds low values, which keeps them above zero.
    span = {
        "low": (max(low - width, low * 0.5), low - 0.1 * width),
        "normal": (low + 0.1 * width, high - 0.1 * width),
        "high": (high + 0.1 * width, high + width),
    }[kind]
    value = f"{rng.uniform(*span):.{decimals}f}"
    right = {"low": low_term, "normal": NORMAL, "high": high_term}[kind]
    rounded = float(value)
    is_kind = {"low": rounded < low, "normal": low <= rounded <= high, "high": rounded > high}
    if not is_kind[kind]:  # Rounding has moved the value across a limit of the range.
        return make_value_question(rng, ranges)
    # The fourth option is a term of another measurement.
    other = rng.choice(list_other_terms(ranges, name))
    stem = rng.choice(VALUE_STEMS).format(
        age=rng.randint(18, 90), person=rng.choice(PEOPLE), name=name, value=value, unit=unit
    )
    explanation = f"The reference range of {name} is {low} to {high} {unit}; {value} is {kind}."
    wrong = [term for term in (low_term, NORMAL, high_term) if term != right]
    wrong.append(other)
    return make_row(rng, stem, right, wrong, explanation, "Laboratory values", name)


def list_other_terms(ranges: list, name: str) -> list[str]:
    """Return the terms for low and high values of all measurements except one."""
    terms = []
    for row in ranges:
        if row[0] != name:
            # The last two columns are the terms for a low and for a high value.
            terms += row[5:]
    return terms


def make_term_question(rng: random.Random, ranges: list) -> dict:
    """Make a question that tells the range and the side of a value, and asks for its term."""
    name, unit, low, high, decimals, low_term, high_term = rng.choice(ranges)
    side = rng.choice(["below", "above"])
    bounds = (low * 0.4, low * 0.9) if side == "below" else (high * 1.1, high * 2)
    value = f"{rng.uniform(*bounds):.{decimals}f}"
    right, opposite = (low_term, high_term) if side == "below" else (high_term, low_term)
    others = rng.sample(list_other_terms(ranges, name), 2)
    stem = rng.choice(TERM_STEMS).format(
        age=rng.randint(18, 90),
        person=rng.choice(PEOPLE),
        name=name,
        value=value,
        unit=unit,
        low=low,
        high=high,
        side=side,
    )
    explanation = (
        f"The reference range of {name} is {low} to {high} {unit};"
        f" {value} is {side} it: {right.lower()}."
    )
    return make_row(rng, stem, right, [opposite, *others], explanation, "Laboratory values", name)


def make_pair_question(rng: random.Random, kinds: dict) -> dict:
    """Make a question about one pair of the tables, with wrong options from the same kind."""
    subject = rng.choice(list(kinds))
    stems, pairs = kinds[subject]
    key, right = rng.choice(pairs)
    stem = rng.choice(stems).format(key=key, age=rng.randint(18, 90), person=rng.choice(PEOPLE))
    wrong = rng.sample([value for _, value in pairs if value != right], 3)
    explanation = f"{key[0].upper() + key[1:]}: {right}."
    return make_row(rng, stem, right, wrong, explanation, subject, key)


def make_general_question(rng: random.Random, ranges: list, kinds: dict) -> dict:
    """Make a question that asks for the option with a given text, in the generic mcq format.

    It needs no clinical knowledge, and keeps the model's ability to answer by letter.
    """
    terms = []
    for row in ranges:
        terms += row[5:]
    for _, pairs in kinds.values():
        terms += [value for _, value in pairs]
    options = rng.sample(terms, 4)
    right = rng.randrange(4)
    stem = rng.choice(
        [
            "Which option says {}?",
            "Which one is {}?",
            "Look for {}. Where is it?",
            "Find {} in this list.",
        ]
    )
    return {
        "question": stem.format(options[right]),
        "options": options,
        "answer": "ABCD"[right],
        "subject": "General",
    }


def make_row(
    rng: random.Random,
    question: str,
    right: str,
    wrong: list[str],
    explanation: str,
    subject: str,
    topic: str,
) -> dict:
    """Make a row in the format of MedMCQA, with its options in random order."""
    options = [right, *wrong]
    rng.shuffle(options)
    return {
        "question": question,
        "opa": options[0],
        "opb": options[1],
        "opc": options[2],
        "opd": options[3],
        # MedMCQA's own files count the right option from 1.
        "cop": options.index(right) + 1,
        "exp": explanation,
        "subject_name": subject,
        "topic_name": topic,
        "choice_type": "single",
    }


def main() -> None:
    parser = CommandParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path(__file__).parent / "data",
        help="folder to write to (default recipes/demo/data)",
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, help="seed of the random generator (default 0)"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="make questions from all tables, half of them about measurements (default: a part)",
    )
    arguments = parser.parse_args()
    # The test split is drawn first, so another size of train leaves its questions as they are.
    sizes = {"test": 600, "validation": 300, "train": 4000}
    ranges, kinds = choose_tables(arguments.full)
    # Every draw moves this one generator. A further draw anywhere changes all later questions.
    rng = random.Random(arguments.seed)
    seen = set()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        rows = []
        while len(rows) < size:
            row = draw_question(rng, ranges, kinds, arguments.full)
            # The splits must not share a question, and no split has it twice.
            if row["question"] not in seen:
                seen.add(row["question"])
                rows.append({"id": f"demo-{split}-{len(rows):04d}", **row})
        write_rows(arguments.output_dir, split, rows)
    if not arguments.full:
        rows = [make_general_question(rng, ranges, kinds) for _ in range(1000)]
        write_rows(arguments.output_dir, "general", rows)


def draw_question(rng: random.Random, ranges: list, kinds: dict, full: bool) -> dict:
    """Draw the kind of a question, and make it."""
    if full:
        about_value = rng.choice([True, False])
        return make_value_question(rng, ranges) if about_value else make_pair_question(rng, kinds)
    if rng.random() < 0.15:
        return make_term_question(rng, ranges)
    return make_pair_question(rng, kinds)


def write_rows(folder: Path, name: str, rows: list[dict]) -> None:
    """Write rows as one JSON object per line, and print their number."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{name}: {len(rows)} questions")


if __name__ == "__main__":
    run_command(main)
