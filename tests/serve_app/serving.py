"""The edge over a real socket, in the test's own loop."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import uvicorn

from actors.protocol import Sessions
from serve_app.app import create_app
from serve_app.settings import ServeSettings


class Announcing(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self.leaving = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        """Uvicorn's looks every 0.1 s whether to stop; hundreds of tests would wait for that."""
        await self.leaving.wait()


@asynccontextmanager
async def served(sessions: Sessions, settings: ServeSettings) -> AsyncGenerator[str, None]:
    """Serves until the end of the block; yields the URL."""
    config = uvicorn.Config(
        await asyncio.to_thread(create_app, sessions, settings),  # reads the keys file
        log_config=None,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    server = Announcing(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        task = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            async with asyncio.timeout(5):
                await server.listening.wait()
            yield f"http://127.0.0.1:{port}"
        finally:
            server.leaving.set()
            async with asyncio.timeout(5):
                await task
