"""The run's Postgres, and places in it that nobody else uses."""

import uuid
from collections.abc import Iterator

import asyncpg
import pytest

from bench.support.postgres import Postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """For tests that leave it as it is; who stops or kills one starts one of their own."""
    with Postgres(flush=False) as server:
        yield server


async def empty_schema(url: str) -> str:
    """The URL of a new schema in that database."""
    name = f"test_{uuid.uuid4().hex}"
    db = await asyncpg.connect(url)
    await db.execute(f"CREATE SCHEMA {name}")
    await db.close()
    return f"{url}?search_path={name}"
