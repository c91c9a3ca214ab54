"""Users' tokens: who finds them again, and that nothing on disk or in a log holds one."""

import asyncio
import base64
import hashlib
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, ClassVar

import pytest
from structlog.testing import capture_logs

from actors.local import LocalSessions
from actors.protocol import Close, Open, SendMessage
from actors.tokens import MAX_REMEMBERED, Tokens
from agent.faults import JournalFault
from agent.journal_memory import MemoryJournal
from agent.journal_sqlite import SqliteJournal
from agent.tools.contract import ToolResult, ToolScope
from agent.vault import Vault, new_key
from tests.support.house import ALICE, KNOWN, Echo, Wait, follow, kit_for, puppet
from tests.support.journals import opening
from tests.support.secrets import holds, places_of

TOKEN = "hf_" + "correctHorseBattery" * 2


class AwayJournal(MemoryJournal):
    """Keeps no secrets while `away`."""

    away = False

    async def keep_secret(self, session_id: str, sealed: bytes | None) -> None:
        if self.away:
            raise JournalFault("The journal did not answer.")
        await super().keep_secret(session_id, sealed)


@pytest.fixture
async def journal() -> AwayJournal:
    journal = AwayJournal()
    for session_id in ("s", "other"):
        await journal.create(opening(session_id))
    return journal


async def test_without_a_vault_a_token_is_only_remembered(journal: AwayJournal) -> None:
    tokens = Tokens(journal, None)
    await tokens.keep("s", TOKEN)
    assert await tokens.find("s") == TOKEN
    assert await tokens.find("other") is None
    assert await journal.secret("s") is None
    assert await Tokens(journal, None).find("s") is None


async def test_with_a_vault_whoever_has_the_key_finds_it(journal: AwayJournal) -> None:
    key = new_key()
    await Tokens(journal, Vault(key)).keep("s", TOKEN)
    assert await Tokens(journal, Vault(key)).find("s") == TOKEN
    assert await Tokens(journal, Vault(key)).find("other") is None
    assert await Tokens(journal, None).find("s") is None


async def test_a_token_that_could_not_be_kept_is_not_remembered(journal: AwayJournal) -> None:
    tokens = Tokens(journal, Vault(new_key()))
    journal.away = True
    with pytest.raises(JournalFault):
        await tokens.keep("s", TOKEN)
    assert await tokens.find("s") is None


async def test_a_key_that_went_is_told_once_and_costs_only_the_token(journal: AwayJournal) -> None:
    await Tokens(journal, Vault(new_key())).keep("s", TOKEN)
    tokens = Tokens(journal, Vault(new_key()))
    with capture_logs() as lines:
        assert [await tokens.find("s") for _ in range(3)] == [None] * 3
    assert [(line["event"], line["session_id"]) for line in lines] == [("token_not_opened", "s")]
    await tokens.keep("s", TOKEN)
    assert await tokens.find("s") == TOKEN


async def test_what_is_forgotten_is_nowhere(journal: AwayJournal) -> None:
    tokens = Tokens(journal, Vault(new_key()))
    await tokens.keep("s", TOKEN)
    await tokens.forget("s")
    assert await journal.secret("s") is None
    assert await tokens.find("s") is None
    await tokens.keep("other", TOKEN)
    await journal.delete("other")
    await tokens.forget("other")


async def test_a_session_ends_though_its_sealed_token_stays(journal: AwayJournal) -> None:
    tokens = Tokens(journal, Vault(new_key()))
    await tokens.keep("s", TOKEN)
    journal.away = True
    with capture_logs() as lines:
        await tokens.forget("s")
    assert [line["event"] for line in lines] == ["token_not_forgotten"]
    assert "s" not in tokens._remembered


async def test_memory_is_bounded_and_a_vault_makes_up_for_it(journal: AwayJournal) -> None:
    with_vault, without = Tokens(journal, Vault(new_key())), Tokens(journal, None)
    for tokens in (with_vault, without):
        await tokens.keep("s", TOKEN)
        for n in range(MAX_REMEMBERED):
            tokens._remember(f"of {n}", TOKEN)
        assert len(tokens._remembered) == MAX_REMEMBERED
    assert await with_vault.find("s") == TOKEN
    assert await without.find("s") is None


# Through the desk


class Badge(Echo):
    """Shows whose token it was given, not the token."""

    name: ClassVar[str] = "badge"

    async def run(self, arguments: Any, scope: ToolScope) -> ToolResult:
        del arguments
        return ToolResult(print_of(scope.user_token))


def print_of(token: str | None) -> str:
    return hashlib.sha256(token.encode()).hexdigest() if token else "none"


ASK = SendMessage(text=puppet({"call": "badge"}, {"say": "seen"}))


async def seen(sessions: LocalSessions, session_id: str) -> str:
    """What a tool of the session is given."""
    accepted = await sessions.submit(ALICE, session_id, ASK)
    reader = await follow(sessions, ALICE, session_id, turn=accepted.turn)
    return reader.of("tool_finished")[-1]["text"]


@asynccontextmanager
async def house(
    storage: Path, vault: Vault | None, *, crash: bool = False
) -> AsyncIterator[LocalSessions]:
    """One desk after another over one storage directory."""
    journal = SqliteJournal(storage / "journal.sqlite3")
    kit = kit_for(storage, journal=journal, tools=[Badge(), Wait()])
    sessions = LocalSessions(kit, KNOWN, vault=vault)
    sessions.desk.begin()
    try:
        yield sessions
    finally:
        if crash:  # no drain, no last facts
            for host in list(sessions.hosts.by_name.values()):
                for hosted in host.hosted():
                    await host.end(hosted.session_id)
            await sessions.desk.close()
        else:
            await sessions.close()
        await journal.close()


async def test_a_token_outlives_the_desk_and_is_nowhere_in_plain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = new_key()
    async with house(tmp_path, Vault(key), crash=True) as sessions:
        session_id = (await sessions.open(ALICE, Open(user_token=TOKEN))).session_id
        assert await seen(sessions, session_id) == print_of(TOKEN)
        # In the middle of a turn, for the recovery that follows.
        waits = SendMessage(text=puppet({"call": "wait"}, {"call": "badge"}, {"say": "after all"}))
        turn = (await sessions.submit(ALICE, session_id, waits)).turn
        await follow(sessions, ALICE, session_id, until="tool_started", turn=turn)
        during = await asyncio.to_thread(places_of, TOKEN, tmp_path)
    async with house(tmp_path, Vault(key)) as sessions:
        # Nobody calls: the turn goes on by itself, with the token.
        reader = await follow(sessions, ALICE, session_id, turn=turn)
        assert reader.of("tool_finished")[-1]["text"] == print_of(TOKEN)
        other = (await sessions.open(ALICE, Open())).session_id
        assert await seen(sessions, other) == print_of(None)
    assert (tmp_path / "trajectories" / f"{session_id}.json").is_file()
    after = await asyncio.to_thread(places_of, TOKEN, tmp_path)
    assert (during, after) == ([], [])
    output = capsys.readouterr()
    assert not holds((output.out + output.err).encode(), TOKEN)


async def test_without_the_key_a_session_goes_on_without_its_token(tmp_path: Path) -> None:
    async with house(tmp_path, Vault(new_key())) as sessions:
        session_id = (await sessions.open(ALICE, Open(user_token=TOKEN))).session_id
    for vault in (Vault(new_key()), None):
        async with house(tmp_path, vault) as sessions:
            assert await seen(sessions, session_id) == print_of(None)


async def test_closing_leaves_no_secret(tmp_path: Path) -> None:
    async with house(tmp_path, Vault(new_key())) as sessions:
        view = await sessions.open(ALICE, Open(user_token=TOKEN))
        journal = sessions.desk._kit.journal
        assert await journal.secret(view.session_id)
        await sessions.submit(ALICE, view.session_id, Close())
        assert await journal.secret(view.session_id) is None


async def test_opening_again_brings_a_token_that_was_lost_on_the_way(tmp_path: Path) -> None:
    vault = Vault(new_key())
    again = Open(user_token=TOKEN, message_id="open-1")
    async with house(tmp_path, vault) as sessions:
        # As a crash between the session and its token leaves it.
        view = await sessions.open(ALICE, again.model_copy(update={"user_token": None}))
    async with house(tmp_path, vault) as sessions:
        assert (await sessions.open(ALICE, again)).session_id == view.session_id
        assert await seen(sessions, view.session_id) == print_of(TOKEN)


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    """At any alignment, in a row of a database, in a name."""
    for n in range(3):
        text = base64.b64encode(b"x" * n + TOKEN.encode() + b"tail")
        (tmp_path / f"encoded-{n}").write_bytes(b"a" + text)
    (tmp_path / "hex").write_text(TOKEN.encode().hex())
    (tmp_path / TOKEN).touch()
    with closing(sqlite3.connect(tmp_path / "db")) as db:
        db.execute("CREATE TABLE kept (secret BLOB)")
        db.execute("INSERT INTO kept VALUES (?)", (TOKEN.encode(),))
        db.commit()
    (tmp_path / "clean").write_text(TOKEN[:-1])
    assert len(places_of(TOKEN, tmp_path)) == 3 + 1 + 1 + 2
