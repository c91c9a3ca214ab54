"""Users of a Troupe under chaos: they speak HTTP v1, repeat what was not answered under its key, come
back to streams with their cursor, and check all that they hear.

Nothing here knows how Troupe works inside. What is wrong goes to the `Evidence`; a user goes on.
"""

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx

from bench.evidence import Evidence
from bench.scripts import Script, cat_marks, draw, poison
from serve_app.sse_client import Event, Lines, Lost

IDLE_LIMIT_S = 45.0
"""Heartbeats come every 15 s."""
DELTAS = {"text_delta", "tool_output_delta"}
OPENERS = {"user_message", "approval_decided", "compaction_requested", "seed_requested"}
TRY_AGAIN = {429, 500, 502, 503, 504}
GIVEN_UP = "recovery_exhausted"
MAX_PAUSE_S = 2.0
KEPT_FACTS = 60
"""Of a session, in the evidence of one violation: the newest."""


class Stuck(Exception):
    """What should have come did not; it stands in the evidence."""


class Line:
    """HTTP to the world. Its address may change when the whole cluster is started again."""

    def __init__(self, url: str, evidence: Evidence) -> None:
        self._evidence = evidence
        self.http = httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(30.0, read=IDLE_LIMIT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def asked(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The first answer that is no `try again`.

        Raises:
            Stuck
        """
        limit_s = 2 * self._evidence.patience_s
        give_up_at = time.monotonic() + limit_s
        pause_s = 0.1
        while True:
            said: Any = "no connection"
            try:
                answer = await self.http.request(method, path, **options)
            except httpx.TransportError:
                self._evidence.refusals["lost"] += 1
            else:
                if not is_to_be_repeated(answer):
                    return answer
                said = answer.text[:500]
                self._evidence.refusals[f"{answer.status_code} {code_of(answer)}"] += 1
                if code_of(answer) == "internal":
                    self._evidence.violated("refused wrongly", path, "500 internal", answer=said)
            if time.monotonic() > give_up_at:
                self._evidence.violated(
                    "refused wrongly", path, f"{method}: no answer in {limit_s:.0f} s", last=said
                )
                raise Stuck
            await asyncio.sleep(pause_s * random.uniform(0.7, 1.3))
            pause_s = min(pause_s * 2, MAX_PAUSE_S)

    async def got(self, path: str, **params: Any) -> Any:
        answer = await self.asked("GET", path, params=params)
        if answer.status_code != 200:
            self._evidence.violated("refused wrongly", path, answer.text[:500])
            raise Stuck
        return answer.json()

    async def sessions(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        params: dict[str, Any] = {"limit": 100}
        while True:
            page = await self.got("/v1/sessions", **params)
            found += page["data"]
            if not page["next"]:
                return found
            params["after"] = page["next"]

    @contextlib.asynccontextmanager
    async def stream(self, path: str, **options: Any) -> AsyncIterator[httpx.Response]:
        async with self.http.stream("GET", path, **options) as response:
            if response.status_code != 200:
                await response.aread()
            yield response


def is_to_be_repeated(answer: httpx.Response) -> bool:
    # A proxy that has just started knows no routes yet and finds nothing (Serve 2.60), in plain text.
    lost = answer.status_code == 404 and code_of(answer) == "plain"
    return lost or answer.status_code in TRY_AGAIN


def code_of(answer: httpx.Response) -> str:
    try:
        return str(answer.json().get("code"))
    except (ValueError, AttributeError):
        return "plain"  # not Troupe but a proxy on the way


class Ear:
    """Hears one session from its first fact to its last, over any number of connections."""

    def __init__(self, line: Line, evidence: Evidence, session_id: str) -> None:
        self.session_id = session_id
        self.facts: list[dict[str, Any]] = []
        self.ends: dict[int, dict[str, Any]] = {}
        """`turn_ended` by turn."""
        self.heard_at = time.monotonic()
        self._line = line
        self._evidence = evidence
        self._texts: dict[str, str] = {}
        self._cursor = ""
        self._open: set[int] = set()
        self._news = asyncio.Event()
        self._killed: tuple[str, float] | None = None
        self.is_closed = False

    @property
    def in_turn(self) -> bool:
        return bool(self._open)

    def killed(self, role: str) -> None:
        """The process under the session is killed in this moment."""
        if self.in_turn and self._killed is None:
            self._killed = (role, time.monotonic())

    async def listen(self) -> None:
        """Until the session is closed."""
        pause_s = 0.05
        path = f"/v1/sessions/{self.session_id}/events"
        while not self.is_closed:
            n_before = len(self.facts)
            headers = {"Last-Event-ID": self._cursor} if self._cursor else {}
            try:
                async with self._line.stream(path, headers=headers) as response:
                    if response.status_code == 200:
                        await self._heard(response)
                    else:
                        self._refused(response)
            except httpx.TransportError:
                self._evidence.refusals["stream lost"] += 1
            except Lost as cause:
                self._violated("text gap", f"no event: {cause}")
            self._evidence.n_resumed += 1
            pause_s = 0.05 if len(self.facts) > n_before else min(pause_s * 2, 1.0)
            if not self.is_closed:
                await asyncio.sleep(pause_s)

    async def _heard(self, response: httpx.Response) -> None:
        lines = Lines()
        async for line in response.aiter_lines():
            if event := lines.feed(line):
                self.take(event)
                self._cursor = event.cursor or self._cursor
                if self.is_closed:
                    return

    def _refused(self, response: httpx.Response) -> None:
        if is_to_be_repeated(response):
            self._evidence.refusals[f"{response.status_code} {code_of(response)}"] += 1
            return
        # 422: the cursor is ahead of the session: facts that were told of are gone.
        kind = "fact lost" if response.status_code == 422 else "refused wrongly"
        self._violated(kind, f"GET events after {self._cursor}: {response.text[:300]}")
        self._cursor = ""

    def take(self, event: Event) -> None:
        self.heard_at = time.monotonic()
        if event.type in DELTAS:
            self._take_delta(event.data)
        else:
            self._take_fact(event.data)
        self._news.set()
        self._news = asyncio.Event()

    def _take_delta(self, delta: dict[str, Any]) -> None:
        part = delta.get("part_id") or delta["tool_call_id"]
        known = self._texts.get(part, "")
        if delta["offset"] > len(known):
            self._violated("text gap", f"{part}: {len(known)} known, then {delta['offset']}")
        elif delta["offset"] < len(known):
            self._violated("text repeated", f"{part}: {len(known)} known, then {delta['offset']}")
        self._texts[part] = known[: delta["offset"]] + delta["text"]

    def _take_fact(self, fact: dict[str, Any]) -> None:
        last = self.facts[-1]["seq"] if self.facts else 0
        if fact["seq"] <= last:
            self._violated("fact repeated", f"{fact['seq']} after {last}", fact=fact)
            return
        if fact["seq"] != last + 1:
            self._violated("fact lost", f"{fact['seq']} after {last}", fact=fact)
        self.facts.append(fact)
        self._evidence.n_facts += 1
        self._follow(fact)

    def _follow(self, fact: dict[str, Any]) -> None:
        kind, turn = fact["type"], fact["turn"]
        if kind in OPENERS:
            self._open.add(turn)
        elif kind == "assistant_message":
            shown = self._texts.pop(fact["part_id"], "")
            if not fact["text"].startswith(shown):
                self._violated("text gap", "the message is not what was shown", fact=fact)
        elif kind == "turn_ended":
            self._ended(fact)
        elif kind == "activated":
            self._texts.clear()  # what was being written is abandoned, or run again from its start
            if self._killed:
                role, killed_at = self._killed
                self._evidence.recovered(role, time.monotonic() - killed_at)
                self._killed = None
        elif kind == "session_closed":
            self.is_closed = True

    def _ended(self, fact: dict[str, Any]) -> None:
        turn = fact["turn"]
        if turn in self.ends:
            self._violated("fact repeated", f"turn {turn} ended twice", fact=fact)
        self._open.discard(turn)
        self._killed = None
        self.ends[turn] = fact

    def _violated(self, kind: str, what: str, **shown: Any) -> None:
        self._evidence.violated(
            kind, self.session_id, what, facts=self.facts[-KEPT_FACTS:], **shown
        )

    async def ended(self, turn: int) -> dict[str, Any]:
        """The `turn_ended` of a turn, once it is heard.

        Raises:
            Stuck
        """
        asked_at = time.monotonic()
        while turn not in self.ends:
            left_s = max(asked_at, self.heard_at) + self._evidence.patience_s - time.monotonic()
            news = self._news
            try:
                async with asyncio.timeout(left_s):
                    await news.wait()
            except TimeoutError:
                await self._is_stuck(turn)
        return self.ends[turn]

    async def _is_stuck(self, turn: int) -> None:
        view = await self._line.got(f"/v1/sessions/{self.session_id}")
        stored = await self.journal()
        what = f"turn {turn}: no event for {self._evidence.patience_s:.0f} s, the session is {view['status']}"
        self._violated("stuck turn", what, view=view, journal=stored[-KEPT_FACTS:])
        raise Stuck

    async def journal(self) -> list[dict[str, Any]]:
        """The session's facts as they are stored, read from the beginning."""
        path = f"/v1/sessions/{self.session_id}/events"
        give_up_at = time.monotonic() + 2 * self._evidence.patience_s
        facts: list[dict[str, Any]] = []
        cursor = "0.0.0"
        while time.monotonic() < give_up_at:
            try:
                params = {"follow": "false", "after": cursor}
                async with self._line.stream(path, params=params) as response:
                    lines = Lines()
                    async for line in response.aiter_lines():
                        if event := lines.feed(line):
                            cursor = event.cursor
                            if event.type not in DELTAS:
                                facts.append(event.data)
                    if response.status_code == 200 and not lines.may_go_on:
                        view = await self._line.got(f"/v1/sessions/{self.session_id}")
                        if facts and facts[-1]["seq"] >= int(view["cursor"].split(".")[0]):
                            return facts
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)
        self._violated("refused wrongly", "the journal could not be read")
        raise Stuck


class Sent:
    """A message that was acknowledged."""

    def __init__(self, message_id: str, script: Script, accepted: dict[str, Any]) -> None:
        self.message_id = message_id
        self.script = script
        self.turn: int = accepted["turn"]
        self.seq = int(accepted["cursor"].split(".")[0])


class Talk:
    """One session, as its user sees it: opened, kept busy, checked and closed."""

    def __init__(self, line: Line, evidence: Evidence, rng: random.Random, mark: str) -> None:
        self.session_id = ""
        self.ear: Ear | None = None
        self._line = line
        self._evidence = evidence
        self._rng = rng
        self._mark = mark
        self._sent: list[Sent] = []

    async def live(self, n_turns: int, is_over: asyncio.Event) -> None:
        """The whole life of the session; ends early when the run is over."""
        async with self.opened("loader") as ear:
            for n in range(n_turns):
                await self._turn(ear, draw(self._rng, f"{self._mark}{n:03}"))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._rng.uniform(0.0, 3.0)):
                        await is_over.wait()
                if is_over.is_set():
                    break
            await self._check_effects(ear)
            await self.check_journal(ear)
            await self.close(ear)

    async def live_on_poison(self) -> None:
        """A turn that kills its process each time is given up, and the session is then as any."""
        async with self.opened("poison") as ear:
            sent = await self.say(poison())
            end = await ear.ended(sent.turn)
            if (end["reason"], end["code"]) != ("failed", GIVEN_UP) or not end["detail"]:
                self._violated("wrong outcome", "poison was not given up", end=end)
            self._evidence.turns["given up (poison)"] += 1
            await self.check_journal(ear)
            await self.close(ear)

    @contextlib.asynccontextmanager
    async def opened(self, agent: str) -> AsyncIterator[Ear]:
        body = {"agent": agent, "title": self._mark, "message_id": uuid.uuid4().hex}
        answer = await self._line.asked("POST", "/v1/sessions", json=body)
        if answer.status_code != 201:
            self._violated("refused wrongly", f"open: {answer.text[:300]}")
            raise Stuck
        self.session_id = answer.json()["session_id"]
        self.ear = Ear(self._line, self._evidence, self.session_id)
        listening = asyncio.create_task(self.ear.listen())
        try:
            yield self.ear
        finally:
            listening.cancel()
            await asyncio.wait([listening])
            if not listening.cancelled() and (cause := listening.exception()):
                self._violated("harness", f"the reader failed: {cause!r}")

    # -- turns ---------------------------------------------------------------------------------

    async def _turn(self, ear: Ear, script: Script) -> None:
        sent = await self.say(script)
        if script.interrupt_after_s is not None:
            await asyncio.sleep(script.interrupt_after_s)
            await self.command("interrupt", allowed=(202, 409))
        end = await ear.ended(sent.turn)
        while end["reason"] == "approval":
            end = await ear.ended(await self._decide(ear, script))
        self._judge(ear, sent, end)

    async def say(self, script: Script) -> Sent:
        message_id = uuid.uuid4().hex
        accepted = await self.command("messages", message_id, text=script.text)
        self._sent.append(Sent(message_id, script, accepted))
        return self._sent[-1]

    async def _decide(self, ear: Ear, script: Script) -> int:
        asks = [fact for fact in ear.facts if fact["type"] == "approval_requested"][-1]["asks"]
        decisions = [
            {"tool_call_id": ask["tool_call_id"], "decision": script.decision} for ask in asks
        ]
        return (await self.command("approvals", decisions=decisions))["turn"]

    async def command(
        self,
        name: str,
        message_id: str | None = None,
        *,
        allowed: tuple[int, ...] = (202,),
        **body: Any,
    ) -> dict[str, Any]:
        body["message_id"] = message_id or uuid.uuid4().hex
        path = f"/v1/sessions/{self.session_id}/{name}"
        answer = await self._line.asked("POST", path, json=body)
        if answer.status_code not in allowed:
            self._violated("refused wrongly", f"{name}: {answer.status_code} {answer.text[:300]}")
            raise Stuck
        return answer.json()

    def _judge(self, ear: Ear, sent: Sent, end: dict[str, Any]) -> None:
        reason, code = end["reason"], end["code"]
        if code == GIVEN_UP:
            self._evidence.given_up += 1
            # The limit is per window and turn, and 3 by default: the journal tells of each.
            n = sum(f["type"] == "activated" and f["reason"] == "recovered" for f in ear.facts)
            if n <= 3:
                self._violated("given up too early", f"after {n} recoveries", facts=ear.facts)
            return
        self._evidence.turns[reason if code is None else f"{reason}: {code}"] += 1
        expected = (
            {"done", "interrupted"} if sent.script.interrupt_after_s is not None else {"done"}
        )
        if reason not in expected:
            self._violated("wrong outcome", f"turn {end['turn']}: {reason} {code}", facts=ear.facts)

    # -- what must be true at the end ----------------------------------------------------------

    async def _check_effects(self, ear: Ear) -> None:
        """Each effect happened at most once, and once where it was reported."""
        listed = await self._listed(ear)
        reported = {f["tool_call_id"]: f for f in ear.facts if f["type"] == "tool_finished"}
        for sent in self._sent:
            if not sent.script.mark:
                continue
            n = listed.count(sent.script.mark)
            started = [
                f for f in ear.facts
                if f["type"] == "tool_started" and sent.script.mark in f["arguments"]
                and "marks.txt" in f["arguments"]
            ]  # fmt: skip
            ok = any(reported[f["tool_call_id"]]["outcome"] == "ok" for f in started
                     if f["tool_call_id"] in reported)  # fmt: skip
            if n > 1 or len(started) > 1:
                self._violated("effect repeated", f"{sent.script.mark}: {n} times", facts=ear.facts)
            elif ok and n != 1:
                self._violated("fact lost", f"the effect {sent.script.mark} is gone", listed=listed)

    async def _listed(self, ear: Ear) -> list[str]:
        """The marks in the workspace."""
        while True:
            sent = await self.say(cat_marks())
            end = await ear.ended(sent.turn)
            found = [
                f for f in ear.facts if f["type"] == "tool_finished" and f["turn"] == sent.turn
            ]
            if end["reason"] == "done" and found and found[0]["outcome"] == "ok":
                return found[0]["text"].split()
            if end["reason"] != "done" and end["code"] != GIVEN_UP:
                self._judge(ear, sent, end)
                raise Stuck

    async def check_journal(self, ear: Ear) -> None:
        """What is stored is what was heard, and every 202 is in it."""
        stored = await ear.journal()
        heard = ear.facts[: len(stored)]
        if stored[: len(heard)] != heard:
            at = next(
                n for n, pair in enumerate(zip(stored, heard, strict=False)) if pair[0] != pair[1]
            )
            self._violated(
                "fact lost", f"stored and heard differ at {at}", stored=stored, heard=heard
            )
        said = {f["message_id"]: f for f in stored if f["type"] == "user_message"}
        n_ends = [f["turn"] for f in stored if f["type"] == "turn_ended"]
        for sent in self._sent:
            fact = said.get(sent.message_id)
            if fact is None or (fact["turn"], fact["seq"]) != (sent.turn, sent.seq):
                self._violated("202 not honoured", f"turn {sent.turn}", fact=fact, stored=stored)
            elif n_ends.count(sent.turn) != 1:
                self._violated(
                    "202 not honoured", f"turn {sent.turn} has no one end", stored=stored
                )
        self._check_tools(stored)
        await self._check_view(stored)

    async def _check_view(self, stored: list[dict[str, Any]]) -> None:
        messages = (await self._line.got(f"/v1/sessions/{self.session_id}/messages"))["data"]
        expected = [f["text"] for f in stored if f["type"] == "user_message"]
        # Beside them the view holds what the model is told in between, of a new shell.
        said = [m["content"] for m in messages if m["role"] == "user" and m["content"] in expected]
        if said != expected:
            self._violated(
                "202 not honoured", "the view's messages differ", said=said, expected=expected
            )

    def _check_tools(self, stored: list[dict[str, Any]]) -> None:
        """A call that started is finished once; `unknown` comes only where a process died under it."""
        open_calls: dict[str, bool] = {}
        for fact in stored:
            call = fact.get("tool_call_id")
            if fact["type"] == "tool_started":
                open_calls[call] = False
            elif fact["type"] == "activated":
                open_calls = dict.fromkeys(open_calls, True)
            elif fact["type"] == "tool_finished":
                died = open_calls.pop(call, None)
                outcome = fact["outcome"]
                again = fact["tool"] in {"read", "plan"}
                # A command of the load only fails when somebody ends its sandbox under it.
                wrong = (outcome == "unknown" and (again or not died)) or (
                    outcome == "error" and not again
                )
                if wrong or (died is None and outcome in {"ok", "unknown"}):
                    self._violated(
                        "wrong outcome", f"{fact['tool']}: {outcome}", fact=fact, stored=stored
                    )
        if open_calls:
            self._violated("wrong outcome", f"never finished: {list(open_calls)}", stored=stored)

    async def close(self, ear: Ear) -> None:
        await self.command("close")
        give_up_at = time.monotonic() + self._evidence.patience_s
        while not ear.is_closed:
            if time.monotonic() > give_up_at:
                self._violated("fact lost", "session_closed was not heard", facts=ear.facts)
                raise Stuck
            await asyncio.sleep(0.1)

    def _violated(self, kind: str, what: str, **shown: Any) -> None:
        self._evidence.violated(kind, self.session_id or self._mark, what, **shown)
