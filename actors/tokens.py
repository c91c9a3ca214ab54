"""Users' tokens for tools: remembered here, and with a vault kept sealed beside the session.

Only the desk asks: it hands a session's token to the host that adopts it. Without a vault a token is
gone with the desk's process, but for those of sessions that live on in processes of their own.
"""

import structlog

from agent.faults import JournalFault, NoSuchSession
from agent.journal import Journal
from agent.vault import Vault

log = structlog.get_logger()

MAX_REMEMBERED = 10_000
"""Sessions; the first that came are forgotten first, and with a vault found again."""


class Tokens:
    def __init__(self, journal: Journal, vault: Vault | None) -> None:
        self._journal = journal
        self._vault = vault
        self._remembered: dict[str, str | None] = {}
        """None: the journal was asked, and has none that opens."""

    async def keep(self, session_id: str, token: str | None) -> None:
        """Take a session's token, in place of the one before. None: nothing changes. With a vault it is
        durable when this returns.

        Raises:
            JournalFault
        """
        if token is None:
            return
        if self._vault is not None:
            await self._journal.keep_secret(session_id, self._vault.seal(session_id, token))
        self._remember(session_id, token)

    def learn(self, session_id: str, token: str) -> None:
        """Take a token from a session that lives on: it was kept, if it was to be, when it came."""
        self._remember(session_id, token)

    async def find(self, session_id: str) -> str | None:
        """
        Raises:
            JournalFault
        """
        if self._vault is not None and session_id not in self._remembered:
            sealed = await self._journal.secret(session_id)
            token = None if sealed is None else self._vault.unseal(session_id, sealed)
            if sealed is not None and token is None:
                log.warning("token_not_opened", session_id=session_id)
            self._remember(session_id, token)
        return self._remembered.get(session_id)

    async def forget(self, session_id: str) -> None:
        """Keep nothing of it any more. A journal that does not answer is no reason to fail: what it
        holds is sealed, and goes with the session."""
        self._remembered.pop(session_id, None)
        if self._vault is None:
            return
        try:
            await self._journal.keep_secret(session_id, None)
        except NoSuchSession:
            return  # it was deleted, and its secret with it
        except JournalFault as fault:
            log.warning("token_not_forgotten", session_id=session_id, code=fault.code)

    def _remember(self, session_id: str, token: str | None) -> None:
        while len(self._remembered) >= MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[session_id] = token
