"""What a session's process loads. There are hundreds: each megabyte and each second of CPU counts so often."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LISTED = ROOT / "tests" / "lean_imports.txt"
"""Top-level packages that are neither of the standard library nor ours. Add to it only what every session
needs; what one needs now and then is imported where that begins."""
TOO_HEAVY = {"litellm", "openai", "httpx", "fastapi", "starlette", "uvicorn", "asyncpg", "mcp"}

PROBE = """
import asyncio, json, sys
from pathlib import Path
import actors.session
from agent.agents import load_agents
from agent.settings import AgentSettings
from actors.settings import ActorsSettings

async def main():
    agent = AgentSettings(storage_dir=Path(sys.argv[1]))
    kit = await actors.session.kit_of(agent, ActorsSettings())
    kit.tools(load_agents([])[agent.default_agent])
    await kit.journal.close()

asyncio.run(main())
ours = {"agent", "actors", "serve_app", "__main__", "__mp_main__"}
tops = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names - ours
print(json.dumps([sorted(tops), "ray.serve" in sys.modules]))
"""


def test_a_sessions_process_loads_what_is_listed_and_no_more(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=50, check=True,
    )  # fmt: skip
    loaded, serve = json.loads(done.stdout.splitlines()[-1])
    # Parts of compiled modules, which name the tool that made them and its version.
    found = {name for name in loaded if not name.startswith(("_cython_", "_sysconfigdata_"))}
    listed = set(LISTED.read_text().split())
    assert found - listed == set(), "new in every session's process"
    assert not serve
    assert not found & TOO_HEAVY
    assert listed - found == set(), "not loaded any more: take it off the list"
