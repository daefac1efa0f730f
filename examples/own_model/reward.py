"""1 when the last number is right, 0.2 for any other number, 0 for none."""

import re


def grade(response: str, answer: str) -> float:
    numbers = re.findall(r"\d+", response)
    return 1.0 if numbers[-1:] == [answer] else 0.2 if numbers else 0.0
