from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors.protocol import Sessions
from actors.settings import ActorsSettings
from tests.support.house import kit_for, local_house

SMALL = ActorsSettings(
    max_sessions=5, max_sessions_per_user=3, page_wait_s=0.2, close_wait_s=2.0
)
"""The limits that the sessions contract is written for."""


@pytest.fixture
async def sessions(tmp_path: Path) -> AsyncIterator[Sessions]:
    async with local_house(kit_for(tmp_path, actors=SMALL)) as house:
        yield house
