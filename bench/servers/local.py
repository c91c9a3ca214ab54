"""One process at its best: Troupe's edge over `LocalSessions`, on uvicorn, without Ray.

    python -m bench.servers.local SETTINGS_FILE        prints its URL, serves until it is ended

The same edge, loop, journal and model adapters as on a cluster, so what a house of processes costs is
the difference to this.
"""

import sys
from pathlib import Path

import uvicorn
import uvloop

from actors.kit import Kit
from actors.local import LocalSessions
from agent.agents import load_agents
from agent.journals import open_journal
from agent.model.routing import model_from
from bench.servers.listening import listening
from serve_app.app import create_app
from serve_app.settings import TroupeSettings, load_settings


async def _serve(settings: TroupeSettings) -> None:
    agent = settings.agent
    journal = await open_journal(agent.journal, agent.storage_dir)
    model = model_from(agent.model)
    kit = Kit(journal=journal, model=model, agent=agent, actors=settings.actors)
    dirs = [agent.agents_dir] if agent.agents_dir else []
    async with LocalSessions(kit, load_agents(dirs)) as sessions:
        app = create_app(sessions, settings.serve)
        config = uvicorn.Config(app, log_level="warning", access_log=False)
        await uvicorn.Server(config).serve(sockets=[listening()])
    await model.close()
    await journal.close()


if __name__ == "__main__":
    uvloop.run(_serve(load_settings([Path(sys.argv[1])])))
