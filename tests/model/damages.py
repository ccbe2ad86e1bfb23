"""Damaged and odd model, adapter and tokenizer folders, made from whole ones.

Each damage is a name and a function that changes a folder.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Damage = tuple[str, Callable[[Path], None]]
# Values that are wrong for nearly every key of a JSON file. Python also writes NaN, which is no
# JSON.
ODD = (None, True, -1, 0.5, 2**70, 1e308, float("nan"), "odd", [], {}, ["\ud800"])
# Some of them are right values of another model, which nothing in the folder contradicts.
PLAUSIBLE = {
    "adapter_config.json has lora_alpha 0.5",
    "adapter_config.json has use_rslora True",
    "config.json has rms_norm_eps 0.5",
    "medqlora.json is missing",  # That is an adapter of another program.
}
DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000


def change_key(file: str, keys: tuple, value) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tree = json.loads((folder / file).read_text())
        place = tree
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        (folder / file).write_text(json.dumps(tree))

    return change


def drop_key(file: str, key: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        tree = json.loads((folder / file).read_text())
        del tree[key]
        (folder / file).write_text(json.dumps(tree))

    return drop


def write(file: str, content: bytes | str) -> Callable[[Path], None]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / file).write_bytes(data) and None


def change_bytes(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes())) and None


def change_tensors(file: str, change: Callable[[dict], dict | None]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        weights = load_file(folder / file)
        save_file(change(weights) or weights, folder / file, {"format": "pt"})

    return save


def damage_json(file: str) -> Iterator[Damage]:
    """Damages that any file of a JSON object may have."""
    contents = {
        "empty": "",
        "a list": "[]",
        "a number": "1",
        "null": "null",
        "cut": '{"a": 1',
        "deep": DEEP,
        "no UTF-8": b'{"a": "\xff"}',
        "a number of 5,000 digits": '{"a": ' + "9" * 5_000 + "}",
        "zeros": b"\0" * 64,
        "an empty object": "{}",
    }
    for name, content in contents.items():
        yield f"{file} holds {name}", write(file, content)
    yield f"{file} is a folder", lambda folder: turn_into_folder(folder / file)
    yield f"{file} leads to itself", lambda folder: turn_into_loop(folder / file)
    yield f"{file} leads nowhere", lambda folder: turn_into_link(folder / file)
    yield f"{file} is missing", lambda folder: (folder / file).unlink()


def turn_into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def turn_into_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def turn_into_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def damage_weights(file: str) -> Iterator[Damage]:
    """Damages that any safetensors file may have."""

    def flip(position: int) -> Callable[[bytes], bytes]:
        return lambda data: bytes(
            byte ^ (64 if number == position else 0) for number, byte in enumerate(data)
        )

    def set_length(length: int) -> Callable[[bytes], bytes]:
        return lambda data: struct.pack("<Q", length) + data[8:]

    changes = {
        "is empty": lambda data: b"",
        "is cut in the header": lambda data: data[:100],
        "is cut in half": lambda data: data[: len(data) // 2],
        "lacks a byte": lambda data: data[:-1],
        "has a byte more": lambda data: data + b"\0",
        "has a header of length 0": set_length(0),
        "has a header of length 2^63": set_length(2**63),
        "has a longer header": lambda data: (
            struct.pack("<Q", struct.unpack("<Q", data[:8])[0] + 8) + data[8:]
        ),
        "has a bit of the header flipped": flip(60),
        "has a bit of its length flipped": flip(1),
        "is text": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
        "is all zeros": lambda data: b"\0" * len(data),
    }
    for name, change in changes.items():
        yield f"{file} {name}", change_bytes(file, change)
    yield f"{file} is a folder", lambda folder: turn_into_folder(folder / file)
    yield f"{file} leads to itself", lambda folder: turn_into_loop(folder / file)
    yield f"{file} is missing", lambda folder: (folder / file).unlink()
    values = {"NaN": float("nan"), "inf": float("inf")}
    for name, value in values.items():

        def spoil(weights: dict, value: float = value) -> None:
            weights[sorted(weights)[-1]].view(-1)[0] = value

        yield f"{file} holds {name}", change_tensors(file, spoil)

    def drop(weights: dict) -> None:
        weights.pop(sorted(weights)[-2])

    def rename(weights: dict) -> None:
        weights["other.weight"] = weights.pop(sorted(weights)[-2])

    def shrink(weights: dict) -> dict:
        name = sorted(weights)[-2]
        return weights | {name: weights[name][:-1].clone()}

    def flatten(weights: dict) -> dict:
        name = sorted(weights)[-2]
        return weights | {name: weights[name].flatten()}

    def to_integers(weights: dict) -> dict:
        return {name: tensor.to(torch.int32) for name, tensor in weights.items()}

    def to_bytes(weights: dict) -> dict:
        return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}

    yield f"{file} lacks a tensor", change_tensors(file, drop)
    yield f"{file} has a renamed tensor", change_tensors(file, rename)
    yield f"{file} has a shorter tensor", change_tensors(file, shrink)
    yield f"{file} has a flat tensor", change_tensors(file, flatten)
    yield f"{file} holds integers", change_tensors(file, to_integers)
    yield f"{file} holds 8-bit numbers", change_tensors(file, to_bytes)
    yield f"{file} holds nothing", change_tensors(file, lambda weights: {"a": torch.zeros(1)})


def damage_keys(file: str, folder: Path, values=ODD) -> Iterator[Damage]:
    """Every key of a JSON file with every odd value, and without the key."""
    tree = json.loads((folder / file).read_text())
    for key in tree:
        for value in values:
            yield f"{file} has {key} {value!r}", change_key(file, (key,), value)
        yield f"{file} lacks {key}", drop_key(file, key)


def damage_index(folder: Path) -> Iterator[Damage]:
    file = "model.safetensors.index.json"
    tree = json.loads((folder / file).read_text())
    first = sorted(tree["weight_map"])[0]
    homes = sorted(set(tree["weight_map"].values()))
    other = homes[0] if tree["weight_map"][first] != homes[0] else homes[1]
    elsewhere = ("../model.safetensors", "/etc/passwd", "nowhere.safetensors", "config.json", ".")
    for value in (*elsewhere, "", 1, None, [], other):
        yield f"{file} says {value!r}", change_key(file, ("weight_map", first), value)
    for value in (None, [], "x", {}, 1):
        yield f"{file} has weight_map {value!r}", change_key(file, ("weight_map",), value)
    yield f"{file} lacks weight_map", drop_key(file, "weight_map")
    unknown = change_key(file, ("weight_map", "x.weight"), homes[0])
    yield f"{file} names a tensor of no file", unknown

    def duplicate(folder: Path) -> None:
        one, two = (load_file(folder / home) for home in homes[:2])
        name = sorted(one)[0]
        save_file(two | {name: one[name] + 1}, folder / homes[1], {"format": "pt"})

    yield "a tensor stands in two files", duplicate
    yield "a file of the index is missing", lambda folder: (folder / homes[1]).unlink()
    yield "a file of the index is cut", change_bytes(homes[1], lambda data: data[:-9])

    def add_single(folder: Path) -> None:
        os.link(folder / homes[0], folder / "model.safetensors")

    yield "an index and a single file", add_single


TEMPLATES = {
    "does not parse": "{% for",
    "is unknown": "{% nonsense %}",
    "raises": "{{ raise_exception('no') }}",
    "adds text to numbers": "{{ 1 + 'a' }}",
    "reads what is not there": "{{ messages[9].content.x }}",
    "calls itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "reaches outside": "{{ ''.__class__.__mro__ }}",
    "loops too far": "{% for i in range(10**9) %}{% endfor %}",
    "loops for ever": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "writes nothing": "",
    "writes one text": "hello",
    "repeats": "{% for m in messages %}{{ m.content * 2 }}{% endfor %}",
    "includes": "{% include '/etc/passwd' %}",
}


def damage_tokenizer(folder: Path) -> Iterator[Damage]:
    yield from damage_json("tokenizer.json")
    yield from damage_json("tokenizer_config.json")
    settings = "tokenizer_config.json"
    values = (None, True, -1, 2**70, 0.5, "odd", [], {}, ["\ud800"])
    yield from damage_keys(settings, folder, values)
    yield from damage_keys("tokenizer.json", folder, (None, 1, "odd", [], {}))
    for key in ("vocab", "merges", "type"):
        for value in (None, 1, "odd", [], {}, {"a": -1}, {"a": 2**70}, [["a"]]):
            change = change_key("tokenizer.json", ("model", key), value)
            yield f"tokenizer.json has model.{key} {value!r}", change
    for name, template in TEMPLATES.items():
        change = write("chat_template.jinja", template)
        yield f"the chat template {name}", change
    for value in (1, [], {}, True, [1], [{"name": "a"}], "\ud800"):
        yield f"chat_template {value!r}", change_key(settings, ("chat_template",), value)
    yield "the chat template is no UTF-8", write("chat_template.jinja", b"\xff\xfe")
    yield "the chat template is a folder", lambda folder: (folder / "chat_template.jinja").mkdir()
