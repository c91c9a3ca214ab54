from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.model.contract import Model
from agent.testing import Reply, ScriptedModel
from tests.support.house import Burst, Echo, Effect, kit_for
from tests.support.stand import Stand

MakeStand = Callable[..., Stand]


@pytest.fixture(autouse=True)
def watched(no_blocking_calls: None) -> None:
    """Everything in here runs under the detector of blocking calls."""


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[MakeStand]:
    made: list[Stand] = []

    def make(
        *replies: Reply,
        model: Model | None = None,
        tools: Sequence[Any] = (),
        window: int = 128_000,
        **kit: Any,
    ) -> Stand:
        model = model or ScriptedModel(replies, window_tokens=window)
        tools = [Echo(), Effect(), Burst(), *tools]
        made.append(Stand(kit_for(tmp_path, model=model, tools=tools, **kit)))
        return made[-1]

    yield make
    for each in made:
        await each.close()
