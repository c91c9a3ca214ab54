"""One real cluster for the whole run: Ray, Serve, manager, gateway and edge, as `troupe up` starts them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from blockbuster import blockbuster_ctx

from actors.settings import ActorsSettings, WarmSettings
from agent import logs
from agent.settings import AgentSettings, SecretsSettings
from agent.vault import new_key as new_secrets_key
from serve_app.auth import new_key
from serve_app.cluster import Cluster, prepare_environment
from serve_app.settings import ServeSettings, TroupeSettings
from tests.support.house import AGENTS
from tests.support.postgres import postgres  # noqa: F401  the fixture

# Ray reads its switches when it is imported, which test modules do before the house starts.
prepare_environment(os.environ, ServeSettings())

logs.configure()

USERS = ("alice", "bob", "carol", "dave", "erin")
SMALL = ActorsSettings(
    max_sessions=5,
    max_sessions_per_user=3,
    warm=WarmSettings(min=4),  # most tests then reuse processes instead of starting them
    page_wait_s=0.2,
    close_wait_s=2.0,
    probe_s=2.0,
    sweep_s=2.0,
    max_readers=110,  # more than any test has, and few enough to fill up
)
"""The limits that the sessions contract is written for."""
SECRETS_KEY_ENV = "TROUPE_TEST_SECRETS_KEY"


class House(NamedTuple):
    url: str
    settings: TroupeSettings
    keys: dict[str, str]
    """The bearer key of each user."""


def house_settings(
    storage_dir: Path, *, actors: ActorsSettings = SMALL
) -> tuple[TroupeSettings, dict[str, str]]:
    """Settings for a house with keys, and the keys."""
    keys = {user: new_key(user) for user in USERS}
    keys_file = storage_dir / "keys.yaml"
    keys_file.write_text(yaml.safe_dump({"keys": [k.entry.model_dump() for k in keys.values()]}))
    settings = TroupeSettings(
        agent=AgentSettings(
            storage_dir=storage_dir,
            agents_dir=AGENTS,
            default_agent="tester",
            secrets=SecretsSettings(key_env=SECRETS_KEY_ENV),
        ),
        actors=actors,
        serve=ServeSettings(port=0, keys_file=keys_file),
    )
    return settings, {user: key.token for user, key in keys.items()}


@pytest.fixture
def no_blocking_calls() -> Iterator[None]:
    """Our code fails where it blocks an event loop. Not for tests that load litellm: the detector
    looks at every `stat` of an import."""
    with blockbuster_ctx(["agent", "actors"]) as detector:
        for function in detector.functions.values():
            # A traceback reads the source once: a defect is being logged.
            function.can_block_in("structlog/_frames.py", {"_format_exception"})
        yield


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    settings, keys = house_settings(tmp_path_factory.mktemp("house"))
    os.environ[SECRETS_KEY_ENV] = new_secrets_key()
    cluster = Cluster(settings)
    running = cluster.start()
    try:
        yield House(running.url, settings, keys)
    finally:
        cluster.stop()
