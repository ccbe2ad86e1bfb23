"""Every configuration file loads and is complete."""

import pytest
import yaml
from conftest import ROOT

from medqlora.batches.budgets import list_budgets
from medqlora.core.config_loading import load_config
from medqlora.training.stages import read_stages

# A search file names a recipe and a space; tests/training/test_search.py reads those.
FILES = [
    path
    for path in sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
    if not path.name.startswith("search_")
]
STAGES = [path for path in FILES if path.stem.endswith("_stages")]
CONFIGS = [path for path in FILES if path not in STAGES]
ACCELERATE = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def test_there_are_some():
    assert len(CONFIGS) >= 6
    assert len(ACCELERATE) >= 3
    assert len(STAGES) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_loads_and_its_arithmetic_works(path):
    config = load_config(path)
    assert config.data.train
    for ranks in (1, 2, 3, 4, 8):
        assert list_budgets(config.training, config.data.max_length, ranks)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_states_only_what_differs(path):
    """A value equal to the default is noise that hides the ones that matter."""
    from medqlora.core.config import Config

    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, section in tree.items():
        fields = Config.model_fields[name].annotation.model_fields
        for key, value in section.items():
            assert fields[key].is_required() or fields[key].default != value, (
                f"{name}.{key} is the default"
            )


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_the_stages_of_a_list_agree(path, tmp_path):
    """Only the data are put in their place here, which everybody fetches for himself."""
    flags = []
    for stage in yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]:
        config = stage["config"]
        if isinstance(config, str):
            config = yaml.safe_load((path.parent / config).read_text(encoding="utf-8"))
        for role in ("train", "eval", "test"):
            for index, entry in enumerate(config["data"].get(role, [])):
                suffix = "txt" if entry["format"] == "text" else "jsonl"
                data = tmp_path / f"{stage['name']}-{role}-{index}.{suffix}"
                data.touch()
                flags += [f"--{stage['name']}.data.{role}.{index}.path", str(data)]
    first, second = read_stages(path, flags, tmp_path / "run")
    assert second.config.lora.init_adapter == str(first.adapter)
    assert first.config.lora.init_adapter is None


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_files_are_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).mixed_precision == "no"
