"""Which model a house uses when nobody says."""

from collections.abc import Mapping
from typing import NamedTuple

SCRIPTED = "scripted/demo"

PROVIDERS = (
    ("ANTHROPIC_API_KEY", "anthropic/claude-sonnet-5-5"),
    ("OPENAI_API_KEY", "openai/gpt-5.6"),
    ("GEMINI_API_KEY", "gemini/gemini-pro-latest"),
    ("MISTRAL_API_KEY", "mistral/mistral-large-latest"),
    ("HF_TOKEN", "huggingface/openai/gpt-oss-120b"),
)
"""The environment name that litellm reads, and a model of that provider that calls tools and that
litellm 1.106 knows. HF_TOKEN is last: most who have it set it for downloads."""


class Choice(NamedTuple):
    model: str
    reason: str


def choose(option: str | None, configured: str | None, environ: Mapping[str, str]) -> Choice:
    """`--model`, else the configuration, else a provider whose key is there, else the script."""
    if option:
        return Choice(option, "asked for with --model")
    if configured:
        return Choice(configured, "agent.default_model of the configuration")
    for name, model in PROVIDERS:
        if environ.get(name):
            return Choice(model, f"{name} is set; choose another with --model")
    return Choice(SCRIPTED, "a script plays the model: no --model and no provider key was found")
