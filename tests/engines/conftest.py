"""Fixtures for tests on real engine servers: one model folder, one server of each kind a session."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator

import pytest

from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.servers import factory
from tests.support.real_servers import KEY_VARIABLE, TOKENIZER, Live, Policy, settings
from tests.support.tiny_policy import make_model


@pytest.fixture(scope="session", autouse=True)
def api_key() -> Iterator[str]:
    """The key of every real server."""
    key = secrets.token_urlsafe(24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, key)
        yield key


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("policy")
    return Policy(folder, make_model(folder))


@pytest.fixture(scope="session", params=["sglang", "vllm"])
def live(
    request: pytest.FixtureRequest, policy: Policy, api_key: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    """One server of each kind, started once; tests that need another number start their own."""
    pool = factory.build(settings(policy, tmp_path_factory.mktemp("run"), request.param), Vocabulary(TOKENIZER))
    with asyncio.Runner() as runner:
        runner.run(pool.start())
        yield Live(pool, runner)
        runner.run(pool.close())
