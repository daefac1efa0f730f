"""Replaces the compiled `sglang-kernel` package on a CPU, for which it has no wheel.

SGLang imports these names on a CPU even if it never calls them. We register no `torch.ops.sgl_kernel` operator, so
SGLang finds no AMX support and uses its plain-torch layers. The functions of speculative decoding raise when called.
"""

import torch

__version__ = "0.0.0+cpu"

_SPECULATIVE_ONLY = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)


def _refusing(name):
    def refuse(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name}: speculative decoding needs the compiled kernels (CUDA)")

    refuse.__name__ = name
    return refuse


globals().update({name: _refusing(name) for name in _SPECULATIVE_ONLY})


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Write each request's newly allocated cache slots into its row of the request-to-token table."""
    lengths = (end_offset - start_offset).tolist()
    for row, start, length, slots in zip(
        req_pool_indices.tolist(), start_offset.tolist(), lengths, torch.split(out_cache_loc, lengths), strict=True
    ):
        req_to_token[row, start : start + length] = slots.to(req_to_token.dtype)
