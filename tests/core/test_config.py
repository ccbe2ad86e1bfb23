import pytest
import yaml

from medqlora.core.config import Config
from medqlora.core.config_loading import all_keys, dump_config, help_text, load_config
from medqlora.core.errors import ConfigError, RunError
from medqlora.core.run_folder import check_run

BASE = "model:\n  base: x\n"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return path

    return write


def test_defaults_and_overrides(write):
    config = load_config(
        write(BASE + "training:\n  lr: 1e-4\n"), ["--training.seed", "3", "--lora.r=8"]
    )
    assert (config.training.lr, config.training.seed, config.lora.r) == (1e-4, 3, 8)


def test_resolved_config_is_valid_input(write, tmp_path):
    config = load_config(
        write(BASE + "data:\n  train: [{format: medqa, path: ./a.jsonl, weight: 2}]\n")
    )
    saved = tmp_path / "resolved.yaml"
    saved.write_text(dump_config(config))
    assert load_config(saved) == config
    assert config.data.train[0].path == str((tmp_path / "a.jsonl").resolve())


@pytest.mark.parametrize(
    ("text", "flags", "parts"),
    [
        (
            BASE + "training:\n  lrr: 1\n",
            [],
            ["c.yaml line 4", "training.lrr", "did you mean training.lr?"],
        ),
        (BASE + "lr: 1\n", [], ["line 3", "unknown key lr", "training.lr"]),
        (BASE + "training:\n  lr: fast\n", [], ["line 4", "training.lr", "'fast'", "number"]),
        ("model:\n  base: x\n  quantization: nf5\n", [], ["line 3", "nf5", "'nf4'"]),
        (
            BASE + "data:\n  train:\n  - format: medqa\n    paht: y\n",
            [],
            ["line 6", "data.train.0.paht", "path"],
        ),
        (BASE, ["--training.lrr", "1"], ["--training.lrr", "did you mean training.lr"]),
        (BASE, ["--training.lr", "abc"], ["--training.lr", "'abc'"]),
        (BASE, ["--training.lr", "true"], ["--training.lr", "true and false are no values"]),
        (BASE + "data: {max_length: yes}\n", [], ["line 3", "data.max_length", "true and false"]),
        (BASE, ["--training.lr", ".nan"], ["--training.lr", "finite number"]),
        (BASE, ["--training.lr"], ["no value"]),
        (BASE, ["lr"], ["expected --section.key VALUE"]),
        (BASE, ["--data.max_length", "9999"], ["max_tokens_per_batch"]),
        (BASE, ["--training.gradient_checkpointing", "every_0"], ["every_K"]),
        (BASE, ["--model.base.x", "1"], ["is a value"]),
        (BASE + "data: {train: []}\n", ["--data.train.0.format", "medqa"], ["index"]),
        ("lora: {r: 3}\n", [], ["model is missing"]),
        ("model: {base: [x\n", [], ["not valid YAML"]),
        ("- a\n", [], ["expected keys with values"]),
        (BASE + "data:\n  train: [{format: qa, path: a, share: 0.2}]\n", [], ["share"]),
        (BASE, ["--lora.variant", "dora", "--model.quantization", "int8"], ["dora", "int8"]),
        (BASE + "training: {early_stopping_patience: 2}\n", [], ["eval_steps"]),
    ],
)
def test_mistakes_are_one_clear_line(write, text, flags, parts):
    with pytest.raises(ConfigError) as error:
        load_config(write(text), flags)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_missing_file():
    with pytest.raises(ConfigError, match="No such file"):
        load_config("/nowhere/c.yaml")


def test_config_is_frozen(write):
    config = load_config(write(BASE))
    with pytest.raises(ValueError, match="frozen"):
        config.training.lr = 1.0


def test_help_names_every_key_with_a_meaning():
    text = help_text()
    for key, field in all_keys().items():
        assert f"--{key}" in text
        assert field.description, f"{key} has no docstring"


def test_dump_is_plain_yaml(write):
    tree = yaml.safe_load(dump_config(load_config(write(BASE))))
    assert set(tree) == set(Config.model_fields)


def test_a_run_of_an_older_version_can_be_resumed(write, tmp_path):
    """Its config.yaml lacks the keys that came later; what it did is their default."""
    config = load_config(
        write(BASE + "data:\n  train: [{format: medqa, path: a.jsonl}]\n"),
        ["--model.base", "./base"],
    )
    tree = yaml.safe_load(dump_config(config))
    del tree["training"]["deterministic"], tree["lora"]["variant"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(tree))
    check_run(tmp_path / "run", config, resume=True)
    other = config.model_copy(
        update={"training": config.training.model_copy(update={"deterministic": True})}
    )
    with pytest.raises(RunError, match=r"training.deterministic was False"):
        check_run(tmp_path / "run", other, resume=True)
