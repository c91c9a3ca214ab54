"""Logs: one JSON object per line on stderr, an event's name in the past tense and its fields.

`configure` is called once by whatever begins a process. Values that look like secrets are taken out,
and tracebacks are plain: renderers that show local variables would show prompts and keys.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from structlog.typing import EventDict

from agent.redact import redact


def configure(whose: Callable[[], Mapping[str, Any]] = dict) -> None:
    """Set up structlog for this process. Repeating it changes nothing.

    `whose` is asked at every line for the fields that all lines of the process carry at that time; a
    line's own come before them.
    """

    def with_whose(_logger: Any, _method: str, event: EventDict) -> EventDict:
        return {**whose(), **event}

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            with_whose,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            structlog.processors.format_exc_info,
            _redacted,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        # Looked up at each line: Ray and pytest put another stream in its place.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _redacted(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """A line's values without secrets; the event's own name is ours."""
    name = event.pop("event", "")
    return {"event": name, **redact(event).value}
