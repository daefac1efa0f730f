"""The commands, as a user calls them: tables, and every mistake one line on stderr with exit code 2."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl import cli
from tests.support.conversions import assert_same_bytes, read_all, write_model


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Exit code of `megarl convert …`, run in this process."""
    monkeypatch.setattr("sys.argv", ["megarl", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def rewrite(folder: Path, **changed: torch.Tensor | None) -> None:
    """Replace tensors, or drop those that are None; `__` stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changed.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 40_000)


MISTAKES = {
    "architecture": (
        lambda s: (s / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}'),
        ["GPT2LMHeadModel", "known", "Qwen3ForCausalLM", "LlamaForCausalLM"],
    ),
    "missing": (lambda s: rewrite(s, model__layers__1__mlp__up_proj__weight=None), ["layers.1.mlp.up_proj", "missing"]),
    "extra": (lambda s: rewrite(s, strange__weight=torch.ones(2)), ["strange.weight", "no rule"]),
    "shape": (lambda s: rewrite(s, model__norm__weight=torch.ones(7)), ["[7]", "[32]", "decoder.final_layernorm"]),
    "truncated": (cut, ["truncated"]),
    "foreign": (lambda s: (s / "model.safetensors").write_bytes(b"x" * 99), ["not a safetensors file"]),
    "pickle": (lambda s: (s / "model.safetensors").rename(s / "pytorch_model.bin"), ["pickled", "--allow-pickle"]),
    "destination": (lambda s: (s.parent / "out" / "mine").mkdir(parents=True), ["out", "is not empty"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_code_2_and_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = MISTAKES[name]
    source = write_model(tmp_path / "hf", "qwen2")
    spoil(source)
    assert invoke(monkeypatch, "hf-to-megatron", source, tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("megarl: "), lines
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "out" / "release").exists()


def test_no_space_ends_with_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(tmp_path / "hf", "qwen2")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    assert invoke(monkeypatch, "hf-to-megatron", source, tmp_path / "out") == 2
    assert "the disk has 10 free" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_layouts_are_merged_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF → classic tp2·pp2 → one rank → tp4 → HF by commands alone gives the same bytes."""
    source = write_model(tmp_path / "hf", "llama")
    steps = [["tp=2", "pp=2"], [], ["tp=4"]]
    previous = source
    for number, words in enumerate(steps):
        assert invoke(monkeypatch, "reshard", previous, tmp_path / str(number), *words) == 0
        previous = tmp_path / str(number)
    assert len(list((tmp_path / "0" / "release").iterdir())) == 4
    assert len(list((tmp_path / "1" / "release").iterdir())) == 1
    assert invoke(monkeypatch, "megatron-to-hf", previous, tmp_path / "back") == 0
    assert_same_bytes(source, tmp_path / "back")


def test_a_checkpoint_of_a_run_needs_no_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RUN/checkpoints/step_NNNNNN is enough: the run's config.yaml names the model whose config.json and tokenizer go
    along, with the type of the trained weights; a relative path is looked up from where the run was started. The
    layout is a run's, the tensors are converted ones: a checkpoint that was trained is in tests/e2e/test_loop.py."""
    source = write_model(tmp_path / "hf", "qwen3", torch.float32)  # bfloat16 by its config.json
    assert invoke(monkeypatch, "hf-to-megatron", source, tmp_path / "dist") == 0
    step = tmp_path / "run" / "checkpoints" / "step_000007"
    step.mkdir(parents=True)
    (tmp_path / "dist" / "release").rename(step / "learner")
    (tmp_path / "run" / "config.yaml").write_text("model: {path: hf}\nrun: run\ndata: {train: [train.jsonl]}\n")
    monkeypatch.chdir(step)
    assert invoke(monkeypatch, "megatron-to-hf", ".", tmp_path / "back") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "config.yaml: model.path: hf has no config.json, seen from" in message and "--config" in message
    monkeypatch.chdir(tmp_path)
    assert invoke(monkeypatch, "megatron-to-hf", step.relative_to(tmp_path), "back") == 0
    assert_same_bytes(source, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float32"
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert invoke(monkeypatch, "verify", source, step) == 0


def test_inspect_compare_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Norms and differences are torch's, and the same in every format; the mean of two checkpoints lies half way; other
    models are refused."""
    a, b = (write_model(tmp_path / name, "qwen3", torch.float32) for name in "ab")
    changed = read_all(b)["model.norm.weight"] + 0.5
    rewrite(b, model__norm__weight=changed)
    assert invoke(monkeypatch, "inspect", a) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if " model.norm.weight " in line)
    for word in (
        "decoder.final_layernorm.weight",
        "[32]",
        "float32",
        "128",
        f"{read_all(a)['model.norm.weight'].norm():.6g}",
    ):
        assert word in row
    assert invoke(monkeypatch, "hf-to-megatron", a, tmp_path / "dist") == 0
    assert invoke(monkeypatch, "hf-to-megatron", a, tmp_path / "classic", "--format", "classic", "tp=2", "pp=2") == 0
    for converted in ("dist", "classic"):
        capsys.readouterr()
        assert invoke(monkeypatch, "inspect", tmp_path / converted) == 0
        *rows, _ = capsys.readouterr().out.splitlines()
        assert rows == shown.splitlines()[:-1], converted
    assert invoke(monkeypatch, "compare", a, b) == 0
    shown = capsys.readouterr().out
    assert "1 of 47 tensors differ; largest 0.5: model.norm.weight" in shown
    assert invoke(monkeypatch, "verify", a, b) == 1
    assert invoke(monkeypatch, "average", tmp_path / "classic", b, "--to", tmp_path / "mean") == 0
    mean, first, second = (read_all(folder) for folder in (tmp_path / "mean", a, b))
    for name, tensor in mean.items():
        assert torch.equal(tensor, (first[name] + second[name]) / 2), name
    other = write_model(tmp_path / "other", "qwen3", vocab_size=99)
    assert invoke(monkeypatch, "average", a, other, "--to", tmp_path / "no") == 2
    assert "another model" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf", "reshard", "verify", "inspect", "average"])
def test_help_explains_every_argument(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert invoke(monkeypatch, command, "--help") == 0
    shown = capsys.readouterr().out
    assert "Hugging Face" in shown and "Folder" in shown
