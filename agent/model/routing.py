"""The one model of a process: a name says which way a request goes."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from agent.model import prices
from agent.model.contract import (
    Completion,
    Model,
    ModelCard,
    ModelRequest,
    ReasoningChunk,
    TextChunk,
)
from agent.model.direct import DirectModel
from agent.model.endpoints import is_direct
from agent.model.limiter import LimitStats
from agent.model.limits import LimitedModel, Limits
from agent.model.litellm_adapter import LitellmModel
from agent.model.retry import RetryingModel
from agent.settings import ModelSettings
from agent.testing import NamedScripts

SCRIPTED = "scripted/"


def model_from(settings: ModelSettings, *, n_replicas: int = 1) -> "RoutedModel":
    return RoutedModel(settings, n_replicas=n_replicas)


class RoutedModel:
    """`scripted/...` goes to the shipped scripts. Every other name is asked with retries and within
    its limits: directly where `agent.model.endpoints` knows an OpenAI-compatible server for it, else
    through litellm. `n_replicas`: processes among which the limits of the settings are divided."""

    def __init__(self, settings: ModelSettings, *, n_replicas: int = 1) -> None:
        self._settings = settings
        self._scripted = NamedScripts()
        self._litellm = LitellmModel(settings)
        self._direct = DirectModel(settings)
        # One for both ways: a request's tools may choose the way, the limit is the model's.
        self._limits = Limits(settings, n_replicas=n_replicas)
        self._through_litellm = RetryingModel(LimitedModel(self._litellm, self._limits), settings)
        self._directly = RetryingModel(LimitedModel(self._direct, self._limits), settings)

    def stream(
        self, request: ModelRequest
    ) -> AsyncGenerator[TextChunk | ReasoningChunk | Completion]:
        # A generator around the way's own would cost its step for every chunk.
        if request.model.startswith(SCRIPTED) or prices.is_loaded():
            return self._way(request).stream(request)
        return self._when_loaded(request)

    async def card(self, model: str) -> ModelCard:
        way = self._scripted if model.startswith(SCRIPTED) else self._direct
        card = await way.card(model)
        return card._replace(window_tokens=self._settings.windows.get(model, card.window_tokens))

    async def warm(self, model: str) -> None:
        """Have what `model` needs loaded."""
        await prices.table_ready()
        way = self._way(ModelRequest(model, [], tools=[{}]))
        if way is self._through_litellm:
            await self._litellm.warm()
        elif way is self._directly:
            await self._direct.warm()

    async def close(self) -> None:
        await self._direct.close()

    def limits(self) -> dict[str, LimitStats]:
        """By model, of those that were asked lately."""
        return self._limits.stats()

    async def _when_loaded(
        self, request: ModelRequest
    ) -> AsyncGenerator[TextChunk | ReasoningChunk | Completion]:
        await prices.table_ready()
        async with aclosing(self._way(request).stream(request)) as stream:
            async for item in stream:
                yield item

    def _way(self, request: ModelRequest) -> Model:
        """The table of prices must be loaded, except for scripts."""
        if request.model.startswith(SCRIPTED):
            return self._scripted
        return self._directly if is_direct(request, self._settings) else self._through_litellm
