"""What Ray itself costs, without anything of ours: an empty actor's process, and a page between two actors.

    uv run python -m bench.ray_floor [--save NAME]        a minute and a half

- An actor without a method that does anything: CPU while idle, by thread, memory, and CPU until it answers.
- Pages of 120 bytes, 20 a second from each of ten actors to one reader, by Ray's streaming generator, a
  unary call per page, a grpc.aio stream, a plain asyncio socket. CPU of either end, less what it takes idle.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

from bench.saved import save
from bench.systems import pss_bytes_of

N_EMPTY = 4
N_SENDERS = 10
RATE = 20
SECONDS = 6.0
N_PAGES = int(RATE * SECONDS)
PAGE = b"x" * 120
SETTLE_S = 5.0
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
}

Figures = dict[str, float]


class Empty:
    async def used(self) -> tuple[int, float]:
        """Its process, and the CPU that it used."""
        return os.getpid(), time.process_time()


class Sender:
    """Each way sends `N_PAGES` pages, one every 1/`RATE` s."""

    def __init__(self) -> None:
        self._servers: list[Any] = []
        """That nobody collects them."""

    async def cpu_s(self) -> float:
        return time.process_time()

    async def pages(self) -> AsyncGenerator[bytes]:
        for _ in range(N_PAGES):
            await asyncio.sleep(1 / RATE)
            yield PAGE

    async def page(self) -> bytes:
        await asyncio.sleep(1 / RATE)
        return PAGE

    async def socket_port(self) -> int:
        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async for page in self.pages():
                writer.write(len(page).to_bytes(4, "little") + page)
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        self._servers.append(server)
        return server.sockets[0].getsockname()[1]

    async def grpc_port(self) -> int:
        import grpc  # in the actor's process

        async def answer(_: bytes, __: Any) -> AsyncGenerator[bytes]:
            async for page in self.pages():
                yield page

        class Pages(grpc.GenericRpcHandler):
            def service(self, _: Any) -> Any:
                return grpc.unary_stream_rpc_method_handler(answer)

        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Pages(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self._servers.append(server)
        return port


class Reader:
    async def cpu_s(self) -> float:
        return time.process_time()

    async def by_generator(self, senders: list[Any]) -> None:
        async def one(sender: Any) -> None:
            async for page in sender.pages.options(num_returns="streaming").remote():
                await page

        await asyncio.gather(*map(one, senders))

    async def by_unary(self, senders: list[Any]) -> None:
        async def one(sender: Any) -> None:
            for _ in range(N_PAGES):
                await sender.page.remote()

        await asyncio.gather(*map(one, senders))

    async def by_socket(self, ports: list[int]) -> None:
        async def one(port: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(N_PAGES):
                size = int.from_bytes(await reader.readexactly(4), "little")
                await reader.readexactly(size)
            writer.close()

        await asyncio.gather(*map(one, ports))

    async def by_grpc(self, ports: list[int]) -> None:
        import grpc  # in the actor's process

        async def one(port: int) -> None:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                async for _ in channel.unary_stream("/bench/pages")(b""):
                    pass

        await asyncio.gather(*map(one, ports))


# -- an empty process ------------------------------------------------------------------------------


def threads(pid: int) -> dict[int, tuple[float, int]]:
    """CPU in ms and voluntary switches of each thread of a process."""
    found: dict[int, tuple[float, int]] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        used_ns = int((task / "schedstat").read_text().split()[0])
        status = (task / "status").read_text()
        wakes = int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        found[int(task.name)] = (used_ns / 1e6, wakes)
    return found


def empty(ray: Any) -> Figures:
    actors = [ray.remote(num_cpus=0)(Empty).remote() for _ in range(N_EMPTY)]
    began = ray.get([actor.used.remote() for actor in actors])
    pids = [pid for pid, _ in began]
    time.sleep(SETTLE_S)
    before = {pid: threads(pid) for pid in pids}
    time.sleep(SECONDS)
    after = {pid: threads(pid) for pid in pids}
    idle_ms = [_used_ms(before[pid], after[pid]) for pid in pids]
    main_ms = [after[pid][pid][0] - before[pid][pid][0] for pid in pids]
    wakes = [after[pid][pid][1] - before[pid][pid][1] for pid in pids]
    figures = {
        "empty_idle_ms_per_s": statistics.fmean(idle_ms) / SECONDS,
        "empty_main_idle_ms_per_s": statistics.fmean(main_ms) / SECONDS,
        "empty_main_wakes_per_s": statistics.fmean(wakes) / SECONDS,
        "empty_pss_mb": statistics.median(map(pss_bytes_of, pids)) / 1024**2,
        "empty_start_cpu_s": statistics.median(cpu_s for _, cpu_s in began),
    }
    for actor in actors:
        ray.kill(actor)
    return figures


def _used_ms(before: dict[int, tuple[float, int]], after: dict[int, tuple[float, int]]) -> float:
    return sum(ms - before.get(thread, (0.0, 0))[0] for thread, (ms, _) in after.items())


# -- a page between two ----------------------------------------------------------------------------


def hops(ray: Any) -> Figures:
    senders = [ray.remote(num_cpus=0)(Sender).remote() for _ in range(N_SENDERS)]
    reader = ray.remote(num_cpus=0)(Reader).remote()
    ports = ray.get([sender.socket_port.remote() for sender in senders])
    grpc_ports = ray.get([sender.grpc_port.remote() for sender in senders])

    def used_s(work: Callable[[], Any]) -> tuple[float, float, float]:
        """By the senders, by the reader, and how long it took."""

        def cpu_s() -> tuple[float, float]:
            ends = ray.get([one.cpu_s.remote() for one in (*senders, reader)])
            return sum(ends[:-1]), ends[-1]

        before, began_s = cpu_s(), time.monotonic()
        work()
        took_s, after = time.monotonic() - began_s, cpu_s()
        return after[0] - before[0], after[1] - before[1], took_s

    ray.get(reader.cpu_s.remote())  # it is there, before it is seen idle
    time.sleep(SETTLE_S)
    *idle, idle_s = used_s(lambda: time.sleep(SECONDS))
    ways: dict[str, Callable[[], Awaitable[None]]] = {
        "generator": lambda: reader.by_generator.remote(senders),
        "unary": lambda: reader.by_unary.remote(senders),
        "grpc": lambda: reader.by_grpc.remote(grpc_ports),
        "socket": lambda: reader.by_socket.remote(ports),
    }
    figures: Figures = {}
    for way, begin in ways.items():
        *used, took_s = used_s(lambda begin=begin: ray.get(begin()))
        for end, mine_s, idle_of_s in zip(("sender", "reader"), used, idle, strict=True):
            own_s = mine_s - idle_of_s * took_s / idle_s
            figures[f"{way}_{end}_us_per_page"] = own_s / (N_SENDERS * N_PAGES) * 1e6
    return figures


def measured() -> Figures:
    """On a Ray of its own. Blocking."""
    os.environ.update(ENVIRONMENT)
    os.environ.pop("RAY_ADDRESS", None)
    import ray  # after its environment

    ray.init(address="local", include_dashboard=False, num_cpus=1, log_to_driver=False)
    try:
        found = empty(ray) | hops(ray)
    finally:
        ray.shutdown()
    return {f"ray.{name}": value for name, value in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", metavar="NAME")
    asked = parser.parse_args()
    load_before = os.getloadavg()[0]
    figures = measured()
    for name, value in figures.items():
        print(f"{name} = {value:.4g}")
    print(f"load average before: {load_before:.2f}")
    if asked.save:
        save(asked.save, "ray_floor", figures, load_before=load_before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
