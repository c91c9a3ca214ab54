"""Users' tokens: who finds them again, and that nothing on disk or in a log holds one."""

import pytest
from structlog.testing import capture_logs

from actors.tokens import MAX_REMEMBERED, Tokens
from agent.faults import JournalFault
from agent.journal_memory import MemoryJournal
from agent.vault import Vault, new_key
from tests.support.journals import opening

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
