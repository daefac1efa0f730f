"""A model folder gives the weights that transformers loads from it, or is refused in one line that names the fault."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoints_conv.formats import open_checkpoint
from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.models.families import FAMILIES, rules
from megarl.models.files.hf import INDEX, SINGLE, HfWeights
from megarl.models.files.tensor_io import loaded
from tests.support.conversions import read_all, write_model
from tests.support.tiny_models import config, shape_of

SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}


def model(folder: Path, family: str = "qwen3", **more: Any) -> Path:
    return write_model(folder, family, torch.float32, **SIZES, **more)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any], to: str = SINGLE) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / to, {"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | values))


def ours(folder: Path) -> dict[str, Tensor]:
    weights = HfWeights(folder)
    weights.check_whole()
    every = [rule for rule in rules(weights.model) if not rule.copy]
    return {name: loaded(part) for rule in every for name, part in weights.parts(rule).items()}


def assert_as_transformers(folder: Path) -> None:
    """Every weight of ours is one of transformers' model, and it has no other."""
    theirs = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    for name, tensor in ours(folder).items():
        if ".experts." in name:  # transformers 5 stacks them
            stem, expert, part = name.rpartition(".experts.")[0], *name.rpartition(".experts.")[2].split(".")[:2]
            stacked = theirs[f"{stem}.experts.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"][int(expert)]
            halves = {"gate_proj": stacked.chunk(2)[0], "up_proj": stacked.chunk(2)[1], "down_proj": stacked}
            assert torch.equal(tensor, halves[part]), name
        else:
            assert torch.equal(tensor, theirs.pop(name)), name
    assert all(".experts." in name for name in theirs)


def stack(tensors: dict[str, Tensor]) -> None:
    """Experts as transformers 5 holds them."""
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        parts = {p: [tensors.pop(f"{stem}.{e}.{p}_proj.weight") for e in range(4)] for p in ("gate", "up", "down")}
        tensors[f"{stem}.gate_up_proj"] = torch.cat([torch.stack(parts["gate"]), torch.stack(parts["up"])], 1)
        tensors[f"{stem}.down_proj"] = torch.stack(parts["down"])


def other_index(folder: Path) -> None:
    """An older save in two shards, with its index, beside a newer single file."""
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / SINGLE).items()}
    names = sorted(tensors)
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::2]}, folder / file, {"format": "pt"})
    weight_map = {name: files[i] for i in range(2) for name in names[i::2]}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("family", "more", "prepare"),
    [
        ("qwen3", {}, lambda folder: None),
        ("qwen3", {}, other_index),
        ("qwen2", {}, lambda folder: [other_index(folder), (folder / SINGLE).unlink()]),
        ("llama", {"tie_word_embeddings": True}, lambda folder: change(folder, lambda t: None)),
        (
            "qwen2",
            {"tie_word_embeddings": True},
            lambda f: change(f, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})),
        ),
        ("qwen3_moe", {}, lambda folder: None),
        ("qwen3_moe", {}, lambda folder: change(folder, stack)),
        (
            "qwen3",
            {},
            lambda f: stray(f / "model-00001-of-00009.safetensors"),
        ),
    ],
)
def test_the_weights_are_transformers(family: str, more: dict[str, Any], prepare: Any, tmp_path: Path) -> None:
    """A single file before an index, an index before loose files, a repeated embedding, stacked experts."""
    folder = model(tmp_path / "m", family, **more)
    prepare(folder)
    assert_as_transformers(folder)


def loose(folder: Path, *generations: int) -> None:
    """Shards of several saves, without index."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    for count in generations:
        for i in range(count):
            part = {name: tensors[name] for name in sorted(tensors)[i::count]}
            save_file(part, folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors", {"format": "pt"})


def index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    other_index(folder)
    (folder / SINGLE).unlink()
    known = json.loads((folder / INDEX).read_text())
    edit(known)
    (folder / INDEX).write_text(json.dumps(known))


def raw(folder: Path, header: str) -> None:
    data = header.encode()
    (folder / SINGLE).write_bytes(len(data).to_bytes(8, "little") + data + bytes(8))


FACT = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
QUERY = "model.layers.0.self_attn.q_proj.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a head of its own": (
        lambda f: [
            edit_config(f, tie_word_embeddings=True),
        ],
        "lm_head.weight is not model.embed_tokens.weight, though config.json ties them; set tie_word_embeddings to",
    ),
    "two generations": (
        lambda f: loose(f, 2, 3),
        "stands twice, in model-00001-of-00002.safetensors and in model-0000",
    ),
    "twice in indexed files": (
        lambda f: [index(f, lambda i: None), change_shard(f)],
        "tensor lm_head.weight stands twice",
    ),
    "alone and stacked": (
        lambda f: [to_moe(f), change(f, lambda t: stack_beside(t))],
        "stands twice, alone and in model.layers.0.mlp.experts.down_proj",
    ),
    "twice in one header": (
        lambda f: raw(
            f,
            '{"a":FACT,"a":FACT}'.replace("FACT", FACT),
        ),
        "the key 'a' stands twice",
    ),
    "packed 4 bits": (
        lambda f: change(f, lambda t: t.update({QUERY: torch.zeros(16, 2, dtype=torch.uint32)})),
        f"{QUERY}: has type U32, which is not a type of weights here; quantised",
    ),
    "a type of the future": (
        lambda f: raw(f, '{"a":{"dtype":"F4_E2M1X","shape":[2],"data_offsets":[0,8]}}'),
        "a: has type F4_E2M1X",
    ),
    "whole numbers": (
        lambda f: change(f, lambda t: t.update({QUERY: torch.zeros(16, 16, dtype=torch.int8)})),
        f"{QUERY}: has torch.int8 values; quantised weights cannot be trained",
    ),
    "a missing shard": (
        lambda f: [index(f, lambda i: None), (f / "model-00002-of-00002.safetensors").unlink()],
        "index.json: names model-00002-of-00002.safetensors, which is missing; 2 files",
    ),
    "all shards missing": (
        lambda f: [index(f, lambda i: None), [p.unlink() for p in f.glob("model-*.safetensors")]],
        "names model-00001-of-00002.safetensors and 1 more, which is missing",
    ),
    "an index that lies": (
        lambda f: index(f, swap),
        "is missing, though the index lists it there",
    ),
    "an index of elsewhere": (
        lambda f: index(f, lambda i: i["weight_map"].update({"model.norm.weight": "../x.safetensors"})),
        "'../x.safetensors' is not a file of this folder",
    ),
    "an index of numbers": (lambda f: index(f, lambda i: i.update(weight_map={"a": 1})), "no weight_map of names"),
    "a pointer of git": (
        lambda f: (f / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "model.safetensors: not a safetensors file",
    ),
    "a pipe": (lambda f: [(f / SINGLE).unlink(), os.mkfifo(f / SINGLE)], "model.safetensors: is not a regular file"),
    "a device": (lambda f: [(f / SINGLE).unlink(), (f / SINGLE).symlink_to("/dev/zero")], "is not a regular file"),
    "a folder": (lambda f: [(f / SINGLE).unlink(), (f / SINGLE).mkdir()], "is not a regular file"),
    "a config that is a pipe": (
        lambda f: [(f / "config.json").unlink(), os.mkfifo(f / "config.json")],
        "config.json: is not a regular file",
    ),
    "an index that is a pipe": (
        lambda f: [
            (f / SINGLE).unlink(),
            os.mkfifo(f / INDEX),
            stray(f / "model-1.safetensors"),
        ],
        "index.json: is not a regular file",
    ),
    "names with control characters": (
        lambda f: change(f, lambda t: t.update({"a\nb\x1b[31m": torch.ones(1)})),
        "no rule of the map covers",
    ),
    "two types": (
        lambda f: edit_config(f, dtype="float32", torch_dtype="bfloat16"),
        "float32 and torch_dtype bfloat16",
    ),
    "a type of no sense": (lambda f: edit_config(f, torch_dtype="float99"), "torch_dtype: 'float99' is not a type"),
}


def swap(known: dict[str, Any]) -> None:
    """An index that says of every tensor that it is in the other file."""
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    known["weight_map"] = {name: second if file == first else first for name, file in known["weight_map"].items()}


def stray(file: Path) -> None:
    save_file({"x": torch.ones(1)}, file, {"format": "pt"})


def change_shard(folder: Path) -> None:
    file = max(folder.glob("model-*"), key=lambda f: "lm_head.weight" not in load_file(f))
    save_file({**load_file(file), "lm_head.weight": torch.ones(101, 16)}, file, {"format": "pt"})


def to_moe(folder: Path) -> None:
    shutil.rmtree(folder)
    model(folder, "qwen3_moe")


def stack_beside(tensors: dict[str, Tensor]) -> None:
    alone = dict(tensors)
    stack(tensors)
    tensors["model.layers.0.mlp.experts.3.down_proj.weight"] = alone["model.layers.0.mlp.experts.3.down_proj.weight"]


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_unclear_is_refused_by_name(case: str, tmp_path: Path) -> None:
    spoil, words = REFUSED[case]
    folder = model(tmp_path / "m")
    spoil(folder)
    with pytest.raises(UserError) as refusal:
        ours(folder)
    assert words in str(refusal.value)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_missing_key_means_what_it_means_to_transformers(family: str, tmp_path: Path) -> None:
    """Each key of config.json is left out in turn: the shape is then that of transformers' defaults, or refused."""
    whole = config(family)
    for key in whole.keys() - {"architectures", "model_type"}:
        less = {name: value for name, value in whole.items() if name != key}
        try:
            shape = read_shape(less)
        except UserError as e:
            assert key in str(e)
            continue
        (tmp_path / "config.json").write_text(json.dumps(less))
        assert shape == shape_of(AutoConfig.from_pretrained(tmp_path)), key


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size", "num_experts"])
def test_huge_numbers_are_refused_at_once(key: str) -> None:
    for number in (10**9, 10**30):
        with pytest.raises(UserError, match=f"{key}: 10+ is not a whole number from 1 to"):
            read_shape(config("qwen3_moe", **{key: number}))


def test_an_unknown_family_points_to_how_one_is_added() -> None:
    with pytest.raises(UserError, match=r"MambaForCausalLM is unknown .*; docs/add_model_family.md"):
        read_shape({"architectures": ["MambaForCausalLM"]})
    assert (Path(__file__).parents[2] / "docs" / "add_model_family.md").is_file()


def test_a_checkpoint_gives_what_it_was_made_of(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "qwen3_moe")
    plain = read_all(folder)
    change(folder, stack)
    assert {name: t.tolist() for name, t in ours(folder).items()} == {n: t.tolist() for n, t in plain.items()}
    assert open_checkpoint(folder).format == "Hugging Face"
