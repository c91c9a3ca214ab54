"""Messages as plain text, for the model calls that summarise them.

Text instead of chat messages, so that any provider takes it: some refuse tool calls without the tools.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

MIN_SHARE_CHARS = 40
"""Of a message that is cut: less says nothing."""
ROLES = frozenset({"system", "user", "assistant", "tool"})


class WellFormed(NamedTuple):
    messages: tuple[dict[str, Any], ...]
    n_dropped: int


def well_formed(entries: Sequence[Any]) -> WellFormed:
    """The entries that are chat messages with something to say; the rest is counted."""
    kept = tuple(entry for entry in entries if _is_message(entry))
    return WellFormed(kept, len(entries) - len(kept))


def _is_message(entry: Any) -> bool:
    if not isinstance(entry, dict) or cast("dict[str, Any]", entry).get("role") not in ROLES:
        return False
    return bool(_content(cast("dict[str, Any]", entry)) or _calls(cast("dict[str, Any]", entry)))


def _content(message: dict[str, Any]) -> str:
    """The text of a message whose content is a string or a list of parts."""
    content: Any = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [p for p in cast("list[Any]", content) if isinstance(p, dict)]
        texts: list[Any] = [cast("dict[str, Any]", part).get("text") for part in parts]
        return "\n".join(text for text in texts if isinstance(text, str))
    return ""


def _calls(message: dict[str, Any]) -> list[str]:
    calls: Any = message.get("tool_calls")
    if not isinstance(calls, list):
        return []
    functions: list[Any] = [
        cast("dict[str, Any]", call).get("function")
        for call in cast("list[Any]", calls)
        if isinstance(call, dict)
    ]
    return [
        f"[calls {function.get('name')} with {_text(function.get('arguments'))}]"
        for function in functions
        if isinstance(function, dict)
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def render(messages: Sequence[dict[str, Any]], *, max_chars: int) -> str:
    """The messages one after another under their roles, at most about `max_chars`.

    Where that is too little, every message gives up its middle, longest first in effect: no message
    keeps more than an equal share of what the shorter ones leave. Where the shares would say nothing,
    the middle messages go.
    """
    room = max(2, max_chars // (2 * MIN_SHARE_CHARS))
    if left_out := max(0, len(messages) - room):
        ends = room // 2
        head = render(messages[:ends], max_chars=max_chars // 2)
        tail = render(messages[-ends:], max_chars=max_chars // 2)
        return f"{head}\n\n[... {left_out} messages left out ...]\n\n{tail}"
    texts = ["\n".join(filter(None, [_content(m), *_calls(m)])) for m in messages]
    share = _fair_share([len(text) for text in texts], max_chars)
    return "\n\n".join(
        f"## {message['role']}\n{cut_middle(text, share)}"
        for message, text in zip(messages, texts, strict=True)
    )


def _fair_share(lengths: list[int], total: int) -> int:
    """The largest cap so that the capped lengths sum to at most `total`."""
    left = total
    for position, length in enumerate(ordered := sorted(lengths)):
        share = left // (len(ordered) - position)
        if length > share:
            return max(share, MIN_SHARE_CHARS)
        left -= length
    return max(lengths, default=0)


def cut_middle(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
