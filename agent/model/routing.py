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
from agent.model.litellm_adapter import LitellmModel
from agent.model.retry import RetryingModel
from agent.settings import ModelSettings
from agent.testing import NamedScripts

SCRIPTED = "scripted/"


def model_from(settings: ModelSettings) -> "RoutedModel":
    return RoutedModel(settings)


class RoutedModel:
    """`scripted/...` goes to the shipped scripts. Every other name is asked with retries: directly
    where `agent.model.endpoints` knows an OpenAI-compatible server for it, else through litellm."""

    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self._scripted = NamedScripts()
        self._litellm = LitellmModel(settings)
        self._direct = DirectModel(settings)
        self._through_litellm = RetryingModel(self._litellm, settings)
        self._directly = RetryingModel(self._direct, settings)

    async def stream(
        self, request: ModelRequest
    ) -> AsyncGenerator[TextChunk | ReasoningChunk | Completion]:
        async with aclosing((await self._way(request)).stream(request)) as stream:
            async for item in stream:
                yield item

    async def card(self, model: str) -> ModelCard:
        way = self._scripted if model.startswith(SCRIPTED) else self._direct
        card = await way.card(model)
        return card._replace(window_tokens=self._settings.windows.get(model, card.window_tokens))

    async def warm(self, model: str) -> None:
        """Have what `model` needs loaded."""
        way = await self._way(ModelRequest(model, [], tools=[{}]))
        if way is self._through_litellm:
            await self._litellm.warm()
        elif way is self._directly:
            await self._direct.warm()

    async def close(self) -> None:
        await self._direct.close()

    async def _way(self, request: ModelRequest) -> Model:
        if request.model.startswith(SCRIPTED):
            return self._scripted
        await prices.table_ready()
        direct = is_direct(request, self._settings)
        return self._directly if direct else self._through_litellm
