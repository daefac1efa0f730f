"""Graders that misbehave, by import path."""

import os
import time


def hang(response: str, answer: str) -> bool:
    time.sleep(3600)
    return True


def fail(response: str, answer: str) -> bool:
    raise ValueError("the verifier is broken")


def odd(response: str, answer: str) -> bool:
    """Half of what a random model says is right."""
    return len(response.split()) % 2 == 1


SLOW_SECONDS = 0.2


def slow(response: str, answer: str) -> bool:
    """As `odd`, after a while; then writes a byte to the file $MEGARL_TEST_GRADED."""
    time.sleep(SLOW_SECONDS)
    with open(os.environ["MEGARL_TEST_GRADED"], "ab") as file:
        file.write(b"!")
    return odd(response, answer)
