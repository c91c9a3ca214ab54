"""Who calls: a `Principal` from the bearer key, never from anything else in the request.

The keys file holds, for each key, a user and the key's SHA-256:

    keys:
      - {user: alice, sha256: 0c5d...}

Keys are 256 random bits, not passwords: nobody guesses them, with or without a slow or salted hash,
so plain SHA-256 is right and costs a request nothing. The file may change while the server runs.
"""

import asyncio
import secrets
import time
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import NamedTuple

import structlog
from pydantic import Field, ValidationError
from starlette.datastructures import URL, Headers

from actors.protocol import Principal
from agent.faults import SettingsInvalid
from agent.settings import Section, read_yaml
from serve_app.problems import Forbidden, Unauthorized
from serve_app.settings import ServeSettings, is_loopback

log = structlog.get_logger()

DEV_USER = Principal("dev")
MAX_KEYS = 1000
"""Every key is compared at every request, so that time tells nothing: 1000 take about 0.2 ms."""
MAX_KEYS_FILE_BYTES = 1024**2
MAX_TOKEN_CHARS = 256
RELOAD_EVERY_S = 5.0
"""How long a removed key may still work."""


class KeyEntry(Section):
    user: str = Field(pattern=r"^[A-Za-z0-9_.@-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class KeysFile(Section):
    keys: tuple[KeyEntry, ...] = Field(default=(), max_length=MAX_KEYS)


class NewKey(NamedTuple):
    token: str
    """Shown once to the user, stored nowhere."""
    entry: KeyEntry
    """For the keys file."""


def new_key(user: str) -> NewKey:
    """
    Raises:
        SettingsInvalid: the name has characters that a user's name may not have.
    """
    token = f"troupe_{secrets.token_urlsafe(32)}"
    try:
        entry = KeyEntry(user=user, sha256=sha256(token.encode()).hexdigest())
    except ValidationError as cause:
        raise SettingsInvalid(
            "a user's name is 1 to 64 letters, digits or any of _ . @ -"
        ) from cause
    return NewKey(token, entry)


def read_keys(path: Path) -> KeysFile:
    """
    Raises:
        SettingsInvalid: not readable, too large, or not as the module says.
    """
    try:
        size = path.stat().st_size
    except OSError as cause:
        raise SettingsInvalid(
            f"{path}: no keys file ({cause.strerror}); make a first key with `troupe key USER`"
        ) from cause
    if size > MAX_KEYS_FILE_BYTES:
        raise SettingsInvalid(f"{path}: larger than {MAX_KEYS_FILE_BYTES} bytes")
    try:
        return KeysFile.model_validate(read_yaml(path))
    except ValidationError as cause:
        places = "; ".join(".".join(map(str, e["loc"])) for e in cause.errors(include_input=False))
        raise SettingsInvalid(f"{path}: not a keys file: {places}") from cause


class Doorkeeper:
    """Tells a request's principal, or refuses it. Reads the keys file at once and when it changed."""

    def __init__(self, settings: ServeSettings, *, reload_every_s: float = RELOAD_EVERY_S) -> None:
        """
        Raises:
            SettingsInvalid: keys are needed and there is no good keys file.
        """
        self._dev = settings.dev
        self._reload_every_s = reload_every_s
        self._path = settings.keys_file
        self._keys: tuple[tuple[bytes, Principal], ...] = ()
        self._version = (0, 0)
        self._looked_at = time.monotonic()
        if not self._dev:
            self._load()

    async def principal(self, headers: Headers) -> Principal:
        """
        Raises:
            Unauthorized: no key, or none that is known.
            Forbidden: dev mode, and not called by this machine under its own name.
        """
        if self._dev:
            _same_machine(headers)
            return DEV_USER
        now = time.monotonic()
        if now - self._looked_at >= self._reload_every_s:
            self._looked_at = now  # before the await: one request looks, the others go on
            await asyncio.to_thread(self._reload)
        return self._known(headers.get("authorization", ""))

    def _known(self, authorization: str) -> Principal:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not 0 < len(token) <= MAX_TOKEN_CHARS:
            raise Unauthorized("Send your key as `Authorization: Bearer KEY`.")
        digest = sha256(token.encode()).digest()
        found: Principal | None = None
        for known, principal in self._keys:
            if compare_digest(known, digest):
                found = principal
        if found is None:
            raise Unauthorized("This key is not known here.")
        return found

    def _load(self) -> None:
        stat = self._path.stat() if self._path.exists() else None
        file = read_keys(self._path)
        self._keys = tuple((bytes.fromhex(k.sha256), Principal(k.user)) for k in file.keys)
        self._version = (stat.st_mtime_ns, stat.st_size) if stat else (0, 0)

    def _reload(self) -> None:
        """A file that cannot be read changes nothing: half an edit locks nobody out."""
        try:
            stat = self._path.stat()
            if (stat.st_mtime_ns, stat.st_size) != self._version:
                self._load()
                log.info("keys_loaded", n_keys=len(self._keys))
        except (OSError, SettingsInvalid) as cause:
            log.warning("keys_file_refused", reason=str(cause))


def _same_machine(headers: Headers) -> None:
    """Without keys, a web page elsewhere must not drive this server through the user's browser:
    neither by its address (then `Origin` is foreign) nor by a name of its own that resolves to
    127.0.0.1 (then `Host` is)."""
    try:
        host = headers.get("host", "")
        origin = headers.get("origin")
        foreign = origin is not None and URL(origin).netloc != host
        known = is_loopback(URL(f"http://{host}").hostname or "")
    except ValueError:
        raise Forbidden("The Host or Origin header is none.") from None
    if foreign or not known:
        raise Forbidden("Dev mode answers only this machine, called 127.0.0.1 or localhost.")
