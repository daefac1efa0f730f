"""Every file of a model or a checkpoint, damaged in any way, is read whole or refused on one line."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from checkpoints_conv.classic import ClassicWriter
from checkpoints_conv.formats import open_checkpoint
from checkpoints_conv.torch_dist import TorchDistWriter
from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.models.families import rules
from megarl.models.files.tensor_io import loaded
from megarl.models.layout import Layout
from megarl.models.shape import ModelShape
from megarl.rollout.detokenize import end_ids
from tests.support.conversions import convert_folder, read_all, write_model
from tests.support.damage import damaged_bytes, damaged_json

SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}


class Kind(NamedTuple):
    file: Path
    read: Callable[[], Any]
    json: bool = False


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """Each kind of file, in a folder of its own, and what reads it as the commands do."""
    root = tmp_path_factory.mktemp("kinds")
    model = write_model(root / "model", "qwen3_moe", **SIZES)
    shards = write_model(root / "shards", "qwen2", files=3, **SIZES)
    pickled = write_model(root / "pickled", "llama", **SIZES)
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6, "top_k": 20}')
    torch.save(read_all(pickled), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    shape = read_shape(model)
    convert_folder(model, root / "dist", TorchDistWriter(shape))
    convert_folder(model, root / "classic", ClassicWriter(shape, Layout(tp=2)))
    release, rank = root / "dist" / "release", root / "classic" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    return {
        "config.json": Kind(model / "config.json", lambda: shape_and_rules(model), json=True),
        "safetensors": Kind(model / "model.safetensors", lambda: everything(model)),
        "index": Kind(shards / "model.safetensors.index.json", lambda: everything(shards), json=True),
        "bin": Kind(pickled / "pytorch_model.bin", lambda: everything(pickled, allow_pickle=True)),
        "metadata": Kind(release / ".metadata", lambda: everything(root / "dist")),
        "distcp": Kind(release / "__1_0.distcp", lambda: everything(root / "dist")),
        "classic": Kind(rank, lambda: everything(root / "classic")),
        "common": Kind(release / "common.pt", lambda: read_common(release)),
        "generation_config.json": Kind(
            model / "generation_config.json", lambda: end_ids(model / "generation_config.json"), json=True
        ),
        "tracker": Kind(root / "dist" / "latest_checkpointed_iteration.txt", lambda: everything(root / "dist")),
    }


def everything(folder: Path, **options: Any) -> None:
    checkpoint = open_checkpoint(folder, **options)
    checkpoint.check_whole()
    for rule in rules(checkpoint.model):
        if not rule.copy:
            for values in checkpoint.parts(rule).values():
                loaded(values)


def shape_and_rules(folder: Path) -> ModelShape:
    shape = read_shape(folder)
    rules(shape)
    return shape


def read_common(folder: Path) -> Any:
    from megarl.learner.checkpoint_reader import read_common

    return read_common(folder)


def fuzz(kind: Kind, seeds: range) -> int:
    """How many of the damaged files were refused. Everything but a UserError of one line fails."""
    whole, refused = kind.file.read_bytes(), 0
    try:
        for seed in seeds:
            damage = damaged_json if kind.json and seed % 2 else damaged_bytes
            kind.file.write_bytes(damage(whole, seed))
            try:
                kind.read()
            except UserError as e:
                assert str(e) and str(e).isprintable() and len(str(e)) < 1500, f"seed {seed}: {e!r}"
                refused += 1
            except BaseException as e:
                raise AssertionError(f"{kind.file.name}, seed {seed}: {type(e).__name__}: {e}") from e
    finally:
        kind.file.write_bytes(whole)
    return refused


NAMES = (
    "config.json", "generation_config.json", "safetensors", "index", "bin", "metadata", "distcp", "classic", "common",
    "tracker",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_read_or_refused_on_one_line(kinds: dict[str, Kind], name: str) -> None:
    """A few seeds of each kind: those of the long test below, which found every fault here at least once."""
    assert fuzz(kinds[name], range(20)) > 4


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_much_damage_is_read_or_refused_on_one_line(kinds: dict[str, Kind], name: str) -> None:
    """Together with the tokenizer's files more than 5,000 inputs. Peak memory rises by less than 1 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert fuzz(kinds[name], range(1000, 1600)) > 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KB
