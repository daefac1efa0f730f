"""The README's way to add a family works, and the layer names of both specs are Megatron's."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from checkpoints_conv.classic import ClassicWriter
from checkpoints_conv.hf_writer import HfWriter
from checkpoints_conv.torch_dist import TorchDistWriter
from megarl.models.families import FAMILIES, rules
from megarl.models.layout import Layout
from tests.models.test_rules import assert_round_trip
from tests.support.conversions import assert_same_bytes, convert_folder, write_model
from tests.support.random_models import LAYOUTS
from tests.support.tiny_models import ARCHITECTURES, tiny

README = Path(__file__).parents[2] / "checkpoints_conv" / "README.md"


def test_the_readmes_family_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file printed in the README, registered as it says, goes round under every layout and in both formats."""
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    module = ModuleType("mistral")
    exec(textwrap.dedent(code), module.__dict__)
    monkeypatch.setitem(FAMILIES, module.FAMILY.name, module.FAMILY)
    monkeypatch.setitem(ARCHITECTURES, module.FAMILY.name, module.FAMILY.architecture)
    for layout in (layout for layout in LAYOUTS if layout.ep == 1):
        assert_round_trip(tiny("mistral", num_hidden_layers=layout.pp * layout.vpp), layout, "te", torch.bfloat16)
    source, model = write_model(tmp_path / "hf", "mistral"), tiny("mistral")
    convert_folder(source, tmp_path / "dist", TorchDistWriter(model))
    convert_folder(tmp_path / "dist", tmp_path / "classic", ClassicWriter(model, Layout(tp=2, pp=2)))
    convert_folder(tmp_path / "classic", tmp_path / "back", HfWriter(model))
    assert_same_bytes(source, tmp_path / "back")


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_te_names_are_those_that_megatron_translates_its_own_to(family: str) -> None:
    """Megatron's local layers carry a table from their names to Transformer Engine's, so that checkpoints fit both;
    the map's two lists of names differ exactly by it. Not proven: that TE's modules have these names (needs CUDA)."""
    table = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map

    def translated(name: str) -> str:
        for old, new in table.items():
            name = name.replace(f".{old}", f".{new}")
        return name

    shape = tiny(family)
    local, te = rules(shape, "local"), rules(shape, "te")
    assert [translated(rule.megatron) for rule in local] == [rule.megatron for rule in te]
    assert any(a.megatron != b.megatron for a, b in zip(local, te, strict=True))
