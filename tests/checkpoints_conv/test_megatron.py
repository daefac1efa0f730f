"""The real Megatron-Core agrees: its own names and shapes, its own loading and saving of distributed checkpoints."""

from __future__ import annotations

from pathlib import Path
from queue import Queue
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from checkpoints_conv.hf_writer import HfWriter
from checkpoints_conv.torch_dist import TorchDistWriter
from megarl.config import Parallel, Precision
from megarl.learner.parallel import World, layout_of, start
from megarl.models.config_json import read_shape
from megarl.models.families import rules
from megarl.models.files.hf import HfWeights, load_shards
from megarl.models.layout import local_rules, padded_vocab
from megarl.models.rules import Rule, Spec
from megarl.models.shape import ModelShape
from megarl.runtime.spawn import spawn
from tests.support.conversions import assert_same_bytes, convert_folder, write_model
from tests.support.te_stand_ins import Norm, StandIns
from tests.support.tiny_models import ARCHITECTURES

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

LAYOUTS = [Parallel(tp=2, pp=2, vpp=2), Parallel(pp=4), Parallel(tp=4), Parallel()]
EXPERT_LAYOUTS = [Parallel(tp=2, ep=2), Parallel(pp=2, ep=2)]
TIED = {"qwen3": True, "qwen3_moe": False, "qwen2": True, "llama": False}


def build(shape: ModelShape, parallel: Parallel, spec: Spec = "local") -> list[GPTModel]:
    """This rank's chunks of the stock GPTModel; parameters as they come. With the spec "te" they have the modules that
    Megatron would build of Transformer Engine's, which themselves are stand-ins."""
    moe = shape.moe
    experts = (
        {"num_moe_experts": moe.count, "moe_router_topk": moe.top_k, "moe_ffn_hidden_size": moe.ffn} if moe else {}
    )
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        expert_model_parallel_size=parallel.ep,
        pipeline_dtype=torch.float32,
        **experts,
    )
    experts_and_norms = moe.count if moe else None, spec == "te", shape.qk_norm
    if spec == "te":
        with mock.patch.object(gpt_layer_specs, "TESpecProvider", StandIns, create=True):
            modules = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(*experts_and_norms)
        modules = TransformerBlockSubmodules([modules] * (shape.layers // parallel.pp // parallel.vpp), Norm)
    else:
        modules = gpt_layer_specs.get_gpt_layer_local_spec(*experts_and_norms, normalization="RMSNorm")
    chunks = []
    for index in range(parallel.vpp):
        place = {"ignore_virtual": False, "vp_stage": index} if parallel.vpp > 1 else {}
        chunks.append(
            GPTModel(
                config=config,
                transformer_layer_spec=modules,
                vocab_size=padded_vocab(shape.vocab, parallel.tp),
                max_sequence_length=shape.max_positions,
                pre_process=parallel_state.is_pipeline_first_stage(**place),
                post_process=parallel_state.is_pipeline_last_stage(**place),
                share_embeddings_and_output_weights=shape.tied,
                position_embedding_type="rope",
                vp_stage=index if parallel.vpp > 1 else None,
            )
        )
    return chunks


def tensors_of(chunk: GPTModel) -> dict[str, torch.Tensor]:
    return {name: value for name, value in chunk.state_dict().items() if "_extra_state" not in name}


def check_layouts(layouts: list[Parallel], families: list[str], folder: Path) -> None:
    """On each of 4 ranks: Megatron loads what was converted, under every layout; under the first it saves."""
    for number, parallel in enumerate(layouts):
        world = start(parallel, Precision(dtype="fp32"), seed=0, deadline_s=120)
        for family in families:
            files = HfWeights(folder / family / "hf")
            chunks = build(files.model, parallel)
            state = check_loading(files, chunks, parallel, world, folder / family / "dist" / "release")
            if number == 0:
                if world.is_controller:
                    (folder / family / "saved").mkdir()
                world.barrier("a folder to save into")
                filesystem_async._results_queue = Queue()  # not of a manager, whose process would outlive the rank
                strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
                dist_checkpointing.save(state, str(folder / family / "saved"), strategy)
        world.release()


def check_loading(
    files: HfWeights, chunks: list[GPTModel], parallel: Parallel, world: World, converted: Path
) -> dict[str, dict]:
    """Compare names, shapes and loaded values with the map's; returns the sharded state of what was loaded."""
    shape = files.model
    check_names(build(shape, parallel, "te"), shape, parallel, world, "te")
    by_chunk = check_names(chunks, shape, parallel, world, "local")
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.fill_(torch.nan)  # a load that does nothing must not pass
    loaded = dist_checkpointing.load(sharded(chunks), str(converted))
    for index, (chunk, local) in enumerate(zip(chunks, by_chunk, strict=True)):
        chunk.load_state_dict(loaded[f"model{index}"], strict=True)
        for name, tensor in load_shards(files, local, layout_of(parallel), world.tp_rank):
            assert torch.equal(tensors_of(chunk)[name], tensor), (shape.family, parallel, name)
    return sharded(chunks)


def check_names(
    chunks: list[GPTModel], shape: ModelShape, parallel: Parallel, world: World, spec: Spec
) -> list[dict[str, Rule]]:
    """Megatron's names and shapes are the map's; returns each chunk's rules."""
    layout, every = layout_of(parallel), rules(shape, spec, padded_vocab(shape.vocab, parallel.tp))
    found = []
    for index, chunk in enumerate(chunks):
        ep_rank = parallel_state.get_expert_model_parallel_rank()
        local = local_rules(every, shape, layout, world.pp_rank, index, ep_rank)
        shapes = {name: rule.shape(layout.shards(rule)) for name, rule in local.items()}
        held = {name: tuple(tensor.shape) for name, tensor in tensors_of(chunk).items()}
        assert held == shapes, (shape.family, parallel, spec)
        found.append(local)
    return found


def sharded(chunks: list[GPTModel]) -> dict[str, dict]:
    return {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}


@pytest.mark.parametrize(
    ("layouts", "families"),
    [(LAYOUTS, ["qwen3", "qwen2", "llama"]), (EXPERT_LAYOUTS, ["qwen3_moe"])],
    ids=["dense", "experts"],
)
def test_megatron_loads_and_saves_what_we_convert(layouts: list[Parallel], families: list[str], tmp_path: Path) -> None:
    """For every layout the stock GPTModel has exactly the tensors that the map says, of either layer spec; Megatron's
    own loader fills it from our torch_dist with what the map cuts from the Hugging Face files, bit for bit; and what
    Megatron's own saver writes from a parallel layout converts back to the same bytes. Vocabularies are odd, so padding
    is at work. Not proven: what Transformer Engine calls the parameters inside its modules (te_stand_ins.py repeats its
    source; it needs CUDA), and that the tensors are used alike (test_real_weights.py)."""
    assert sorted(TIED) == sorted(ARCHITECTURES)
    for family in families:
        (tmp_path / family).mkdir()
        hf = write_model(tmp_path / family / "hf", family, torch.float32, tie_word_embeddings=TIED[family])
        convert_folder(hf, tmp_path / family / "dist", TorchDistWriter(read_shape(hf)))
    spawn(check_layouts, 4, (layouts, families, tmp_path), timeout=240)
    for family in families:
        hf, back = tmp_path / family / "hf", tmp_path / family / "back"
        convert_folder(tmp_path / family / "saved", back, HfWriter(read_shape(hf)), config=hf)
        assert_same_bytes(hf, back)
