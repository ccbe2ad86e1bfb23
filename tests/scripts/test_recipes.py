"""Every configuration file loads and is complete."""

import pytest
import yaml
from conftest import ROOT

from medqlora.batches.budgets import list_budgets
from medqlora.core.config_loading import load_config

CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
ACCELERATE = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def test_there_are_some():
    assert len(CONFIGS) >= 6
    assert len(ACCELERATE) >= 3


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


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_files_are_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).mixed_precision == "no"
