"""Grading functions that a run must refuse before it starts."""


def one_argument(response: str) -> bool:
    return True


def no_verdict(response: str, answer: str) -> None:
    """It returns nothing."""


async def later(response: str, answer: str) -> bool:
    return True


def broken(response: str, answer: str) -> bool:
    return undefined_name in response  # type: ignore[name-defined]  # noqa: F821
