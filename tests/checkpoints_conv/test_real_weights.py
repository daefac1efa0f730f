"""SmolLM2-135M, real weights: converted, loaded by Megatron under several layouts, and compared with transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_conv import commands
from checkpoints_conv.convert import convert, plan
from checkpoints_conv.torch_dist import TorchDistWriter
from megarl.config import Parallel
from megarl.models.config_json import read_shape
from megarl.models.files.hf import HfWeights
from megarl.models.files.tensor_io import loaded
from megarl.models.rules import Rule
from megarl.runtime.spawn import spawn
from tests.support import smollm2
from tests.support.conversions import convert_folder
from tests.support.megatron_logits import logits

pytestmark = [pytest.mark.parallel, pytest.mark.slow, pytest.mark.timeout(600)]  # the first test may fetch the weights

NEW = 32  # greedy tokens
BOUND = 1e-4  # on |logits - transformers' logits|
K, V, O = (f"model.layers.3.self_attn.{x}_proj.weight" for x in "kvo")


@dataclass
class Real:
    """What the tests share."""

    folders: dict[str, Path]
    ids: list[int]  # prompt, then transformers' 32 greedy tokens
    expected: Tensor  # transformers' logits after each token but the last
    logits: dict[str, Tensor]  # Megatron's, by case

    def distance(self, case: str) -> float:
        return (self.logits[case] - self.expected).abs().max().item()


class Sabotaged(HfWeights):
    """A model folder whose tensors come out as `spoil` leaves them."""

    def __init__(self, folder: Path, spoil: Callable[[dict[str, Tensor]], None]) -> None:
        super().__init__(folder)
        self._spoil = spoil

    def parts(self, rule: Rule) -> dict[str, Tensor]:
        parts = super().parts(rule)
        self._spoil(parts)
        return parts


def swap(parts: dict[str, Tensor]) -> None:
    if K in parts:
        parts[K], parts[V] = parts[V], parts[K]


def transpose(parts: dict[str, Tensor]) -> None:
    if O in parts:
        parts[O] = loaded(parts[O]).T.contiguous()


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same function with 12 heads in 4 groups instead of 9 in 3, so that tp 2 divides them: the new heads are zeros
    in every projection, the output's too."""

    def wide(name: str, tensor: Tensor) -> Tensor:
        rows, columns = {"q": (192, 0), "k": (64, 0), "v": (64, 0), "o": (0, 192)}[name]
        return torch.nn.functional.pad(tensor, (0, columns, 0, rows))

    return {
        name: wide(name.split("_proj")[0][-1], tensor) if "self_attn" in name else tensor
        for name, tensor in tensors.items()
    }


def write(folder: Path, tensors: dict[str, Tensor], **changes: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(smollm2.CONFIG | changes))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("smollm2")
    try:
        tensors = smollm2.weights()
    except smollm2.NotFetchedError as e:
        pytest.skip(str(e))  # no other model's logits are known
    original = write(place / "original", tensors)
    wide = write(place / "wide", widened(tensors), num_attention_heads=12, num_key_value_heads=4)
    folders = {"original": original, "wide": wide}
    for source in (original, wide):
        name = f"{source.name} converted"
        folders[name] = place / name
        convert_folder(source, folders[name], TorchDistWriter(read_shape(source)))
    for spoil in (swap, transpose):
        folders[spoil.__name__] = place / spoil.__name__
        source = Sabotaged(original, spoil)
        convert(plan(source, TorchDistWriter(source.model), folders[spoil.__name__]))
    policy = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    prompt = torch.tensor([smollm2.PROMPT])
    ids = policy.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
    assert ids.shape[1] == prompt.shape[1] + NEW
    with torch.no_grad():
        expected = policy(ids[:, :-1]).logits[0]
    alone = {
        "tp1": (folders["original converted"], Parallel()),
        "swap": (folders["swap"], Parallel()),
        "transpose": (folders["transpose"], Parallel()),
    }
    four = {
        "tp2": (folders["wide converted"], Parallel(tp=2, sequence_parallel=False)),
        "tp2·pp2": (folders["wide converted"], Parallel(tp=2, pp=2, sequence_parallel=False)),
        "tp2·pp2, files": (wide, Parallel(tp=2, pp=2, sequence_parallel=False)),
    }
    found: dict[str, Tensor] = {}
    for count, cases in ((1, alone), (4, four)):
        for rank in spawn(logits, count, (cases, ids[0].tolist()), timeout=280):
            found |= rank
    return Real(folders, ids[0].tolist(), expected, found)


@pytest.mark.parametrize("case", ["tp1", "tp2", "tp2·pp2", "tp2·pp2, files"])
def test_logits_and_greedy_text_equal_transformers(real: Real, case: str) -> None:
    """Every logit, and each of 32 greedy tokens: it has Megatron's largest logit after the text before it. From a
    converted checkpoint by Megatron's loader, and from the Hugging Face files by the trainer's. tp 2 does not divide
    this model's 3 key/value heads: there zeros make a fourth group."""
    assert real.ids[len(smollm2.PROMPT)] == smollm2.ANSWER
    assert real.distance(case) <= BOUND
    assert real.logits[case][-NEW:].argmax(-1).tolist() == real.ids[-NEW:]


@pytest.mark.parametrize(
    ("case", "names"), [("swap", {K: f"contains {V}", V: f"contains {K}"}), ("transpose", {O: "transposed"})]
)
def test_sabotage_is_found_and_named(real: Real, case: str, names: dict[str, str], capsys) -> None:
    """A swap or a transposition of equal shapes moves the logits far beyond the bound, and verify names the tensors."""
    assert real.distance(case) > 100 * BOUND
    assert not commands.verify(real.folders["original"], real.folders[case])
    shown = capsys.readouterr().out
    for name, what in names.items():
        [row] = [line for line in shown.splitlines() if line.split()[1:2] == [name]]
        assert what in row
    assert f"{len(names)} of 272 tensors differ" in shown


def test_conversion_is_exact(real: Real, capsys) -> None:
    """Every tensor of the converted checkpoints is the file's, bit by bit."""
    assert commands.verify(real.folders["original"], real.folders["original converted"])
    assert commands.verify(real.folders["wide"], real.folders["wide converted"])
    assert capsys.readouterr().out.splitlines() == ["272 tensors, all equal"] * 2
