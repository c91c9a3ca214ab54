"""`troupe chat` against the real edge, typed at by a test."""

import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from actors.protocol import Open, Principal, SendMessage, Sessions
from agent.events import ApprovalRequested, Cursor
from tests.serve_app.test_cli import Program, troupe
from tests.support.sessions import MemorySessions

ALICE = Principal("alice")
pytestmark = pytest.mark.timeout(60)


@asynccontextmanager
async def chatting(
    cwd: Path, url: str, tokens: dict[str, str], *more: str
) -> AsyncGenerator[Program, None]:
    async with troupe(cwd, "chat", "--url", url, "--key", tokens["alice"], *more) as program:
        await program.until("/help")
        yield program


async def the_session(sessions: Sessions) -> str:
    return (await sessions.owned(ALICE, limit=1, after=None)).data[0].session_id


async def facts(sessions: Sessions) -> list[str]:
    found: list[str] = []
    pages = sessions.pages(ALICE, await the_session(sessions), Cursor(), follow=False)
    async for page in pages:
        found += [frame.event for frame in page.frames]
    return found


async def test_a_message_is_answered(
    tmp_path: Path, url: str, tokens: dict[str, str], sessions: Sessions
) -> None:
    async with chatting(tmp_path, url, tokens) as program:
        await program.type("echo ä [bold] :smile:")
        await program.until("echo ä [bold] :smile:")
        await program.type("/quit")
        done = await program.done()
    assert done.code == 0
    assert f"--session {await the_session(sessions)}" in done.output


async def test_ctrl_c_interrupts_the_turn_and_not_the_program(
    tmp_path: Path, url: str, tokens: dict[str, str], sessions: Sessions
) -> None:
    async with chatting(tmp_path, url, tokens, "--session", await running(sessions)) as program:
        program.process.send_signal(signal.SIGINT)
        await program.until("turn interrupted")
        await program.type("echo still here")
        await program.until("echo still here")
        await program.type("/quit")
        assert (await program.done()).code == 0
    assert (await facts(sessions)).count("interrupt_requested") == 1


async def running(sessions: Sessions) -> str:
    """A session in the middle of a turn."""
    view = await sessions.open(ALICE, Open())
    await sessions.submit(ALICE, view.session_id, SendMessage(text="hold on"))
    return view.session_id


async def test_a_rejection_carries_the_persons_words(
    tmp_path: Path, url: str, tokens: dict[str, str], sessions: Sessions
) -> None:
    async with chatting(tmp_path, url, tokens) as program:
        await program.type("ask me")
        await program.until("[a]pprove")
        await program.type("nonsense")
        await program.until("Answer a, r, e or l")
        await program.type("r")
        await program.type("not today")
        await program.type("/undo")
        await program.until("undo: done")
        await program.type("/quit")
        done = await program.done()
        assert done.code == 0
        assert done.output.count('{"n": 1}') == 1
    assert await facts(sessions) == [
        "user_message",
        "approval_requested",
        "turn_ended",
        "approval_decided",
        "turn_ended",
        "rewound",
    ]


async def test_an_edit_that_is_no_object_is_asked_again(
    tmp_path: Path, url: str, tokens: dict[str, str], sessions: Sessions
) -> None:
    async with chatting(tmp_path, url, tokens) as program:
        await program.type("ask me")
        await program.until("[a]pprove")
        await program.type("e")
        await program.type("[1]")
        await program.until("no JSON object")
        await program.type("e")
        await program.type('{"n": 2}')
        await program.type("/close")
        await program.until("close: done")
        assert (await program.done()).code == 0
    assert (await facts(sessions))[-1] == "session_closed"
    assert "approval_decided" in await facts(sessions)


async def test_a_decision_that_was_put_off_is_come_back_to(
    tmp_path: Path, url: str, tokens: dict[str, str], sessions: Sessions
) -> None:
    async with chatting(tmp_path, url, tokens) as program:
        await program.type("/approvals")
        await program.until("no call waits")
        await program.type("ask me")
        await program.until("[a]pprove")
        await program.type("l")
        await program.until("a new message denies it")
        await program.type("/approvals")
        await again(program, "[a]pprove")
        program.process.send_signal(signal.SIGINT)
        await program.until("nothing was decided")
        await program.type("/approvals")
        await again(program, "[a]pprove")
        program.process.send_signal(signal.SIGINT)
        await again(program, "nothing was decided")
        program.process.send_signal(signal.SIGINT)
        assert (await program.done()).code == 0
    assert "approval_decided" not in await facts(sessions)


async def again(program: Program, text: str) -> None:
    """Read on to `text`, which came before."""
    before, program.output = program.output, ""
    await program.until(text)
    program.output = before + program.output


async def test_a_session_taken_up_shows_where_it_was_left(
    tmp_path: Path, url: str, tokens: dict[str, str], sessions: Sessions
) -> None:
    assert isinstance(sessions, MemorySessions)
    view = await sessions.open(ALICE, Open())
    await sessions.submit(ALICE, view.session_id, SendMessage(text="ask [me] nicely"))
    session = sessions.all[view.session_id]
    asks = tuple(ask.model_copy(update={"reason": "it deletes"}) for ask in session.pending)
    session.write(ApprovalRequested(turn=1, asks=asks))
    async with chatting(tmp_path, url, tokens, "--session", view.session_id) as program:
        await program.until("[a]pprove")
        for part in ("ask [me] nicely", "waiting_approval", "1 call to decide", "it deletes"):
            assert part in program.output
        await program.type("a")
        await program.type("/quit")
        assert (await program.done()).code == 0


async def test_a_refused_command_is_told_and_the_chat_goes_on(
    tmp_path: Path, url: str, tokens: dict[str, str]
) -> None:
    async with chatting(tmp_path, url, tokens) as program:
        await program.type("/undo")
        await program.until("conflict")
        await program.type("/model scripted/other")
        await program.until("model: scripted/other")
        await program.type("/nonsense")
        await program.until("no command /nonsense")
        await program.until("/compact")
        await program.type("/quit")
        done = await program.done()
    assert done.code == 0
    assert done.output.count("scripted/other") == 1


async def test_a_foreign_session_is_not_found(
    tmp_path: Path, url: str, tokens: dict[str, str], sessions: Sessions
) -> None:
    view = await sessions.open(Principal("bob"), Open())
    arguments = ("chat", "--url", url, "--key", tokens["alice"], "--session", view.session_id)
    async with troupe(tmp_path, *arguments) as program:
        done = await program.done()
    assert done.code == 1
    assert "not_found" in done.output
