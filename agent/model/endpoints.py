"""Where a model's name leads, for names that lead to an OpenAI-compatible server.

The names of variables are those that litellm (1.106) reads, in its order. Keys go into one header of
one request and nowhere else: an `Endpoint` is never logged.
"""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from agent.faults import ModelAuth, ModelRefused
from agent.model import prices
from agent.model.contract import ModelRequest
from agent.settings import ModelSettings

ROUTER = "https://router.huggingface.co/v1"
OPENAI = "https://api.openai.com/v1"
GPT = re.compile(r"gpt-(\d+)(?:\.(\d+))?(?=[.-]|$)")
REASONING = re.compile(r"(o\d|gpt-[5-9](?!.*-chat))")
"""Models of OpenAI's that take `max_completion_tokens` only."""
COMBINATORS = ("oneOf", "anyOf", "allOf", "enum", "not")
"""What OpenAI refuses at the top of a tool's parameters; litellm rewrites it."""


class Provider(NamedTuple):
    keys: tuple[str, ...]
    bases: tuple[str, ...] = ()
    default_base: str | None = None
    keyless: bool = False
    """A server of one's own may want no key."""


PROVIDERS = {
    "openai": Provider(("OPENAI_API_KEY",), ("OPENAI_BASE_URL", "OPENAI_API_BASE"), OPENAI),
    "hosted_vllm": Provider(("HOSTED_VLLM_API_KEY",), ("HOSTED_VLLM_API_BASE",), keyless=True),
    "huggingface": Provider(
        ("HF_TOKEN", "HUGGINGFACE_API_KEY"), ("HF_API_BASE", "HUGGINGFACE_API_BASE"), ROUTER
    ),
}


class Endpoint(NamedTuple):
    url: str
    model: str
    """As the server knows it."""
    headers: dict[str, str]
    """Hold the key."""
    limit_field: str
    """The server's name for the most tokens of an answer."""


def is_direct(
    request: ModelRequest, settings: ModelSettings, environ: Mapping[str, str] = os.environ
) -> bool:
    """Whether a request can be made, and priced, without litellm. The price table must be loaded."""
    provider, name = _parts(request.model)
    if not settings.direct or "://" in name or not (provider in PROVIDERS or settings.api_base):
        return False
    known = prices.known_model(request.model)
    if known and not known.plain and request.model not in settings.prices:
        return False
    return not (_is_openai(provider, settings, environ) and _needs_responses(name, request.tools))


def endpoint_of(
    model: str, settings: ModelSettings, environ: Mapping[str, str] = os.environ
) -> Endpoint:
    """
    Raises:
        ModelAuth: no key is set; `missing` names the variables.
        ModelRefused: there is no address.
    """
    provider, name = _parts(model)
    way = _way(provider)
    base = settings.api_base or _first(way.bases, environ) or way.default_base
    if base is None:
        raise ModelRefused(
            "No address is set for the model's server.", missing=["model.api_base", *way.bases]
        )
    headers = _headers(provider, way, base, environ)
    if base == ROUTER:
        name = _routed(name)
    limit_field = (
        "max_completion_tokens" if provider == "openai" and REASONING.match(name) else "max_tokens"
    )
    return Endpoint(_url(base, provider), name, headers, limit_field)


def _headers(provider: str, way: Provider, base: str, environ: Mapping[str, str]) -> dict[str, str]:
    key = _first(way.keys, environ)
    if key is None and not (way.keyless or (provider == "huggingface" and base != ROUTER)):
        raise ModelAuth("No key is set for the model's provider.", missing=list(way.keys[:1]))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if provider == "openai":
        optional = {
            "OpenAI-Organization": _first(("OPENAI_ORGANIZATION", "OPENAI_ORG_ID"), environ),
            "OpenAI-Project": _first(("OPENAI_PROJECT_ID",), environ),
        }
        headers |= {name: value for name, value in optional.items() if value}
    return headers


def _way(provider: str) -> Provider:
    """Another provider's name, with `model.api_base`: its own key by litellm's usual pattern."""
    if provider in PROVIDERS:
        return PROVIDERS[provider]
    own = (f"{provider.upper()}_API_KEY",) if provider else ()
    return Provider((*own, "OPENAI_API_KEY"))


def _parts(model: str) -> tuple[str, str]:
    """The provider, empty where the name's first part is none, and the name that it knows."""
    provider, slash, name = model.partition("/")
    if slash and (provider in PROVIDERS or provider in prices.providers()):
        return provider, name
    return "", model


def _routed(name: str) -> str:
    """`provider/org/model` in litellm's writing is `org/model:provider` to Hugging Face's router."""
    if name.count("/") == 2:
        provider, _, name = name.partition("/")
        return f"{name}:{provider}"
    return name


def _url(base: str, provider: str) -> str:
    base = base.rstrip("/")
    if base.endswith("/chat/completions"):
        return base
    if provider == "huggingface" and not base.endswith("/v1"):
        base += "/v1"
    return f"{base}/chat/completions"


def _first(names: tuple[str, ...], environ: Mapping[str, str]) -> str | None:
    return next((environ[name] for name in names if environ.get(name)), None)


def _is_openai(provider: str, settings: ModelSettings, environ: Mapping[str, str]) -> bool:
    """The real one, which takes some requests only in a format of its own."""
    base = settings.api_base or _first(_way(provider).bases, environ) or OPENAI
    host = urlsplit(base).hostname or ""
    return provider == "openai" and (host == "api.openai.com" or host.endswith(".api.openai.com"))


def _needs_responses(name: str, tools: list[dict[str, Any]]) -> bool:
    """Whether OpenAI takes the request only at /v1/responses, or only after litellm's rewriting."""
    known = prices.known_model(name)
    if name.startswith("responses/") or (known and known.mode == "responses"):
        return True
    # These reason unless they are told not to, and then take tools in no other way.
    version = GPT.match(name)
    if tools and version and (int(version[1]), int(version[2] or 0)) >= (5, 4):
        return True
    parameters = (tool.get("function", {}).get("parameters") or {} for tool in tools)
    return any(key in schema for schema in parameters for key in COMBINATORS)
