"""What stands beside a model's weights goes with them: every chat template, and the type under the name in use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoints_conv.hf_writer import HfWriter
from checkpoints_conv.torch_dist import TorchDistWriter
from megarl.models.config_json import read_shape
from megarl.models.files.companions import copy_companions, set_dtype
from tests.support.conversions import convert_folder, write_model

BESIDE = ("tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "vocab.json")
LEFT = ("old.bin", "model.gguf", ".cache", "pytorch_model.bin.index.json", "onnx/config.json")


def test_all_templates_go_both_ways(tmp_path: Path) -> None:
    """Hugging Face to Megatron and back, byte by byte; weights, hidden files and other folders stay."""
    source = write_model(tmp_path / "hf", "qwen2")
    for name in (*BESIDE, *LEFT):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    shape = read_shape(source)
    convert_folder(source, tmp_path / "dist", TorchDistWriter(shape))
    convert_folder(tmp_path / "dist", tmp_path / "back", HfWriter(shape))
    (tmp_path / "copied").mkdir()
    copy_companions(source, tmp_path / "copied")
    for folder in (tmp_path / "back", tmp_path / "copied"):
        assert all((folder / name).read_text() == name for name in BESIDE)
        assert not [name for name in LEFT if (folder / name).exists()]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "bfloat16"}),
        ({}, {"torch_dtype": "bfloat16"}),
    ],
)
def test_the_type_has_one_name(written: dict[str, str], expected: dict[str, str], tmp_path: Path) -> None:
    """transformers 5 prefers `dtype`: a `torch_dtype` left beside it would say another type to older engines."""
    (tmp_path / "config.json").write_text(json.dumps(written))
    set_dtype(tmp_path / "config.json", torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == expected
