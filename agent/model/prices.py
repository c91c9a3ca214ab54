"""What litellm's table says about models: windows, prices, and the way OpenAI serves them.

The table is a file in litellm's package. It is read without importing litellm, which costs 130 MB and
seconds; only what is used here is kept. Await `table_ready` before anything else.
"""

import asyncio
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import structlog

from agent.events import Usage
from agent.model.contract import ModelCard
from agent.settings import ModelSettings, Price

log = structlog.get_logger()

FILE = "model_prices_and_context_window_backup.json"
NO_MODELS = ("sample_spec", "fallback_generalizations")
RATE = re.compile(
    r"(input_cost_per_token|output_cost_per_token|cache_read_input_token_cost)"
    r"(?:_above_(\d+)(k?)_tokens)?"
)
"""Other keys are for batches, service tiers, images and sound."""
OTHER_ARITHMETIC = ("tiered_pricing", "off_peak_pricing")
"""Keys of entries that litellm computes in a way of their own."""
OTHER_PROVIDERS = ("fireworks_ai", "perplexity")
"""Those whose calls litellm (1.106) prices by more than their rates."""


class Entry:
    """A model of the table."""

    __slots__ = ("max_input_tokens", "mode", "plain", "provider", "rates")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.mode: str | None = fields.get("mode")
        self.provider: str | None = fields.get("litellm_provider")
        self.max_input_tokens: int | None = fields.get("max_input_tokens")
        self.plain = self.provider not in OTHER_PROVIDERS and not any(
            fields.get(key) for key in OTHER_ARITHMETIC
        )
        """Priced by its rates alone, so that `cost_usd` is what litellm would say."""
        self.rates: list[tuple[int, str, float]] = sorted(
            (_threshold(match), sys.intern(match[1]), float(value))
            for key, value in fields.items()
            if value is not None and (match := RATE.fullmatch(key))
        )
        """Above how many prompt tokens, which tokens, USD per token; later entries win."""

    @property
    def priced(self) -> bool:
        return any(kind == "input_cost_per_token" for _, kind, _ in self.rates)

    def cost_usd(self, usage: Usage) -> float:
        rates = {kind: rate for above, kind, rate in self.rates if usage.prompt_tokens > above}
        per_input = rates.get("input_cost_per_token", 0.0)
        per_cached = rates.get("cache_read_input_token_cost", per_input)
        return (
            max(0, usage.prompt_tokens - usage.cached_tokens) * per_input
            + usage.cached_tokens * per_cached
            + usage.completion_tokens * rates.get("output_cost_per_token", 0.0)
        )


def _threshold(match: re.Match[str]) -> int:
    return int(match[2]) * (1000 if match[3] else 1) if match[2] else -1


@cache
def load_table() -> dict[str, Entry]:
    """Read the table. Blocks for tens of milliseconds, once in a process."""
    spec = importlib.util.find_spec("litellm")  # finds a package without importing it
    path = Path(*(spec and spec.submodule_search_locations) or ".") / FILE
    try:
        entries: dict[str, Any] = json.loads(path.read_bytes())
    except OSError as error:
        log.warning("price_table_missing", error=type(error).__name__)
        return {}
    return {
        name: Entry(fields)
        for name, fields in entries.items()
        if isinstance(fields, dict) and name not in NO_MODELS
    }


def is_loaded() -> bool:
    return bool(load_table.cache_info().currsize)


async def table_ready() -> None:
    if not is_loaded():
        await asyncio.to_thread(load_table)


def known_model(model: str) -> Entry | None:
    """The entry under the full name, or the provider's."""
    table = load_table()
    return table.get(model) or table.get(model.partition("/")[2])


@cache
def providers() -> frozenset[str]:
    """First parts of names that name a provider, as litellm does."""
    return frozenset(entry.provider for entry in load_table().values() if entry.provider)


def card_of(model: str, settings: ModelSettings) -> ModelCard:
    known = known_model(model)
    window = settings.windows.get(model) or (known and known.max_input_tokens)
    return ModelCard(
        window_tokens=window or settings.default_window_tokens,
        priced=model in settings.prices or bool(known and known.priced),
    )


def cost_usd(model: str, usage: Usage | None, settings: ModelSettings) -> float | None:
    """By the operator's price, else by the table; None: unpriced, or no usage."""
    if usage is None:
        return None
    if price := settings.prices.get(model):
        return priced_usd(price, usage)
    known = known_model(model)
    return known.cost_usd(usage) if known and known.priced else None


def priced_usd(price: Price, usage: Usage) -> float:
    cached_price = price.cached_usd_per_mtok
    if cached_price is None:
        cached_price = price.input_usd_per_mtok
    return (
        (usage.prompt_tokens - usage.cached_tokens) * price.input_usd_per_mtok
        + usage.cached_tokens * cached_price
        + usage.completion_tokens * price.output_usd_per_mtok
    ) / 1e6
