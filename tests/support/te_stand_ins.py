"""Transformer Engine's modules as far as their parameters go, for Megatron's Transformer Engine spec without CUDA.

The names are Transformer Engine's own: `layer_norm_weight` beside `weight` in LayerNormLinear, `weight0`, `weight1` …
in GroupedLinear. Nothing here computes.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Parameter


class Norm(torch.nn.Module):
    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = Parameter(torch.empty(hidden_size))


class Attention(torch.nn.Module):
    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()


class ColumnLinear(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, *, config: TransformerConfig, bias: bool, **_: Any) -> None:
        super().__init__()
        rows = outputs // config.tensor_model_parallel_size
        self.weight = Parameter(torch.empty(rows, inputs))
        if bias:
            self.bias = Parameter(torch.empty(rows))


class NormColumnLinear(ColumnLinear):
    def __init__(self, inputs: int, outputs: int, **settings: Any) -> None:
        super().__init__(inputs, outputs, **settings)
        self.layer_norm_weight = Parameter(torch.empty(inputs))


class RowLinear(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, *, config: TransformerConfig, bias: bool, **_: Any) -> None:
        super().__init__()
        assert not bias
        self.weight = Parameter(torch.empty(outputs, inputs // config.tensor_model_parallel_size))


class GroupedLinear(torch.nn.Module):
    column = True

    def __init__(
        self, experts: int, inputs: int, outputs: int, *, config: TransformerConfig, bias: bool, **_: Any
    ) -> None:
        super().__init__()
        assert not bias
        size = config.expert_tensor_parallel_size
        shape = (outputs // size, inputs) if self.column else (outputs, inputs // size)
        for expert in range(experts):
            self.register_parameter(f"weight{expert}", Parameter(torch.empty(shape)))


class GroupedRowLinear(GroupedLinear):
    column = False


class StandIns(BackendSpecProvider):
    """Takes the place of Megatron's TESpecProvider."""

    def linear(self) -> type:
        return ColumnLinear

    def column_parallel_linear(self) -> type:
        return ColumnLinear

    def row_parallel_linear(self) -> type:
        return RowLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormColumnLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return Norm

    def core_attention(self) -> type:
        return Attention

    def grouped_mlp_modules(self, grouped: bool, legacy: bool) -> tuple[type, MLPSubmodules]:
        assert grouped and not legacy
        return TEGroupedMLP, MLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedRowLinear)

    def activation_func(self) -> None:
        return None
