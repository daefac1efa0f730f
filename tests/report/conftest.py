"""The report's tests share `synthetic.py` and one headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from megarl.bench.common.browser import chromium


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver
