"""Secrets out of texts and JSON values, by their shape.

Best effort: a secret without a shape passes, so secrets are kept away from journals in the first place.
Ordinary text stays as it is. Every pattern runs in linear time: it begins with a literal or at the
start of a word, and what it repeats is bounded, or ends at a character that it cannot contain.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

MARK = "[REDACTED]"
MIN_LITERAL_CHARS = 6
"""A literal secret below it would blank ordinary words."""


class Redacted(NamedTuple):
    value: Any
    n_redacted: int


def redact(value: Any, literals: Iterable[str] = ()) -> Redacted:
    """A JSON value (or a string) with every secret replaced by `MARK`, keys of mappings included.

    `literals` are secrets known by value; shorter ones than `MIN_LITERAL_CHARS` are ignored.
    """
    redaction = _Redaction(literals)
    return Redacted(redaction.value(value), redaction.n_redacted)


class _Redaction:
    def __init__(self, literals: Iterable[str]) -> None:
        self.n_redacted = 0
        known = {text for text in literals if len(text) >= MIN_LITERAL_CHARS}
        known |= {
            json.dumps(text)[1:-1] for text in known
        }  # as it stands in JSON inside of a string
        longest_first = sorted(known, key=len, reverse=True)
        self._literals = re.compile("|".join(map(re.escape, longest_first))) if known else None

    def value(self, value: Any) -> Any:
        match value:
            case str():
                return self._text(value)
            case dict():
                members = cast("dict[Any, Any]", value).items()
                return {self.value(name): self._member(name, each) for name, each in members}
            case list() | tuple():
                return [self.value(each) for each in cast("list[Any]", value)]
            case _:
                return value

    def _member(self, name: Any, value: Any) -> Any:
        """What a sensitive name holds is a secret that needs no shape of its own."""
        if isinstance(name, str) and isinstance(value, str):
            text = f'{name[-_MAX_NAME:]}="{value}'
            found = _ASSIGNED.search(text)
            if found and found.end() == len(text) and _is_secret(found):
                self.n_redacted += 1
                return MARK
        return self.value(value)

    def _text(self, text: str) -> str:
        if self._literals is not None:
            text = self._literals.sub(self._marked, text)
        if len(text) <= _SHORT and _HINTS.search(text) is None:
            return text
        for needles, pattern in _SHAPES:
            if any(needle in text for needle in needles):
                text = pattern.sub(self._marked, text)
        lowered = text.lower()
        if any(word in lowered for word in _SENSITIVE):
            text = _ASSIGNED.sub(self._assigned, text)
        return text

    def _marked(self, _: re.Match[str]) -> str:
        self.n_redacted += 1
        return MARK

    def _assigned(self, found: re.Match[str]) -> str:
        if not _is_secret(found):
            return found[0]
        self.n_redacted += 1
        return found["name"] + found["sign"] + MARK


_WORD = r"(?<![A-Za-z0-9_-])"
_BREAK = r"(?:\s|\\[nr])"
_BASE64 = r"[A-Za-z0-9+/=]{16,}+"
_KEY_BEGINS = r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
_KEY_ENDS = r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
_AUTHORIZED = (
    r"(?i:(?<=authorization: bearer )|(?<=authorization: basic )|(?<=authorization: token ))"
)
_SHAPES = tuple(
    (needles, re.compile(pattern))
    for needles, pattern in (
        (
            # With its end, or cut off after some lines.
            ("PRIVATE KEY",),
            _KEY_BEGINS + rf"(?:(?:[^-]|-(?!----)){{0,20000}}{_KEY_ENDS}"
            rf"|{_BREAK}{{0,4}}{_BASE64}(?:{_BREAK}{{1,4}}{_BASE64})*+)",
        ),
        (("hf_",), r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}"),
        (
            ("sk-",),
            _WORD + r"sk-(?:[A-Za-z0-9]{20,}"
            r"|(?:ant|proj|svcacct|admin|or|lf)-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,})",
        ),
        (
            ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
            r"(?<![A-Za-z0-9])gh[pousr]_[A-Za-z0-9]{20,}",
        ),
        (("github_pat_",), r"(?<![A-Za-z0-9_])github_pat_[A-Za-z0-9_]{20,}"),
        (("AKIA", "ASIA"), r"(?<![A-Za-z0-9])A[KS]IA[A-Z0-9]{16}(?![A-Za-z0-9])"),
        (("xox",), _WORD + r"xox[abeoprs]-[A-Za-z0-9-]{10,}"),
        (("AIza",), _WORD + r"AIza[A-Za-z0-9_-]{35}"),
        (("gsk_",), r"(?<![A-Za-z0-9])gsk_[A-Za-z0-9]{40,}"),
        (("eyJ",), _WORD + r"eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]{8,}){2,4}"),
        (
            ("earer", "EARER"),
            r"(?i:(?<=bearer )|(?<=bearer  ))(?=[A-Za-z._~+/=-]*[0-9])[A-Za-z0-9._~+/=-]{16,}",
        ),
        (
            ("uthorization", "UTHORIZATION"),
            _AUTHORIZED + r"[A-Za-z0-9._~+/=-]{8,}",
        ),
        (("://",), r"(?<=://)[^\s:/@\"'$<>{}]{1,100}:[^\s:/@\"'$<>{}]{1,200}(?=@)"),
    )
)
_SENSITIVE = ("token", "key", "secret", "password")
_SHORT = 256
"""Up to here one look for all words at once is cheaper than a look for each: every line of a log has a
dozen such texts."""
_HINTS = re.compile(
    "|".join(re.escape(word) for needles, _ in _SHAPES for word in needles)
    + "|"
    + "|".join(_SENSITIVE),
    re.IGNORECASE,
)
"""In every text in which anything could be found."""
_MAX_NAME = 40
_ASSIGNED = re.compile(
    r"""(?xi)
    (?P<name> (?:(?:access|auth|refresh|api|hf|user|secret)[_-]?)? token
      | api[_-]?key | secret | password | access[_-]?key (?:[_-]?id)? )
    (?P<sign> \\{0,3} ["']? [ \t]{0,3} [=:] [ \t]{0,3} (?P<quote> \\{0,3} ["'] )? )
    (?P<value> [^\s"'`,;&|<>(){}\[\]$\\=*] [^\s"'`,;&|<>(){}\[\]$\\]{3,4096}+ )
    (?! [\[({] )
    """
)
"""`NAME=value`, `"name": "value"`, `name: value`, also inside of JSON that stands in a string."""
_REFERENCE = re.compile(r"[A-Za-z_]+(?:\.[A-Za-z_]+)+|None|null|true|false|True|False")


def _is_secret(found: re.Match[str]) -> bool:
    """Whether what is assigned is a secret, rather than code or prose about one.

    `HF_TOKEN=abcd` in a shell is; `EOS_TOKEN = tokenizer.eos_token`, `token: string` and the
    `"token": "Hello"` of log-probabilities are not.
    """
    name, sign, quote, value = found.group("name", "sign", "quote", "value")
    if _REFERENCE.fullmatch(value):
        return False
    if len(value) >= 8 and re.search(r"[0-9]", value) and re.search(r"[A-Za-z]", value):
        return True
    if name.isupper():
        return bool(quote) or sign == "="
    return bool(quote) and len(value) >= 6 and name.lower() != "token"
