"""Conversion between formats: byte-identical, whole or absent, resumable, and refusing what it cannot do."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_conv.classic import ClassicWriter
from checkpoints_conv.convert import convert, plan
from checkpoints_conv.formats import open_checkpoint
from checkpoints_conv.hf_writer import HfWriter
from checkpoints_conv.torch_dist import TorchDistWriter
from checkpoints_conv.unit import Writer
from checkpoints_conv.verify import compare, misplaced
from megarl.errors import UserError
from megarl.models.families import rules
from megarl.models.files.hf import HfWeights, load_shards
from megarl.models.files.safetensors_file import described_tensors
from megarl.models.files.tensor_io import loaded
from megarl.models.layout import Layout, local_rules
from tests.support.conversions import assert_same_bytes, convert_folder, read_all, write_model
from tests.support.random_models import Case, cases
from tests.support.tiny_models import ARCHITECTURES, tiny

LAYOUTS = {
    "dense": [Layout(), Layout(tp=4), Layout(tp=2, pp=2, vpp=2), Layout(pp=4)],
    "experts": [Layout(), Layout(tp=2, pp=2, vpp=2, ep=2), Layout(ep=2), Layout(tp=4, ep=4)],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_torch_dist_round_trips(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """HF → torch_dist → HF is the identity on bytes, and carries the files beside the weights along.
    That Megatron reads the middle step is proven in test_megatron.py."""
    tied = dtype is torch.float16
    source = write_model(tmp_path / "hf", family, dtype, files=3, tie_word_embeddings=tied)
    convert_folder(source, tmp_path / "dist", TorchDistWriter(tiny(family, tie_word_embeddings=tied)))
    shape = open_checkpoint(tmp_path / "dist").model
    convert_folder(tmp_path / "dist", tmp_path / "back", HfWriter(shape, shard_bytes=60_000))
    assert_same_bytes(source, tmp_path / "back")
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    stored = read_all(source)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert all((tmp_path / "back" / file).stat().st_size < 70_000 for file in index["weight_map"].values())


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
@pytest.mark.parametrize("tied", [False, True])
def test_classic_round_trips(family: str, tied: bool, tmp_path: Path) -> None:
    """HF → classic → HF and classic → another classic layout, for layer names of both specs."""
    sizes = {"tie_word_embeddings": tied}
    source = write_model(tmp_path / "hf", family, **sizes)
    model, previous = tiny(family, **sizes), source
    for i, layout in enumerate(LAYOUTS["experts" if model.moe else "dense"]):
        convert_folder(previous, tmp_path / f"classic{i}", ClassicWriter(model, layout, "te" if i % 2 else "local"))
        previous = tmp_path / f"classic{i}"
        assert open_checkpoint(previous).layout == layout  # type: ignore[attr-defined]
    convert_folder(previous, tmp_path / "back", HfWriter(model))
    assert_same_bytes(source, tmp_path / "back")


@settings(max_examples=8)
@given(case=cases())
def test_random_configs_round_trip_through_files(case: Case) -> None:
    """HF → torch_dist → classic files of a random layout → HF, byte for byte."""
    with tempfile.TemporaryDirectory() as name:
        place, model = Path(name), tiny(case.family, **case.sizes)
        source = write_model(place / "hf", case.family, case.dtype, files=2, **case.sizes)
        convert_folder(source, place / "dist", TorchDistWriter(model))
        convert_folder(place / "dist", place / "classic", ClassicWriter(model, case.layout, case.spec))
        convert_folder(place / "classic", place / "back", HfWriter(model))
        assert_same_bytes(source, place / "back")


def test_classic_files_are_plain_state_dicts(tmp_path: Path) -> None:
    """A rank's file loads with torch.load as Megatron-LM expects it, padding rows zero, names local to the stage."""
    source = write_model(tmp_path / "hf", "qwen3", torch.float32)
    writer = ClassicWriter(tiny("qwen3"), Layout(tp=2, pp=2), "local", divisible_by=8)
    convert_folder(source, tmp_path / "classic", writer)
    with torch.serialization.safe_globals([Namespace]):
        file = torch.load(tmp_path / "classic" / "release" / "mp_rank_01_000" / "model_optim_rng.pt", weights_only=True)
    assert file["checkpoint_version"] == 3.0 and file["args"].padded_vocab_size == 112
    hf = read_all(source)
    embedding = file["model"]["embedding.word_embeddings.weight"]
    assert torch.equal(embedding[: 101 - 56], hf["model.embed_tokens.weight"][56:]) and not embedding[101 - 56 :].any()
    fc1 = torch.cat([hf[f"model.layers.1.mlp.{x}_proj.weight"].chunk(2)[1] for x in ("gate", "up")])
    assert torch.equal(file["model"]["decoder.layers.1.mlp.linear_fc1.weight"], fc1)
    assert not any(name.startswith("decoder.layers.2.") for name in file["model"])


def test_cast(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "llama", torch.float32)
    convert_folder(source, tmp_path / "dist", TorchDistWriter(tiny("llama")), torch.bfloat16)
    convert_folder(tmp_path / "dist", tmp_path / "back", HfWriter(tiny("llama")))
    back = read_all(tmp_path / "back")
    assert all(torch.equal(tensor.bfloat16(), back[name]) for name, tensor in read_all(source).items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "kind", [pytest.param("torch_dist", marks=pytest.mark.slow), pytest.param("classic", marks=pytest.mark.slow), "hf"]
)
def test_killed_anywhere_then_resumed(kind: str, tmp_path: Path) -> None:
    """The process dies without warning (os._exit, in the middle of a layer); nothing is at the destination; the next
    run takes up what was written, writes the rest, and the result is whole. Not proven: loss of power."""
    source = write_model(tmp_path / "hf", "qwen2")
    destination, partial = tmp_path / "out", tmp_path / "out.partial"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["checkpoints_conv.commands"])
    total = sum(unit.nbytes for unit in plan(open_checkpoint(source), HfWriter(tiny("qwen2")), destination).units)
    for death in (total // 3, total * 3 // 4, 2 * total):
        child = processes.Process(target=convert_and_die, args=(source, destination, kind, death))
        child.start()
        child.join(120)
        survives = death > total
        assert child.exitcode == (0 if survives else 9)
        assert destination.exists() == survives and partial.exists() != survives
    assert not (destination / ".journal").exists()
    assert all(c.equal for c in compare(open_checkpoint(source), open_checkpoint(destination)))


def convert_and_die(source: Path, destination: Path, kind: str, death: int) -> None:
    """Convert, counting what an earlier run wrote too, until more than `death` bytes are done."""
    written, model = 0, tiny("qwen2")
    writer: Writer = {
        "torch_dist": lambda: TorchDistWriter(model),
        "classic": lambda: ClassicWriter(model, Layout(tp=2)),
        "hf": lambda: HfWriter(model),
    }[kind]()

    def advance(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        if written > death:
            os._exit(9)

    convert_folder(source, destination, writer, workers=1, advance=advance)


def test_resume_refuses_other_settings_and_a_second_process(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "qwen2")

    class Stop(Exception):
        pass

    def stop(nbytes: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        convert_folder(source, tmp_path / "out", TorchDistWriter(tiny("qwen2")), advance=stop)
    with pytest.raises(UserError, match="other files or settings"):
        convert_folder(source, tmp_path / "out", TorchDistWriter(tiny("qwen2")), torch.float32)

    def again(nbytes: int) -> None:
        with pytest.raises(UserError, match="another process"):
            convert_folder(source, tmp_path / "out", TorchDistWriter(tiny("qwen2")))
        raise Stop

    with pytest.raises(Stop):
        convert_folder(source, tmp_path / "out", TorchDistWriter(tiny("qwen2")), advance=again)


def test_no_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "hf", "qwen2")
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and type("U", (), {"free": 10}))
    with pytest.raises(UserError, match="needs .* bytes; the disk has 10 free"):
        convert_folder(source, tmp_path / "out", TorchDistWriter(tiny("qwen2")))


def test_disk_filling_up_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC in the middle of writing becomes a UserError that says how to go on, not a traceback."""
    source = write_model(tmp_path / "hf", "qwen2")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        convert_folder(source, tmp_path / "out", HfWriter(tiny("qwen2")))


def test_a_rank_reads_only_its_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At tp 4, pp 2 a rank's reads are its own rows; of tensors split by columns the rows they lie in."""
    source = write_model(tmp_path / "hf", "qwen3", hidden_size=64)
    shape, read = tiny("qwen3", hidden_size=64), 0
    original = os.preadv

    def counted(*place) -> int:
        nonlocal read
        read += (count := original(*place))
        return count

    monkeypatch.setattr("os.preadv", counted)
    layout = Layout(tp=4, pp=2)
    local = local_rules(rules(shape, vocab_rows=104), shape, layout, pp_rank=1)
    held = dict(load_shards(HfWeights(source), local, layout, tp_rank=3))
    expected = 0
    for rule in local.values():
        rows, *columns = rule.shape(layout.shards(rule))
        # Of rows that are split, from the first value read to the last: the first row's other columns are not.
        [(first, *others)] = [rule.shape()] if rule.partition == 1 else [(rows, *columns)]
        expected += 2 * (first * torch.Size(others).numel() - (others[0] - columns[0] if others else 0))
    # The last vocabulary shard ends in padding, which is not on disk.
    assert read == expected - 2 * 3 * shape.hidden
    for name, rule in local.items():
        parts = {part: tensor for part, tensor in read_all(source).items() if part in rule.hf}
        assert torch.equal(held[name], rule.shard(rule.fuse(parts), 3, 4 if rule.partition is not None else 1)), name


# ── Bad input: one line, naming what is wrong. ──


def rewrite(source: Path, change) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def cut(file: Path, nbytes: int) -> None:
    with open(file, "r+b") as stream:
        stream.truncate(nbytes)


BAD = {
    "missing": (
        lambda s: rewrite(s, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "tensor model.layers.1.mlp.up_proj.weight is missing",
    ),
    "extra": (
        lambda s: rewrite(s, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
        "model.layers.0.self_attn.q_norm.weight: no rule of the map covers",
    ),
    "shape": (
        lambda s: rewrite(s, lambda t: t.update({"model.norm.weight": torch.ones(7)})),
        r"model.norm.weight: shape \[7\] on disk, \[32\] by the rule of decoder.final_layernorm.weight",
    ),
    "mixed": (
        lambda s: rewrite(s, lambda t: t.update({n: t[n].float() for n in t if "0.self_attn.k_proj.weight" in n})),
        "is torch.float32 but .* is torch.bfloat16, and both are part of .*linear_qkv.weight",
    ),
    "truncated": (lambda s: cut(s / "model.safetensors", 40_000), "truncated"),
    "foreign": (lambda s: (s / "model.safetensors").write_bytes(b"PK\x03\x04" + b"x" * 100), "not a safetensors file"),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), "has no .*safetensors"),
    "pickle": (
        lambda s: (s / "model.safetensors").rename(s / "pytorch_model.bin"),
        "only pickled weights .*--allow-pickle",
    ),
    "no config": (lambda s: (s / "config.json").unlink(), "has no config.json"),
    "architecture": (
        lambda s: (s / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}'),
        "GPT2LMHeadModel is unknown .known: Qwen3ForCausalLM",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str, tmp_path: Path) -> None:
    spoil, message = BAD[case]
    source = write_model(tmp_path / "hf", "qwen2")
    spoil(source)
    with pytest.raises(UserError, match=message):
        convert_folder(source, tmp_path / "out", TorchDistWriter(tiny("qwen2")))
    assert not (tmp_path / "out").exists()


def test_destination_must_be_empty(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "qwen2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        convert_folder(source, tmp_path / "out", TorchDistWriter(tiny("qwen2")))


def test_pickled_weights_when_asked_for(tmp_path: Path) -> None:
    """With allow_pickle the tensors of a *.bin are read; a pickle that would run code is not run."""
    source = write_model(tmp_path / "hf", "qwen2")
    torch.save(read_all(source), source / "pytorch_model.bin")
    (tmp_path / "pickled").mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (source / name).rename(tmp_path / "pickled" / name)
    checkpoint = open_checkpoint(tmp_path / "pickled", allow_pickle=True)
    convert(plan(checkpoint, HfWriter(tiny("qwen2")), tmp_path / "out"))
    assert_same_bytes(source, tmp_path / "out")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(UserError, match="pytorch_model.bin: damaged"):
        open_checkpoint(tmp_path / "pickled", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_damaged_megatron_checkpoints_are_refused(tmp_path: Path) -> None:
    source, model = write_model(tmp_path / "hf", "qwen2"), tiny("qwen2")
    convert_folder(source, tmp_path / "dist", TorchDistWriter(model))
    convert_folder(source, tmp_path / "classic", ClassicWriter(model, Layout(tp=2)))
    release = tmp_path / "dist" / "release"
    layer = release / "__2_0.distcp"
    whole = layer.read_bytes()
    cut(layer, 100)
    with pytest.raises(UserError, match="__2_0.distcp: is truncated"):
        convert_folder(tmp_path / "dist", tmp_path / "out", HfWriter(model))
    layer.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match="__2_0.distcp: damaged"):
        convert_folder(tmp_path / "dist", tmp_path / "out", HfWriter(model))
    layer.unlink()
    with pytest.raises(UserError, match="__2_0.distcp: is missing"):
        convert_folder(tmp_path / "dist", tmp_path / "out2", HfWriter(model))
    (release / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(UserError, match="not the metadata .*posix.mkdir"):
        open_checkpoint(tmp_path / "dist")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "classic" / "release" / "mp_rank_01" / "model_optim_rng.pt").unlink()
    (tmp_path / "classic" / "release" / "mp_rank_01").rmdir()
    with pytest.raises(UserError, match="shape"):
        open_checkpoint(tmp_path / "classic").check_whole()


def test_verify_names_what_was_done_to_a_tensor(tmp_path: Path) -> None:
    """Swapped, transposed and slightly changed tensors are told apart and named; the others are equal."""
    sizes = {"num_attention_heads": 4, "head_dim": 8}
    source = write_model(tmp_path / "a", "qwen3", **sizes)
    other = write_model(tmp_path / "b", "qwen3", **sizes)

    def spoil(t: dict[str, Tensor]) -> None:
        k, v = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "kv")
        t[k], t[v] = t[v], t[k]
        square = "model.layers.2.self_attn.o_proj.weight"
        t[square] = t[square].T.contiguous()
        t["model.norm.weight"] = t["model.norm.weight"].clone()
        t["model.norm.weight"][5] *= 1.25

    rewrite(other, spoil)
    convert_folder(other, tmp_path / "dist", TorchDistWriter(tiny("qwen3", **sizes)))
    differing = [c for c in compare(open_checkpoint(source), open_checkpoint(tmp_path / "dist")) if not c.equal]
    assert {c.name: c.differing for c in differing if c.name == "model.norm.weight"} == {"model.norm.weight": 1}
    assert len(differing) == 4
    assert misplaced(differing) == {
        "model.layers.1.self_attn.k_proj.weight": "contains model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.self_attn.v_proj.weight": "contains model.layers.1.self_attn.k_proj.weight",
        "model.layers.2.self_attn.o_proj.weight": "transposed",
    }


def test_verify_refuses_another_model(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", "qwen2")
    b = write_model(tmp_path / "b", "qwen2", vocab_size=99)
    with pytest.raises(UserError, match="another model .* vocab 99, not 101"):
        list(compare(open_checkpoint(a), open_checkpoint(b)))


def test_safetensors_reader_agrees_with_the_library(tmp_path: Path) -> None:
    """Every type, empty and scalar tensors, and slices on both dims, against the library's own writer."""
    tensors = {
        "matrix": torch.randn(6, 5),
        "half": torch.randn(3, 2, 4).half(),
        "eight": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "mask": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    described = described_tensors(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        read = loaded(described[name])
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    index = (slice(1, 4), slice(2, 5))
    assert torch.equal(loaded(described["matrix"][index]), tensors["matrix"][index])
    assert loaded(described["matrix"][6:6]).shape == (0, 5)
