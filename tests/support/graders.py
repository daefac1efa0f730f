"""Graders that misbehave, by import path."""

import time


def hang(response: str, answer: str) -> bool:
    time.sleep(3600)
    return True


def fail(response: str, answer: str) -> bool:
    raise ValueError("the verifier is broken")


def odd(response: str, answer: str) -> bool:
    """Half of what a random model says is right."""
    return len(response.split()) % 2 == 1
