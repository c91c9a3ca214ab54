"""Everything that may go wrong, one class per boundary crossed.

    Fault                       stable `code`, a sentence for a person, survives pickling
    ├── ModelFault              model_failed: the provider or the way to it
    │   ├── ModelAuth           model_auth: the key was refused
    │   ├── ModelRateLimited    model_rate_limited: 429, with `retry_after_s`
    │   ├── ModelBusy           model_busy: the house's own limit for the model leaves no room in time
    │   ├── ModelUnavailable    model_unavailable: 5xx, no connection
    │   ├── ModelLost           model_lost: what asked the model for us died; the call is made again
    │   ├── ModelTimeout        model_timeout: no token, or no next token, in time
    │   ├── ModelCut            model_cut: the stream ended before its end
    │   ├── ModelRefused        model_refused: the provider rejected the request (400, 404)
    │   └── ContextOverflow     context_overflow: the prompt does not fit the model's window
    ├── SandboxUnavailable      sandbox_unavailable: nothing could be run at all
    ├── WorkspaceRefused        workspace_refused: a path or a size that the workspace does not take
    ├── SnapshotFailed          snapshot_failed: a workspace could not be copied to or from where it is kept
    ├── JournalFault            journal_failed: the store did not answer
    │   ├── Fenced              fenced: another incarnation owns the session
    │   ├── NoSuchSession       not_found
    │   ├── SessionExists       session_exists
    │   └── MessageKnown        message_known: this message_id was recorded before
    └── SettingsInvalid         settings_invalid: a key, a value or a file that cannot be

Floor 2 adds its own (`actors.protocol`). Expected outcomes are values (`ToolResult`), never faults.
Catch by class. `str(fault)` is safe to show to a user; causes are chained with `from` and logged.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar


class Fault(Exception):
    """A failure with a stable code and a sentence that a user may read.

    All arguments travel in `args`, so that a subclass survives pickling across actors.
    """

    code: ClassVar[str] = "fault"

    def __init__(self, detail: str, **fields: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fields = fields
        """Numbers and names that go with the sentence: shown to the user as they are, so never secrets."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuilt, (type(self), self.detail, self.fields))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None


def _rebuilt(kind: type[Fault], detail: str, fields: dict[str, Any]) -> Fault:
    return kind(detail, **fields)


class ModelFault(Fault):
    code = "model_failed"


class ModelAuth(ModelFault):
    code = "model_auth"


class ModelRateLimited(ModelFault):
    """Carries `retry_after_s: float | None` in `fields`."""

    code = "model_rate_limited"


class ModelBusy(ModelFault):
    """Nobody was asked. Carries `retry_after_s` in `fields`."""

    code = "model_busy"


class ModelUnavailable(ModelFault):
    code = "model_unavailable"


class ModelLost(ModelFault):
    """The way to what calls providers broke: it died, or is silent. Whether the model answered is not
    known, and it is no word of the model's, so the call is made again."""

    code = "model_lost"


class ModelTimeout(ModelFault):
    code = "model_timeout"


class ModelCut(ModelFault):
    code = "model_cut"


class ModelRefused(ModelFault):
    code = "model_refused"


class ContextOverflow(ModelFault):
    code = "context_overflow"


class SandboxUnavailable(Fault):
    code = "sandbox_unavailable"


class WorkspaceRefused(Fault):
    code = "workspace_refused"


class SnapshotFailed(Fault):
    code = "snapshot_failed"


class JournalFault(Fault):
    code = "journal_failed"


class Fenced(JournalFault):
    code = "fenced"


class NoSuchSession(JournalFault):
    code = "not_found"


class SessionExists(JournalFault):
    code = "session_exists"


class MessageKnown(JournalFault):
    code = "message_known"


class SettingsInvalid(Fault):
    code = "settings_invalid"


@contextmanager
def boundary(kind: type[Fault], detail: str) -> Generator[None]:
    """Attribute any exception that escapes foreign code to `kind`; a Fault passes as it is.

    `asyncio.CancelledError` is not an `Exception`, so cancellation passes untouched.
    """
    try:
        yield
    except Fault:
        raise
    except Exception as cause:
        raise kind(detail) from cause
