"""Processes that wait for sessions, and what they are called."""

from pathlib import Path

from tests.support import cluster
from tests.support.http import User
from tests.support.processes import eventually

SOON_S = 30.0


async def test_a_process_is_named_by_the_session_in_it_and_then_waits_for_the_next(
    alice: User,
) -> None:
    session_id = await alice.opened()
    pid = await cluster.session_pid(session_id)

    async def is_called(what: str) -> bool:
        line = Path(f"/proc/{pid}/cmdline").read_text()  # noqa: ASYNC240 - the kernel answers at once
        return f"ray::SessionActor {what}" in line

    await eventually(lambda: is_called(session_id), SOON_S)
    await alice.http.post(f"/v1/sessions/{session_id}/close")
    await eventually(lambda: is_called("warm"), SOON_S)
    assert pid in await cluster.warm_pids()
