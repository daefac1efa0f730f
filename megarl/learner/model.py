"""The policy: Megatron-Core's GPTModel, whose last stage returns log-probs and entropies instead of logits.

`layer_spec` chooses between Transformer Engine's layers and Megatron's own with `PackedAttention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl.config import Experts, Parallel, Precision
from megarl.learner import cpu, emulation, router
from megarl.learner import precision as precisions
from megarl.learner.attention import PackedAttention, PackedRow
from megarl.learner.logprobs import logprobs_and_entropy
from megarl.learner.norm import RMSNorm
from megarl.models.layout import padded_vocab
from megarl.models.rope import rotary
from megarl.models.rules import Spec
from megarl.models.shape import Experts as ExpertShape
from megarl.models.shape import ModelShape
from megarl.runtime import device


class ScoringLayer(ColumnParallelLinear):
    """The output layer, returning log-probs and entropies instead of logits."""

    def forward(
        self, hidden: Tensor, scored: Tensor, targets: Tensor, temperature: float, vocab: int, weight: Tensor | None
    ) -> Tensor:
        """Hidden states [t, 1, h] → float32 [2, n] as in PolicyModel; sequence parallelism: this rank's part of t."""
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        hidden = hidden.squeeze(1).index_select(0, scored)
        if not self.sequence_parallel:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        weight = self.weight if weight is None else weight
        return torch.stack(logprobs_and_entropy(hidden, weight, targets, temperature, vocab, self.tp_group))


class PolicyModel(GPTModel):
    """One chunk of the model. Chunks before the last return hidden states [t, 1, h]."""

    def __init__(self, *, vocab: int, **settings: Any) -> None:
        """`vocab`: unpadded. `settings`: GPTModel's."""
        with _without_apex():
            super().__init__(**settings)
        self.vocab = vocab
        if self.post_process:
            # GPTModel cannot be given another layer, and replacing the module would allocate its weight twice.
            self.output_layer.__class__ = ScoringLayer

    def forward(
        self, tokens: Tensor, positions: Tensor, row: PackedRow, targets: Tensor, scored: Tensor, temperature: float
    ) -> Tensor:
        """One packed row: tokens and positions int64 [t] → log-probs and entropies, float32 [2, n].

        They belong to the positions `scored` (int64 [n], indices below t); each predicts its entry of `targets` [n].
        Under context parallelism t counts this rank's positions. Under sequence parallelism all tensor-parallel ranks
        pass the whole row.
        """
        hidden = self.embedding(tokens[None], positions[None]) if self.pre_process else None
        rotary = None
        if self.position_embedding_type == "rope":
            rotary = self.rotary_pos_emb(row.max_seqlen_q, packed_seq=True)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=row)
        if not self.post_process:
            return hidden
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden, scored, targets, temperature, self.vocab, weight)


@contextmanager
def _without_apex() -> Iterator[None]:
    """Keep Megatron's output layer from refusing fused gradients where apex's kernel is missing.

    Transformer Engine's layers bring their own kernel, and ScoringLayer calls none.
    """
    available = megatron_layers._grad_accum_fusion_available
    megatron_layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        megatron_layers._grad_accum_fusion_available = available


def vocabulary_rows(shape: ModelShape, tp: int) -> int:
    """Rows of the embedding: the vocabulary padded to a multiple of tp, and of 8, so it rarely depends on tp."""
    return padded_vocab(shape.vocab, tp, divisible_by=-(-8 // tp))


def spec_kind() -> Spec:
    """Transformer Engine's layers on a CUDA device that has it, otherwise Megatron's own."""
    return "te" if device.transformer_engine() else "local"


def transformer_config(
    shape: ModelShape, parallel: Parallel, precision: Precision, experts: Experts | None = None
) -> TransformerConfig:
    """Megatron's settings for this model and layout."""
    te = spec_kind() == "te"
    settings: dict[str, Any] = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_groups,
        "kv_channels": shape.head_dim,
        "softmax_scale": rotary(shape).softmax_scale,
        "ffn_hidden_size": shape.ffn,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
        "sequence_parallel": parallel.uses_sequence_parallel,
        # The loss is a sum with denominators fixed beforehand: nothing divides it by the tokens of a rank.
        "calculate_per_token_loss": True,
        "perform_initialization": False,  # weights.py fills every parameter and marks the sharded ones
        "use_cpu_initialization": not device.on_cuda(),
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": te,
        "bias_activation_fusion": te,
        "apply_rope_fusion": te,
        "persist_layer_norm": te,
        "gradient_accumulation_fusion": te and parallel.gradient_accumulation_fusion is not False,
        "expert_tensor_parallel_size": parallel.etp or parallel.tp,
        "tp_comm_overlap": parallel.overlap_tp,
        "cp_comm_type": parallel.cp_comm if te else None,
        "cpu_offloading": parallel.offload_layers > 0,
        "cpu_offloading_num_layers": parallel.offload_layers,
    }
    if shape.moe:
        settings |= _expert_settings(shape.moe, experts or Experts(), te)
    if parallel.vpp > 1:
        settings["virtual_pipeline_model_parallel_size"] = parallel.vpp
    if parallel.pp > 1:
        # With two stages the previous and the next rank are the same. Under the interleaved schedule Megatron's batched
        # exchange then confuses them: wrong gradients, no error.
        settings |= {
            "overlap_p2p_comm": parallel.vpp > 1 and parallel.overlap_p2p,
            "batch_p2p_comm": parallel.vpp == 1,
        }
    if parallel.recompute == "full":
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif parallel.recompute == "selective":
        settings |= {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    return TransformerConfig(**settings, **precisions.transformer_settings(precision))


def user_buffers(config: TransformerConfig, tokens: int) -> None:
    """Make Transformer Engine's buffers for rows of `tokens` tokens, as Megatron-LM's training script does."""
    from transformer_engine.pytorch.module.base import initialize_ub

    initialize_ub(
        shape=[tokens, config.hidden_size],
        tp_size=config.tensor_model_parallel_size,
        use_fp8=config.fp8 is not None,
        bootstrap_backend="nccl",
    )


def _expert_settings(moe: ExpertShape, experts: Experts, te: bool) -> dict[str, Any]:
    """Megatron's settings for a mixture of experts. No token is dropped; router.py adds the auxiliary losses.

    The router computes in float32, as in transformers. Normalised probabilities of the chosen experts are a softmax
    over these alone. Otherwise they are entries of the softmax over all experts.
    """
    return {
        "num_moe_experts": moe.count,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.ffn,
        "moe_router_pre_softmax": not moe.normalise or moe.top_k == 1,
        "moe_router_dtype": experts.router_dtype,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",  # the all-gather dispatcher needs rows of equal length on all ranks
        "moe_grouped_gemm": te,
        "moe_permute_fusion": te,
    }


def layer_spec(config: TransformerConfig, layers: int) -> TransformerBlockSubmodules | ModuleSpec:
    """The modules of one chunk of `layers` layers."""
    if spec_kind() == "te":
        return get_gpt_layer_with_transformer_engine_spec(
            config.num_moe_experts, config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
        )
    if config.num_moe_experts:
        cpu.install_experts()
    layer = get_gpt_layer_local_spec(config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    modules, attention = layer.submodules, layer.submodules.self_attention.submodules
    modules.input_layernorm = modules.pre_mlp_layernorm = RMSNorm
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


def build(
    shape: ModelShape, config: TransformerConfig, precision: Precision, experts: Experts | None = None
) -> list[torch.nn.Module]:
    """This rank's model chunks, with unfilled parameters. In bf16 each is wrapped in Megatron's Float16Module."""
    vpp = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(vpp or 1):
        place = {"ignore_virtual": False, "vp_stage": stage} if vpp else {}
        layers = shape.layers // (config.pipeline_model_parallel_size * (vpp or 1))
        model = PolicyModel(
            vocab=shape.vocab,
            config=config,
            transformer_layer_spec=layer_spec(config, layers),
            vocab_size=vocabulary_rows(shape, config.tensor_model_parallel_size),
            max_sequence_length=shape.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope" if spec_kind() == "te" else "none",  # PackedAttention rotates itself
            rotary_base=shape.rope.theta,
            vp_stage=stage if vpp else None,
        )
        if spec_kind() == "te":
            model.rotary_pos_emb.inv_freq = rotary(shape).frequencies.to(model.rotary_pos_emb.inv_freq.device)
        if precisions.emulated(precision):
            layers_in_fp8 = precisions.fp8_layers(precision, shape.layers)
            emulation.emulate(model, precisions.recipe(precision), layers_in_fp8.start + 1, layers_in_fp8.stop)
        if device.on_cuda():
            model.cuda(torch.cuda.current_device())
        if shape.moe:
            router.install(model, experts or Experts())
            _reduce_among_experts(model)
        chunks.append(Float16Module(config, model) if config.bf16 else model)
    return chunks


def _reduce_among_experts(model: PolicyModel) -> None:
    """Have Megatron reduce, clip and save the experts' weights within the experts' groups, in every layout.

    Megatron marks them only where ep > 1. With ep 1 and etp unlike tp their gradients would then be summed over the
    dense layers' groups, which are the wrong ranks.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


@contextmanager
def unquantised(chunks: list[torch.nn.Module], config: TransformerConfig) -> Iterator[None]:
    """A context in which an FP8 model computes in bf16. Forward passes only."""
    fp8, config.fp8 = config.fp8, None  # Transformer Engine's layers read it in every forward pass
    with ExitStack() as stack:
        stack.callback(setattr, config, "fp8", fp8)
        for chunk in chunks:
            stack.enter_context(emulation.paused(chunk))
        yield


def unwrap(module: MegatronModule) -> PolicyModel:
    """The PolicyModel inside Megatron's wrappers."""
    while not isinstance(module, PolicyModel):
        module = module.module
    return module
