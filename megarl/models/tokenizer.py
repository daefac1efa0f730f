"""Loading a tokenizer from a folder; nothing is fetched and no code of the folder is run."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megarl.errors import UserError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder` (tokenizer.json and its companions)."""
    if not folder.is_dir():
        raise UserError(f"model.path: {folder} is not a folder")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as e:  # whatever the libraries make of damaged files
        reason = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise UserError(f"model.path: {folder} has no tokenizer that can be read: {reason}") from None
