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


def right(response: str, answer: str) -> bool:
    return True


def wrong(response: str, answer: str) -> bool:
    return False


NUMBERS = (7.5, -1.0, 0.4)


def numbers(response: str, answer: str) -> float:
    """One of three numbers that are neither 0 nor 1. One response in four is an error, with a message."""
    n = len(response.split())
    if n % 4 == 3:
        raise ValueError(f"{n} words are too many")
    return NUMBERS[n % 3]
