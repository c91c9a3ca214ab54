"""Users over real HTTP on the run's one cluster."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import httpx
import pytest

from tests.conftest import House
from tests.support.http import WAIT_S, User


@pytest.fixture(scope="session")
def ray_cluster(house: House) -> House:
    """Ray with Serve, for tests that bring their own actors and deployments."""
    return house


@pytest.fixture
async def users(house: House) -> AsyncIterator[dict[str, User]]:
    """Every user of the house. What they opened is deleted afterwards."""
    async with AsyncExitStack() as stack:
        found: dict[str, User] = {}
        for name, key in house.keys.items():
            http = httpx.AsyncClient(
                base_url=house.url,
                headers={"Authorization": f"Bearer {key}"},
                timeout=WAIT_S,
                limits=httpx.Limits(max_connections=100),
            )
            found[name] = User(name, await stack.enter_async_context(http))
        yield found
        await asyncio.gather(*(user.cleared() for user in found.values()))


@pytest.fixture
def alice(users: dict[str, User]) -> User:
    return users["alice"]


@pytest.fixture
def bob(users: dict[str, User]) -> User:
    return users["bob"]
