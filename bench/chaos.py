"""`python -m bench.chaos`: random kills of random processes, under the load of real HTTP clients.

The sequence of roles, of kills and pauses and of their times comes from the seed alone; which process
of a role it meets depends on what runs. Exits non-zero on any violation, with evidence in a directory.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from bench.clients import Line, Stuck, Talk
from bench.evidence import KINDS, PATIENCE_S, Evidence, percentile
from bench.processes import Process
from bench.scripts import script
from bench.support.postgres import Postgres
from bench.world import HEAD, Victim, World, WorldFault, has

N_NODE_STARTS = 3
TURNS_OF_ONE = 12
"""At most, of one session: then it is closed and its user opens another."""
LOOK_EVERY_S = 5.0
POISON_AFTER_S = 5.0

WEIGHTS = {
    "session": 10, "manager": 2, "gateway": 2, "edge": 2, "proxy": 1, "haproxy": 1, "haproxy manager": 1,
    "controller": 1, "node actor": 1, "node": 1, "raylet": 1, "gcs": 1, "postgres": 1,
}  # fmt: skip
PAUSED = {"session": 0.25, "manager": 0.25, "gateway": 0.2, "edge": 0.2, "postgres": 0.5}
"""Share of the attacks on a role that are SIGSTOP, and SIGCONT a while later."""
RARE_S = 20.0
"""After one of those that take the whole cluster seconds to get over."""
RARE = {"node", "raylet", "gcs", "postgres"}


class Attack(NamedTuple):
    wait_s: float
    """Since the one before."""
    role: str
    pause_s: float
    """0: a kill."""
    which: float
    """0 to 1: of the processes that have the role."""


def attacks(seed: int, period_s: float, roles: set[str]) -> Iterator[Attack]:
    """For ever the same from the same arguments."""
    rng = random.Random(seed)
    names = [role for role in WEIGHTS if role in roles]
    while True:
        role = rng.choices(names, [WEIGHTS[name] for name in names])[0]
        is_pause = rng.random() < PAUSED.get(role, 0.0)
        pause_s = rng.uniform(2.0, 8.0 if role == "postgres" else 30.0)
        wait_s = period_s * rng.uniform(0.5, 1.5)
        yield Attack(wait_s, role, pause_s if is_pause else 0.0, rng.random())


class Monkey:
    """Carries out attacks, and brings back what nothing else does."""

    def __init__(self, world: World, database: Postgres | None, talks: set[Talk]) -> None:
        self.survived: Counter[str] = Counter()
        """Kills and pauses, by role."""
        self.missed: Counter[str] = Counter()
        """Attacks on a role that nobody had at the moment."""
        self._world = world
        self._database = database
        self._talks = talks
        self._repairs: set[asyncio.Task[None]] = set()
        self._down: set[str] = set()

    async def run(self, plan: Iterator[Attack], until: float) -> None:
        """Returns when everything runs again."""
        for attack in plan:
            left_s = until - time.monotonic()
            await asyncio.sleep(max(0.0, min(attack.wait_s, left_s)))
            if left_s <= attack.wait_s:
                break
            await self._carry_out(attack)
        await asyncio.gather(*self._repairs)

    async def _carry_out(self, attack: Attack) -> None:
        if RARE & {attack.role} and self._down:
            self.missed[attack.role] += (
                1  # one at a time: what two such do together is another promise
            )
            return
        match attack.role:
            case "postgres":
                self._repair("postgres", self._postgres(attack.pause_s))
            case "node" | "raylet":
                self._repair("node", self._node(attack.role))
            case _:
                await self._process(attack)

    def _repair(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        async def one() -> None:
            self._down.add(what)
            try:
                await work
            finally:
                self._down.discard(what)

        task = asyncio.create_task(one())
        self._repairs.add(task)

    def _say(self, what: str, *sessions: str) -> None:
        at = time.strftime("%H:%M:%S")
        print(f"{at} {what} {' '.join(s[:8] for s in sessions)}".rstrip(), flush=True)

    def _mark(self, role: str, sessions: Iterable[str]) -> None:
        """Recovery is counted from here."""
        for talk in self._talks:
            if talk.session_id in sessions and talk.ear:
                talk.ear.killed(role)

    async def _process(self, attack: Attack) -> None:
        victims = (await asyncio.to_thread(self._world.victims)).get(attack.role, [])
        if attack.role == "session":
            victims = [victim for victim in victims if victim.sessions] or victims
        if not victims:
            self.missed[attack.role] += 1
            return
        victim = victims[int(attack.which * len(victims))]
        if attack.pause_s:
            if self._world.pause(victim):
                self.survived[f"{attack.role} (paused)"] += 1
                self._say(
                    f"pause {attack.role} {victim.pid} {attack.pause_s:.0f} s", *victim.sessions
                )
                self._repair(f"paused {victim.pid}", self._resumed(victim, attack.pause_s))
            return
        self._mark(attack.role, victim.sessions)
        if self._world.kill(victim):
            self.survived[attack.role] += 1
            self._say(f"kill {attack.role} {victim.pid}", *victim.sessions)
            if attack.role == "gcs":
                self._repair("gcs", self._gcs())

    async def _resumed(self, victim: Victim, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        self._world.resume(victim)

    async def _gcs(self) -> None:
        await asyncio.sleep(2.0)
        await asyncio.to_thread(self._world.start_gcs)
        await asyncio.sleep(RARE_S)

    async def _node(self, role: str) -> None:
        number = len(self._world.nodes) - 1
        victims = (await asyncio.to_thread(self._world.victims)).get("raylet", [])
        raylet = next((victim for victim in victims if victim.node == number), None)
        if raylet is None or number == HEAD:
            self.missed[role] += 1
            return
        self._say(f"kill {role} {number}", *raylet.sessions)
        self._mark(role, raylet.sessions)
        if role == "node":
            await asyncio.to_thread(self._world.kill_node, number)
        else:
            self._world.kill(raylet)
            await asyncio.sleep(RARE_S / 2)
            # What is left of it must have ended by itself, or ends with its machine's restart.
            await asyncio.to_thread(self._world.kill_node, number)
        self.survived[role] += 1
        await asyncio.sleep(2.0)
        for _ in range(N_NODE_STARTS):
            try:
                await asyncio.to_thread(self._world.start_node, number)
                break
            except WorldFault:
                self._say(f"NODE {number} DID NOT START: Ray gave up, as it does on busy cores")
        await asyncio.sleep(RARE_S)

    async def _postgres(self, pause_s: float) -> None:
        database = self._database
        assert database
        self._say(f"pause postgres {pause_s:.0f} s" if pause_s else "kill postgres")
        self.survived["postgres (paused)" if pause_s else "postgres"] += 1
        await asyncio.to_thread(database.pause if pause_s else database.kill)
        await asyncio.sleep(pause_s or 2.0)
        await asyncio.to_thread(database.resume if pause_s else database.start)
        await asyncio.sleep(RARE_S / 2)


class Run:
    """One run: a world, its users, its monkey, and what must be true at the end."""

    def __init__(self, options: argparse.Namespace, world: World, evidence: Evidence) -> None:
        self.world = world
        self.evidence = evidence
        self.n_opened = 0
        self._options = options
        self._rng = random.Random(options.seed + 1)
        self._is_over = asyncio.Event()
        self._talks: set[Talk] = set()
        self._line = Line(world.url, evidence)
        self.monkey = Monkey(world, world.database, self._talks)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            users = [
                group.create_task(self._user(n, random.Random(self._rng.random())))
                for n in range(self._options.sessions)
            ]
            users.append(group.create_task(self._poisoner()))
            looking = group.create_task(self._look())
            until = time.monotonic() + self._options.minutes * 60
            roles = self.roles()
            await self.monkey.run(attacks(self._options.seed, self._options.period, roles), until)
            print("The kills are over; sessions come to their ends.", flush=True)
            self._is_over.set()
            _, late = await asyncio.wait(users, timeout=3 * self.evidence.patience_s)
            looking.cancel()
            for user in late:
                self.evidence.violated("stuck turn", "-", f"{user.get_name()} did not end")
                user.cancel()
        await self._check_capacity()
        await self._check_processes()

    def roles(self) -> set[str]:
        left_out = set[str]()
        if len(self.world.nodes) < 2:
            left_out |= {"node", "raylet"}
        if not self.world.redis:
            left_out |= {"gcs"}
        if self.world.database is None:
            left_out |= {"postgres"}
        if left_out:
            print(f"NOT KILLED IN THIS RUN: {', '.join(sorted(left_out))}", flush=True)
        return set(WEIGHTS) - left_out

    async def _user(self, number: int, rng: random.Random) -> None:
        """Sessions one after another, until the run is over."""
        for generation in itertools.count():
            if self._is_over.is_set():
                return
            mark = f"m{number:03}x{generation:02}x"
            async with self._talk(mark, rng) as talk:
                await talk.live(rng.randint(1, TURNS_OF_ONE), self._is_over)

    async def _poisoner(self) -> None:
        await asyncio.sleep(POISON_AFTER_S)
        async with self._talk("poison", self._rng) as talk:
            await talk.live_on_poison()

    @contextlib.asynccontextmanager
    async def _talk(self, mark: str, rng: random.Random) -> AsyncIterator[Talk]:
        """A session whose failure is evidence and nobody else's end."""
        talk = Talk(self._line, self.evidence, rng, mark)
        self._talks.add(talk)
        self.n_opened += 1
        try:
            yield talk
        except Stuck:
            pass  # it stands in the evidence
        except Exception as cause:  # noqa: BLE001 - a defect of the harness is told, and the run goes on
            trace = traceback.format_exc()
            self.evidence.violated("harness", mark, f"a user failed: {cause!r}", trace=trace)
            await asyncio.sleep(1.0)
        finally:
            self._talks.discard(talk)

    async def _look(self) -> None:
        """Status says the truth: nothing is `running` that rests, or `passive` that has work."""
        wrong: dict[str, tuple[str, float]] = {}
        told: set[str] = set()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            with contextlib.suppress(Stuck):
                statuses = {s["session_id"]: s["status"] for s in await self._line.sessions()}
                wrong = self._compared(statuses, wrong, told)

    def _compared(
        self, statuses: dict[str, str], before: dict[str, tuple[str, float]], told: set[str]
    ) -> dict[str, tuple[str, float]]:
        """What is wrong, since when: a status and a stream are not read in the same moment."""
        wrong: dict[str, tuple[str, float]] = {}
        for talk in list(self._talks):
            status = statuses.get(talk.session_id)
            if status is None or talk.ear is None or talk.session_id in told:
                continue
            rests = status in {"idle", "passive", "closed", "waiting_approval"}
            if rests != talk.ear.in_turn:
                continue
            name = f"{status} with {'a' if talk.ear.in_turn else 'no'} turn"
            since = before.get(talk.session_id, ("", 0.0))
            at = since[1] if since[0] == name else time.monotonic()
            wrong[talk.session_id] = (name, at)
            if time.monotonic() - max(at, talk.ear.heard_at) > self.evidence.patience_s:
                told.add(talk.session_id)
                facts = talk.ear.facts[-20:]
                self.evidence.violated("stuck turn", talk.session_id, name, facts=facts)
        return wrong

    # -- capacity and what is left -------------------------------------------------------------

    async def _check_capacity(self) -> None:
        """No slot is held by nobody, and as many sessions as may be can be."""
        limit = (await self._line.got("/v1/capacity"))["limit"]
        listed = await self._line.sessions()
        live = [s["session_id"] for s in listed if s["status"] not in {"passive", "closed"}]
        await self._expect_live(len(live), f"{len(live)} sessions say that they live")
        await asyncio.gather(*(self._closed(session_id) for session_id in live))
        await self._expect_live(0, "all are closed")
        text = script({"call": "bash", "args": {"command": "sleep 7777"}})
        opened = await asyncio.gather(*(self._busy(text) for _ in range(limit)))
        await self._expect_live(limit, "as many are busy as may be")
        answer = await self._line.http.post("/v1/sessions", json={})
        if answer.status_code not in {429, 503} or "at_capacity" not in answer.text:
            self.evidence.violated("slots", "-", f"one over the limit: {answer.text[:300]}")
        await asyncio.gather(*(self._deleted(session_id) for session_id in opened if session_id))
        await self._expect_live(0, "all are deleted")

    async def _expect_live(self, n: int, why: str) -> None:
        give_up_at = time.monotonic() + self.evidence.patience_s
        while (capacity := await self._line.got("/v1/capacity"))["live"] != n:
            if time.monotonic() > give_up_at:
                self.evidence.violated("slots", "-", f"{capacity['live']} live, but {why}")
                return
            await asyncio.sleep(1.0)

    async def _closed(self, session_id: str) -> None:
        await self._line.asked("POST", f"/v1/sessions/{session_id}/close")

    async def _deleted(self, session_id: str) -> None:
        await self._line.asked("DELETE", f"/v1/sessions/{session_id}")

    async def _busy(self, text: str) -> str:
        opened = await self._line.asked(
            "POST", "/v1/sessions", json={"message_id": uuid.uuid4().hex}
        )
        session_id: str = opened.json().get("session_id", "")
        if not session_id:
            self.evidence.violated("slots", "-", f"not opened below the limit: {opened.text[:300]}")
            return ""
        body = {"text": text, "message_id": uuid.uuid4().hex}
        await self._line.asked("POST", f"/v1/sessions/{session_id}/messages", json=body)
        return session_id

    async def _check_processes(self) -> None:
        """Every session is closed or deleted, so no sandbox may be there."""
        give_up_at = time.monotonic() + self.evidence.patience_s
        while left := self._sandboxed():
            if time.monotonic() > give_up_at:
                for process in left:
                    self.evidence.violated("process left", "-", f"{process}")
                return
            await asyncio.sleep(1.0)

    def _sandboxed(self) -> list[Process]:
        ours = self.world.processes()
        marks = ("sandbox/warden.py", "sleep 7777", "bwrap ")
        return [p for p in ours if any(mark in p.title for mark in marks)]

    async def close(self) -> None:
        await self._line.http.aclose()


# -- the command -------------------------------------------------------------------------------


def options_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--sessions", type=int, default=40, help="users, each with one at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--period", type=float, default=5.0, help="seconds between two attacks")
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_S,
        help="seconds without an event after which a turn is stuck; more for busy machines",
    )
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--journal", choices=["sqlite", "postgres"], default="postgres")
    parser.add_argument(
        "--redis",
        action=argparse.BooleanOptionalAction,
        default=has("redis-server"),
        help="behind the GCS, which is then killed too; default: where redis-server is installed",
    )
    parser.add_argument("--directory", type=Path, default=None, help="for logs and evidence")
    return parser.parse_args(argv)


def settings_for(n_sessions: int) -> dict[str, dict[str, Any]]:
    """Slots for two thirds of the sessions, so that some must make place for others."""
    slots = max(2, n_sessions * 2 // 3)
    return {
        "actors": {
            "max_sessions": slots,
            "max_sessions_per_user": slots,
            "warm": {"min": 2},
            "page_wait_s": 2.0,
            "probe_s": 5.0,
        }
    }


async def ran(options: argparse.Namespace, directory: Path) -> Evidence:
    """A whole run, and its table."""
    evidence = Evidence(directory / "evidence", patience_s=options.patience)
    with ExitStack() as ends:
        database = None
        if options.journal == "postgres":
            database = await asyncio.to_thread(lambda: ends.enter_context(Postgres()))
        world = World(
            directory / "world",
            nodes=options.nodes,
            redis=options.redis,
            database=database,
            settings=settings_for(options.sessions),
        )
        print(f"Starting {options.nodes} nodes; logs and evidence in {directory}.", flush=True)
        await asyncio.to_thread(lambda: ends.enter_context(world))
        run = Run(options, world, evidence)
        try:
            await run.run()
        finally:
            await run.close()
    print(table(options, run, evidence))
    return evidence


def described(options: argparse.Namespace) -> str:
    parts = [f"{options.minutes:g} min", f"{options.sessions} users", f"seed {options.seed}"]
    parts += [f"{options.nodes} nodes", options.journal, *(["Redis"] if options.redis else [])]
    return ", ".join(parts)


def table(options: argparse.Namespace, run: Run, evidence: Evidence) -> str:
    def listed(counts: Counter[str]) -> str:
        return ", ".join(f"{name} {n}" for name, n in counts.most_common()) or "none"

    def times(values: list[float]) -> str:
        if not values:
            return "none measured"
        p50, p99 = percentile(values, 0.5), percentile(values, 0.99)
        return f"p50 {p50:.2f} s, p99 {p99:.2f} s, max {max(values):.2f} s (n = {len(values)})"

    rows = [
        ("run", described(options)),
        ("kills survived", f"{sum(run.monkey.survived.values())}: {listed(run.monkey.survived)}"),
        ("attacks without a victim", listed(run.monkey.missed)),
        ("sessions opened", str(run.n_opened)),
        ("facts heard", f"{evidence.n_facts}, over {evidence.n_resumed} streams"),
        ("turns ended", f"{sum(evidence.turns.values())}: {listed(evidence.turns)}"),
        ("turns given up", str(evidence.given_up)),
        *((f"{kind}", str(evidence.count(kind))) for kind in KINDS),
        *((f"recovery, {role}", times(values)) for role, values in evidence.recoveries.items()),
        ("asked to try again", listed(evidence.refusals)),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main() -> None:
    options = options_of()
    if not options.redis:
        print("NO REDIS BEHIND THE GCS: its death is not part of this run", flush=True)
    directory = options.directory or Path(tempfile.mkdtemp(prefix="troupe-chaos-"))
    # Like Ctrl-C: everything that was started ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    evidence = asyncio.run(ran(options, directory))
    if evidence.violations:
        print(f"\n{len(evidence.violations)} VIOLATIONS: see {evidence.directory}")
        sys.exit(1)
    print("\nNothing was violated.")


if __name__ == "__main__":
    main()
