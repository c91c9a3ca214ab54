from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import yaml

from actors.protocol import Sessions
from serve_app.auth import new_key
from serve_app.settings import ServeSettings
from tests.serve_app.serving import served
from tests.support.sessions import MemorySessions


@pytest.fixture
def sessions() -> Sessions:
    return MemorySessions(limit=4, limit_per_user=3)


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    """A key for each of two users, and the file that knows them."""
    keys = {user: new_key(user) for user in ("alice", "bob")}
    entries = [key.entry.model_dump() for key in keys.values()]
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"keys": entries}))
    return {user: key.token for user, key in keys.items()}


@pytest.fixture
def settings(tmp_path: Path, tokens: dict[str, str]) -> ServeSettings:
    return ServeSettings(keys_file=tmp_path / "keys.yaml")


@pytest.fixture
async def url(sessions: Sessions, settings: ServeSettings) -> AsyncIterator[str]:
    async with served(sessions, settings) as url:
        yield url


@pytest.fixture
async def alice(url: str, tokens: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    async with client(url, tokens["alice"]) as http:
        yield http


@pytest.fixture
async def bob(url: str, tokens: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    async with client(url, tokens["bob"]) as http:
        yield http


def client(url: str, token: str | None) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=5)
