"""A grader whose process dies at its first call and cannot be started again; $MEGARL_TEST_DIED is a file to note it."""

import os
from pathlib import Path

_died = Path(os.environ["MEGARL_TEST_DIED"])
if _died.exists():
    raise RuntimeError("the judge is gone")


def grade(response: str, answer: str) -> bool:
    _died.touch()
    os._exit(3)
