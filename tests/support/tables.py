"""Prompt tables for tests, without files or tokenizers."""

import hashlib

from megarl.data.table import PromptTable


def table(n: int, name: str = "") -> PromptTable:
    """n prompts that differ by uid and text; `name` tells tables apart."""
    prompts = PromptTable()
    for i in range(n):
        uid = hashlib.blake2b(f"{name}{i}".encode(), digest_size=16).digest()
        prompts.append(uid, [i % 7 + 1], f"prompt {i}", f"answer {i}", "memory#", i)
    return prompts


class Counted:
    """As many prompts as one likes, of which nothing is held."""

    fingerprint = "counted"

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        return i

    def uid(self, i: int) -> str:
        return f"{i:032x}"
