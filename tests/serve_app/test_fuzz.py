"""The API holds to its own OpenAPI, whatever is sent: schemathesis over a socket, all checks on."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors.protocol import Sessions
from actors.settings import ActorsSettings
from serve_app.settings import ServeSettings
from tests.serve_app.serving import served
from tests.support.house import kit_for, local_house

HERE = Path(__file__).parent
LIMIT_S = 110
CONFIG = """
hooks = "{hooks}"
[generation]
deterministic = true
max-examples = 8
allow-x00 = false    # tests of their own say what happens to them
[phases.stateful]
max-steps = 6
"""


@pytest.fixture
async def sessions(tmp_path: Path) -> AsyncIterator[Sessions]:
    kit = kit_for(tmp_path, actors=ActorsSettings(page_wait_s=0.05))
    async with local_house(kit) as sessions:
        yield sessions


@pytest.mark.timeout(LIMIT_S + 10)
async def test_the_api_holds_to_its_own_openapi(
    sessions: Sessions, settings: ServeSettings, tokens: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG.format(hooks=HERE / "fuzz_hooks.py"))
    brief = settings.model_copy(update={"stream_max_s": 0.1})
    async with served(sessions, brief) as url:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "--no-color",
            "run", f"{url}/openapi.json", "--checks", "all", "--continue-on-failure",
            "--header", f"Authorization: Bearer {tokens['alice']}",
            cwd=tmp_path,
            env=os.environ | {"PYTHONWARNINGS": "default"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            async with asyncio.timeout(LIMIT_S):
                output, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
    assert process.returncode == 0, output.decode()
    assert "Stateful" in output.decode()
