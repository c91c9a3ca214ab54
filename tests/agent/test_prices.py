"""The table is litellm's, and so are the sums."""

import subprocess
import sys

import pytest

from agent.events import Usage
from agent.model import prices
from agent.model.litellm_adapter import load_litellm
from agent.settings import ModelSettings

MODELS = (
    "openai/gpt-4o",
    "openai/gpt-4o-mini",
    "openai/gpt-3.5-turbo",
    "openai/o3",
    "openai/gpt-5.1",
    "openai/gpt-5.5",  # dearer above 272,000 tokens
    "mistral/mistral-large-latest",
    "groq/openai/gpt-oss-120b",
    "deepinfra/Qwen/Qwen3-14B",
    "anthropic/claude-sonnet-4-5",  # dearer above 200,000 tokens
)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("counts", [(1000, 200, 0), (5000, 10, 4000), (300_000, 500, 100_000)])
def test_a_price_is_what_litellm_says(model: str, counts: tuple[int, int, int]) -> None:
    prompt, completion, cached = counts
    litellms = load_litellm().cost_per_token(
        model=model,
        prompt_tokens=prompt,
        completion_tokens=completion,
        cache_read_input_tokens=cached,
    )
    usage = Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=cached,
        reasoning_tokens=0,
    )
    ours = prices.cost_usd(model, usage, ModelSettings())
    assert ours
    assert ours == pytest.approx(sum(litellms), rel=1e-9)


def test_the_table_is_litellms() -> None:
    known = {n: fields for n, fields in load_litellm().model_cost.items() if n != "sample_spec"}
    table = prices.load_table()
    assert table.keys() == known.keys()
    assert {n: e.max_input_tokens for n, e in table.items()} == {
        n: fields.get("max_input_tokens") for n, fields in known.items()
    }


def test_a_model_without_a_price_has_none() -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0, reasoning_tokens=0)
    assert prices.cost_usd("openai/nobody", usage, ModelSettings()) is None
    assert prices.cost_usd("openai/gpt-4o", None, ModelSettings()) is None


def test_the_direct_way_and_its_prices_do_not_load_litellm() -> None:
    probe = (
        "import sys, agent.model.direct, agent.model.prices as prices;"
        "assert prices.known_model('openai/gpt-4o').priced; sys.exit('litellm' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", probe], timeout=30, check=True)
