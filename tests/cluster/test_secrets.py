"""A user's token on a real cluster: it comes back after crashes, and no file has it."""

import asyncio
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.conftest import SECRETS_KEY_ENV, House
from tests.support import cluster
from tests.support.house import puppet
from tests.support.http import User
from tests.support.secrets import places_of

pytestmark = pytest.mark.timeout(180)

TOKEN = "hf_" + "batteryStapleHorse" * 2
WORK = puppet({"call": "bash", "args": {"command": "env; ls -la"}}, {"say": "done"})


def token_of(session_id: str) -> Any:
    def look(actor: Any) -> str | None:
        """The print of the token that tools of the session are given."""
        token = actor._host._activations[session_id].user_token
        return sha256(token.encode()).hexdigest() if token else None

    return look


async def held(session_id: str) -> str | None:
    actor = await cluster.host_of(session_id)
    return await cluster.got(actor.__ray_call__.remote(token_of(session_id)))


async def test_a_token_survives_its_processes_and_is_in_no_file(house: House, alice: User) -> None:
    answer = await alice.http.post("/v1/sessions", json={}, headers={"X-HF-Token": TOKEN})
    assert answer.status_code == 201
    session_id = answer.json()["session_id"]
    await alice.ended(session_id, WORK)
    cluster.kill(await cluster.session_pid(session_id), *await cluster.pids_of("manager"))
    await cluster.manager_answers()
    await alice.ended(session_id, WORK)
    assert await held(session_id) == sha256(TOKEN.encode()).hexdigest()
    other = await alice.opened()
    assert await held(other) is None
    await alice.command(session_id, "close")

    logs = Path(ray._private.worker._global_node.get_session_dir_path())
    roots = [house.settings.agent.storage_dir, logs]
    assert (roots[0] / "trajectories" / f"{session_id}.json").is_file()
    assert list(logs.rglob("worker-*"))  # noqa: ASYNC240 - a few hundred names
    for secret in (TOKEN, os.environ[SECRETS_KEY_ENV]):
        assert await asyncio.to_thread(places_of, secret, *roots) == []
