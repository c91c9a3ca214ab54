"""Where names lead, and with which key."""

import pytest

from agent.faults import ModelAuth, ModelRefused
from agent.model import prices
from agent.model.contract import ModelRequest
from agent.model.endpoints import endpoint_of, is_direct
from agent.settings import ModelSettings, Price

TOOL = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}
UNION = {"type": "function", "function": {"name": "x", "parameters": {"anyOf": []}}}
OWN = "http://model.test/v1"


@pytest.fixture(autouse=True, scope="module")
def _table() -> None:
    prices.load_table()


@pytest.mark.parametrize(
    ("model", "environ", "url", "name", "key"),
    [
        ("openai/gpt-4o", {"OPENAI_API_KEY": "k"},
         "https://api.openai.com/v1/chat/completions", "gpt-4o", "k"),
        ("openai/a/b", {"OPENAI_API_KEY": "k", "OPENAI_BASE_URL": OWN, "OPENAI_API_BASE": "http://x"},
         f"{OWN}/chat/completions", "a/b", "k"),
        ("openai/a", {"OPENAI_API_KEY": "k", "OPENAI_API_BASE": f"{OWN}/"},
         f"{OWN}/chat/completions", "a", "k"),
        ("hosted_vllm/Qwen/Qwen3-8B", {"HOSTED_VLLM_API_BASE": OWN},
         f"{OWN}/chat/completions", "Qwen/Qwen3-8B", None),
        ("hosted_vllm/q", {"HOSTED_VLLM_API_BASE": OWN, "HOSTED_VLLM_API_KEY": "k", "OPENAI_API_KEY": "o"},
         f"{OWN}/chat/completions", "q", "k"),
        ("huggingface/Qwen/Qwen3-8B", {"HF_TOKEN": "k", "HUGGINGFACE_API_KEY": "x"},
         "https://router.huggingface.co/v1/chat/completions", "Qwen/Qwen3-8B", "k"),
        ("huggingface/together/Qwen/Qwen3-8B", {"HUGGINGFACE_API_KEY": "k"},
         "https://router.huggingface.co/v1/chat/completions", "Qwen/Qwen3-8B:together", "k"),
        ("huggingface/tgi", {"HF_API_BASE": "http://tgi.test"},
         "http://tgi.test/v1/chat/completions", "tgi", None),
    ],
)  # fmt: skip
def test_a_name_leads_to_its_server(
    model: str, environ: dict[str, str], url: str, name: str, key: str | None
) -> None:
    endpoint = endpoint_of(model, ModelSettings(), environ)
    assert (endpoint.url, endpoint.model) == (url, name)
    assert endpoint.headers.get("Authorization") == (f"Bearer {key}" if key else None)


@pytest.mark.parametrize(
    ("model", "name", "key"),
    [
        ("openai/test", "test", "o"),
        ("deepseek/deepseek-chat", "deepseek-chat", "d"),
        ("groq/llama", "llama", "o"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "o"),
        ("plain", "plain", "o"),
    ],
)
def test_an_address_of_ones_own_serves_every_name(model: str, name: str, key: str) -> None:
    settings = ModelSettings(api_base=OWN)
    environ = {"OPENAI_API_KEY": "o", "DEEPSEEK_API_KEY": "d", "OPENAI_BASE_URL": "http://other"}
    assert is_direct(ModelRequest(model, []), settings, environ)
    endpoint = endpoint_of(model, settings, environ)
    assert (endpoint.url, endpoint.model) == (f"{OWN}/chat/completions", name)
    assert endpoint.headers["Authorization"] == f"Bearer {key}"


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        ("openai/gpt-4o", ["OPENAI_API_KEY"]),
        ("huggingface/Qwen/Qwen3-8B", ["HF_TOKEN"]),
    ],
)
def test_a_missing_key_is_named(model: str, missing: list[str]) -> None:
    with pytest.raises(ModelAuth) as caught:
        endpoint_of(model, ModelSettings(), {})
    assert caught.value.missing == missing


def test_a_server_without_an_address_is_refused() -> None:
    with pytest.raises(ModelRefused) as caught:
        endpoint_of("hosted_vllm/q", ModelSettings(), {})
    assert "HOSTED_VLLM_API_BASE" in caught.value.missing


@pytest.mark.parametrize(
    ("model", "direct"),
    [
        ("openai/gpt-4o", True),
        ("openai/nobody-knows", True),
        ("openai/gpt-5.1", True),
        ("openai/gpt-5.5", False),  # with tools only at /v1/responses
        ("openai/gpt-6", False),
        ("openai/o3-pro", False),
        ("openai/responses/gpt-4o", False),
        ("hosted_vllm/gpt-5.5", True),
        ("huggingface/Qwen/Qwen3-8B", True),
        ("huggingface/https://x.test/v1", False),
        ("anthropic/claude-sonnet-4-5", False),
        ("gpt-4o", False),
        ("ollama_chat/qwen3", False),
    ],
)
def test_openai_compatible_servers_are_asked_directly(model: str, direct: bool) -> None:
    request = ModelRequest(model, [], tools=[TOOL])
    assert is_direct(request, ModelSettings(), {}) is direct
    assert not is_direct(request, ModelSettings(direct=False), {})


def test_what_litellm_rewrites_for_openai_goes_through_litellm() -> None:
    request = ModelRequest("openai/gpt-4o", [], tools=[UNION])
    assert not is_direct(request, ModelSettings(), {})
    assert is_direct(request, ModelSettings(api_base=OWN), {})


def test_what_only_litellm_can_price_goes_through_litellm_unless_the_operator_prices_it() -> None:
    request = ModelRequest("dashscope/qwen3-max", [])
    price = {request.model: Price(input_usd_per_mtok=1, output_usd_per_mtok=1)}
    assert not is_direct(request, ModelSettings(api_base=OWN), {})
    assert is_direct(request, ModelSettings(api_base=OWN, prices=price), {})


@pytest.mark.parametrize(
    ("model", "field"),
    [
        ("openai/o3", "max_completion_tokens"),
        ("openai/gpt-5-mini", "max_completion_tokens"),
        ("openai/gpt-4o", "max_tokens"),
        ("openai/gpt-5-chat-latest", "max_tokens"),
        ("hosted_vllm/gpt-5-mini", "max_tokens"),
    ],
)
def test_the_limit_of_an_answer_has_the_servers_name(model: str, field: str) -> None:
    settings = ModelSettings(api_base=OWN)
    assert endpoint_of(model, settings, {"OPENAI_API_KEY": "k"}).limit_field == field
