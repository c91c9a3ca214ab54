"""The vault: seals users' tokens, so that a store may keep what it must not know.

Settings hold the name of an environment variable, never the key: settings travel to other processes and
are kept by Ray. Each process that needs the key reads it from its own environment.

The variable may hold several keys with commas between them: the first one seals, all of them open. A
key is changed by putting the new one in front and leaving the old one in until no session needs it.
"""

import json
import os
from collections.abc import Mapping
from typing import NoReturn, Self

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from agent.faults import SettingsInvalid
from agent.settings import SecretsSettings


class Vault:
    """Fernet (AES-128-CBC and HMAC-SHA256), bound to the session that a token belongs to."""

    def __init__(self, keys: str) -> None:
        """
        Raises:
            ValueError: not one or more Fernet keys with commas between them.
        """
        self._keys = MultiFernet([Fernet(key.strip()) for key in keys.split(",")])

    @classmethod
    def of(cls, settings: SecretsSettings, environ: Mapping[str, str] = os.environ) -> Self | None:
        """The vault of this process; None: none is configured.

        Raises:
            SettingsInvalid: the variable is missing or holds no key. Says which variable, not what
                it holds.
        """
        name = settings.key_env
        if name is None:
            return None
        remedy = "`troupe secrets-key` prints a new key."
        if not environ.get(name):
            raise SettingsInvalid(
                f"agent.secrets.key_env: there is no environment variable {name}. {remedy}"
            )
        try:
            return cls(environ[name])
        except ValueError:
            # Not chained: a traceback may quote what the variable holds.
            raise SettingsInvalid(
                f"agent.secrets.key_env: the variable {name} holds no Fernet key (several have "
                f"commas between them). {remedy}"
            ) from None

    def seal(self, session_id: str, token: str) -> bytes:
        return self._keys.encrypt(json.dumps([session_id, token]).encode())

    def unseal(self, session_id: str, sealed: bytes) -> str | None:
        """None: no key of this vault opens it, or it was sealed for another session."""
        try:
            owner, token = json.loads(self._keys.decrypt(sealed))
        except InvalidToken:
            return None
        return token if owner == session_id else None

    def __reduce__(self) -> NoReturn:
        raise TypeError("a vault stays in its process, and its keys with it")


def new_key() -> str:
    return Fernet.generate_key().decode()
