"""A folder of SmolLM2-135M, or of a random model of its shape where the package cannot be fetched."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoTokenizer

from megarl.bench.common.models import write_model
from tests.support import smollm2
from tests.support.tiny_rollout import byte_level_tokenizer


def smollm2_folder(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in Hugging Face's layout, written into `folder`."""
    folder.mkdir()
    try:
        tensors = smollm2.weights()
    except smollm2.NotFetchedError:
        sizes = {name: value for name, value in smollm2.CONFIG.items() if name not in ("architectures", "torch_dtype")}
        write_model(folder, "llama", **sizes | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}})
        byte_level_tokenizer(["Ġ t", "h e"]).save_pretrained(folder)
        return folder
    save_file(tensors, folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(str(smollm2.CACHE), gguf_file=smollm2.FILE)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(smollm2.CONFIG | {"eos_token_id": tokenizer.eos_token_id}))
    return folder
