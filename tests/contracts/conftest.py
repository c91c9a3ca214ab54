import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors.protocol import Principal, Sessions
from tests.conftest import SMALL, USERS, House
from tests.support.house import kit_for, local_house


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.timeout(180))])
def place(request: pytest.FixtureRequest) -> House | None:
    """Where the sessions contract is tested: in this process, or on the run's cluster."""
    return request.getfixturevalue("house") if request.param == "ray" else None


@pytest.fixture
async def sessions(place: House | None, tmp_path: Path) -> AsyncIterator[Sessions]:
    if place is None:
        soon = SMALL.model_copy(update={"drain_s": 1.0})  # some leave turns that never end
        async with local_house(kit_for(tmp_path, actors=soon)) as house:
            yield house
        return
    from actors.client import connect  # imports Ray: only where a cluster is wanted

    sessions = await connect(place.settings.agent, place.settings.actors)
    yield sessions
    await asyncio.gather(*(_cleared(sessions, Principal(user)) for user in USERS))
    sessions.close()


async def _cleared(sessions: Sessions, who: Principal) -> None:
    while views := (await sessions.owned(who, limit=100, after=None)).data:
        for view in views:
            await sessions.delete(who, view.session_id)
