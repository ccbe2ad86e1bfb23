"""The folders of MedQA and PubMedQA are read as their authors publish them."""

import json

import pytest
from conftest import real

from medqlora.batches.entries import check_entries
from medqlora.core.config import Data, DataEntry
from medqlora.data.examples import DataError
from medqlora.data.reading import read_entry

LETTERS = "ABCDE"
SPLITS = {"train": 6, "dev": 3, "test": 4}  # questions


def question(number, options):
    texts = [f"option {letter} of {number}" for letter in LETTERS[:options]]
    return {
        "question": f"Question {number} of a case?",
        "answer": texts[number % options],
        "options": dict(zip(LETTERS, texts, strict=False)),
        "meta_info": "step1",
        "answer_idx": LETTERS[number % options],
    }


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def medqa(tmp_path):
    """MedQA's download: each question with 5 options, and with 4 and the phrases of MetaMap."""
    home = tmp_path / "data_clean" / "questions" / "US"
    for split, count in SPLITS.items():
        write_lines(home / f"{split}.jsonl", [question(i, 5) for i in range(count)])
        rows = [question(i, 4) | {"metamap_phrases": ["case"]} for i in range(count)]
        write_lines(home / "4_options" / f"phrases_no_exclude_{split}.jsonl", rows)
    write_lines(home / "US_qbank.jsonl", [question(i, 5) for i in range(13)])
    write_lines(home / "metamap_extracted_phrases" / "train" / "phrases_train.jsonl", [{"a": 1}])
    book = tmp_path / "data_clean" / "textbooks" / "en" / "Anatomy_Gray.txt"
    book.parent.mkdir(parents=True)
    book.write_text("The femur is a bone.")
    return tmp_path


@pytest.mark.parametrize("folder", ["", "data_clean", "data_clean/questions/US"])
@pytest.mark.parametrize("options", [4, 5])
def test_medqa_takes_the_form_that_is_named(medqa, folder, options):
    entry = DataEntry(format="medqa", path=str(medqa / folder), subset=f"{options}_options")
    for split, count in SPLITS.items():
        reading = read_entry(entry, "validation" if split == "dev" else split)
        assert len(reading.examples) == count
        assert {len(example.options) for example in reading.examples} == {options}


def test_medqa_never_guesses_the_number_of_options(medqa):
    entry = DataEntry(format="medqa", path=str(medqa / "data_clean"))
    with pytest.raises(DataError, match=r"with 4 options and with 5, .* subset to 4_options"):
        read_entry(entry, "train")
    with pytest.raises(DataError, match="subset 3_options is neither"):
        read_entry(entry.model_copy(update={"subset": "3_options"}), "train")
    # One form alone needs no name, and a split that it lacks is not taken from the other.
    four = medqa / "data_clean" / "questions" / "US" / "4_options"
    alone = DataEntry(format="medqa", path=str(four))
    assert len(read_entry(alone, "validation").examples) == SPLITS["dev"]
    (four / "phrases_no_exclude_test.jsonl").unlink()
    named = entry.model_copy(update={"subset": "4_options"})
    for entry in (alone, named):
        with pytest.raises(DataError, match=r"has (none|no 4_options/phrases)"):
            read_entry(entry, "test")
    with pytest.raises(DataError, match="has none for split train"):
        read_entry(alone.model_copy(update={"subset": "5_options"}), "train")


def test_one_download_serves_all_roles_of_a_recipe(medqa):
    entry = DataEntry(format="medqa", path=str(medqa / "data_clean"), subset="4_options")
    check_entries(Data(train=[entry], eval=[entry], test=[entry]))
    trained = entry.model_copy(update={"split": "test"})
    with pytest.raises(DataError, match="is the same data as"):
        check_entries(Data(train=[trained], test=[entry]))


def pubmed(number):
    return {
        "QUESTION": f"Does treatment {number} help?",
        "CONTEXTS": [f"Trial {number}."],
        "final_decision": ("yes", "no", "maybe")[number % 3],
        "LONG_ANSWER": "It depends.",
    }


@pytest.fixture
def pubmedqa(tmp_path):
    """PubMedQA's repository after its script has divided the data; even PMIDs are the test."""
    data = tmp_path / "data"
    rows = {str(number): pubmed(number) for number in range(1000)}
    test = {pmid: row for pmid, row in rows.items() if int(pmid) % 2 == 0}
    files = {
        "ori_pqal.json": rows,
        "ori_pqaa.json": {str(number): pubmed(number) for number in range(2000, 2600)},
        "test_ground_truth.json": {pmid: row["final_decision"] for pmid, row in test.items()},
        "test_set.json": test,
        "pqal_fold0/train_set.json": {str(n): pubmed(n) for n in range(101, 1000, 2)},
        "pqal_fold0/dev_set.json": {str(n): pubmed(n) for n in range(1, 100, 2)},
    }
    for name, content in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("folder", ["", "data"])
def test_pubmedqa_divides_its_folder_by_the_official_list(pubmedqa, folder):
    entry = DataEntry(format="pubmedqa", path=str(pubmedqa / folder))
    test = read_entry(entry, "test")
    assert [int(example.id) for example in test.examples] == list(range(0, 1000, 2))
    train = read_entry(entry, "train")
    assert [int(example.id) for example in train.examples] == list(range(1, 1000, 2))
    artificial = entry.model_copy(update={"subset": "pqa_artificial"})
    assert len(read_entry(artificial, "train").examples) == 600
    with pytest.raises(DataError, match=r"none of the 600 rows belongs to split test"):
        read_entry(artificial, "test")
    check_entries(Data(train=[entry, artificial], test=[entry]))


def test_a_fold_of_pubmedqa_has_its_own_training_and_the_official_test(pubmedqa):
    entry = DataEntry(format="pubmedqa", path=str(pubmedqa / "data" / "pqal_fold0"))
    counts = {split: len(read_entry(entry, split).examples) for split in ("train", "validation")}
    assert counts == {"train": 450, "validation": 50}
    assert len(read_entry(entry, "test").examples) == 500
    # A test question that got into a fold is left out of its training.
    path = pubmedqa / "data" / "pqal_fold0" / "train_set.json"
    path.write_text(json.dumps({"2": pubmed(2), "3": pubmed(3)}))
    assert [example.id for example in read_entry(entry, "train").examples] == ["3"]


def test_a_set_of_pubmedqa_that_is_not_there_is_named(pubmedqa):
    entry = DataEntry(format="pubmedqa", path=str(pubmedqa), subset="pqa_unlabeled")
    with pytest.raises(DataError, match="has the sets pqa_labeled, pqa_artificial, not pqa_unl"):
        read_entry(entry, "train")


def test_real_questions_in_the_published_layout(tmp_path):
    four = tmp_path / "questions" / "US" / "4_options"
    four.mkdir(parents=True)
    (four / "phrases_no_exclude_dev.jsonl").symlink_to(real("medqa/dev_4_options.jsonl"))
    (four.parent / "dev.jsonl").symlink_to(real("medqa/dev_5_options.jsonl"))
    for subset, options in (("4_options", 4), ("5_options", 5)):
        entry = DataEntry(format="medqa", path=str(tmp_path), subset=subset)
        reading = read_entry(entry, "validation")
        assert len(reading.examples) == 1272
        assert {len(example.options) for example in reading.examples} == {options}
