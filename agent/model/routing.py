"""The one model of a process: a name says which way a request goes."""

from collections.abc import AsyncGenerator

from agent.model.contract import (
    Completion,
    Model,
    ModelCard,
    ModelRequest,
    ReasoningChunk,
    TextChunk,
)
from agent.model.litellm_adapter import LitellmModel
from agent.model.retry import RetryingModel
from agent.settings import ModelSettings
from agent.testing import NamedScripts

SCRIPTED = "scripted/"


def model_from(settings: ModelSettings) -> "RoutedModel":
    return RoutedModel(settings)


class RoutedModel:
    """`scripted/...` goes to the shipped scripts, every other name to litellm with retries."""

    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self._scripted = NamedScripts()
        self._litellm = LitellmModel(settings)
        self._retrying = RetryingModel(self._litellm, settings)

    def stream(
        self, request: ModelRequest
    ) -> AsyncGenerator[TextChunk | ReasoningChunk | Completion]:
        return self._way(request.model).stream(request)

    async def card(self, model: str) -> ModelCard:
        card = await self._way(model).card(model)
        return card._replace(window_tokens=self._settings.windows.get(model, card.window_tokens))

    async def warm(self, model: str) -> None:
        """Have what `model` needs loaded."""
        if not model.startswith(SCRIPTED):
            await self._litellm.warm()

    def _way(self, model: str) -> Model:
        return self._scripted if model.startswith(SCRIPTED) else self._retrying
