import json
import re
import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agent.redact import MARK, redact

R = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7"
PEM = "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----".format(
    "\n".join(["MIIEpAIBAAKCAQEAyXo1B2c3D4e5F6g7H8i9J0" * 2] * 20)
)
SECRETS = {
    "hugging face": f"hf_{R}",
    "anthropic": f"sk-ant-api03-{R}-{R}_AA",
    "openai": f"sk-{R}",
    "openai project": f"sk-proj-{R}-_{R}",
    "openrouter": f"sk-or-v1-{R}",
    "github": f"ghp_{R}",
    "github server": f"ghs_{R}",
    "github fine": f"github_pat_11ABCDEFG0_{R}",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "aws session": "ASIAIOSFODNN7EXAMPLE",
    "slack": "xoxb-123456789012-abcdefGHIJ",
    "google": "AIza" + R + "x",
    "groq": f"gsk_{R}{R}",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    "private key": PEM,
    "private key, cut": PEM[:300],
    "private key as JSON": json.dumps(PEM)[1:-1],
}
AROUND = [
    "{}",
    "key {} end",
    '{{"a": "{}"}}',
    "export X={}",
    "curl -H 'x: {}' u",
    "({})",
    "x={}&y=1",
]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_replaced_wherever_it_stands(kind: str, around: str) -> None:
    cleaned, n = redact(around.format(SECRETS[kind]))
    assert cleaned == around.format(MARK)
    assert n == 1


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("export HF_TOKEN=abcdef", f"export HF_TOKEN={MARK}"),
        ('OPENAI_API_KEY="abcd"', f'OPENAI_API_KEY="{MARK}"'),
        ("AWS_SECRET_ACCESS_KEY=abc/def+ghi", f"AWS_SECRET_ACCESS_KEY={MARK}"),
        ("AWS_ACCESS_KEY_ID: x1234567", f"AWS_ACCESS_KEY_ID: {MARK}"),
        ("DB_PASSWORD=hunter two", f"DB_PASSWORD={MARK} two"),
        ("A_SECRET='pass', B=1", f"A_SECRET='{MARK}', B=1"),
        ('{"password": "opensesame"}', f'{{"password": "{MARK}"}}'),
        ('{"access_token": "abcdefgh"}', f'{{"access_token": "{MARK}"}}'),
        ('{"apiKey": "abcdefgh"}', f'{{"apiKey": "{MARK}"}}'),
        ('{"token": "abcd1234"}', f'{{"token": "{MARK}"}}'),
        ("password: hunter22", f"password: {MARK}"),
        ('{"command": "echo {\\"api_key\\": \\"abcdefgh\\"}"}', None),
        ("Authorization: Bearer abcdefghijkl", f"Authorization: Bearer {MARK}"),
        ("authorization: basic dXNlcjpwYXNz", f"authorization: basic {MARK}"),
        ("use Bearer abcdefgh12345678 there", f"use Bearer {MARK} there"),
        (
            "git clone https://me:opensesame@example.org/x",
            f"git clone https://{MARK}@example.org/x",
        ),
    ],
)
def test_what_a_sensitive_name_holds_is_replaced(text: str, cleaned: str | None) -> None:
    found, n = redact(text)
    assert n == 1
    assert "abcdefgh" not in found
    assert cleaned is None or found == cleaned


def test_a_sensitive_name_in_a_mapping_counts_as_in_text() -> None:
    value = {
        "env": {"HF_TOKEN": "abcd", "db_password": "abcdefgh", "PATH": "/bin"},
        "tokens": ["abcd1234abcd1234"],
        "n": 3,
        f"hf_{R}": None,
    }
    cleaned, n = redact(value)
    assert cleaned == {
        "env": {"HF_TOKEN": MARK, "db_password": MARK, "PATH": "/bin"},
        "tokens": ["abcd1234abcd1234"],
        "n": 3,
        MARK: None,
    }
    assert n == 3
    assert value["n"] == 3
    assert "HF_TOKEN" in str(value)


def test_literal_secrets_are_replaced_longest_first_and_as_json() -> None:
    cleaned, n = redact(
        ["a horse, a horse battery", json.dumps('say "it"!\n now')],
        literals=["horse battery", "horse b", 'say "it"!\n', "no", ""],
    )
    assert cleaned == [f"a horse, a {MARK}", f'"{MARK} now"']
    assert n == 2


ORDINARY = [
    "max_tokens=4096, total_tokens: 128000",
    "EOS_TOKEN = tokenizer.eos_token",
    "tokenizer.pad_token = tokenizer.eos_token",
    'pad_token="<|endoftext|>", bos_token: "[CLS]"',
    '{"token": "Hello", "logprob": -0.1}',
    "HF_TOKEN=$HF_TOKEN python x.py --token ${HF_TOKEN}",
    'HF_TOKEN = os.environ["HF_TOKEN"]',
    "api_key = get_api_key()",
    "def login(token: str, password: str | None = None) -> None:",
    "if token == expected: password=None",
    "the password: nobody knows; a secret: everybody does",
    "sk-learn is scikit-learn; sk-folding-cube; task-force-of-the-many-nations",
    "hf_hub_download and hf_transfer_enabled",
    "the bearer of good-news-from-everywhere, Bearer token",
    "Authorization: Bearer $TOKEN",
    "-----BEGIN PRIVATE KEY----- is the header of a PEM file",
    "commit 3f786850e387550fdab836ed7e6dc881de23001b",
    "550e8400-e29b-41d4-a716-446655440000",
    "https://example.org:8080/a?b=c@d and http://localhost:8000",
    "AKIA is a prefix, ASIA a continent",
    "eyJ begins a JWT. It goes on.",
    "git@github.com:owner/name.git",
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == (text, 0)
    assert redact(json.dumps({"command": text})) == (json.dumps({"command": text}), 0)


WORDS = st.one_of(
    st.text(string.ascii_letters + string.punctuation, max_size=8),
    st.text(string.ascii_lowercase, min_size=1, max_size=30),
    st.integers(0, 10**9).map(str),
    st.uuids().map(str),
    st.sampled_from(
        ["sk-", "hf_", "gh", "Bearer", "eyJ", "AKIA", "-----BEGIN", "https://", "tokens"]
    ),
)


@given(st.lists(WORDS).map(" ".join))
def test_any_order_of_ordinary_words_stays(text: str) -> None:
    assume(not re.search(r"(?i)(token|key|secret|password)\W*[=:]|bearer +\S*[0-9]", text))
    assert redact(text) == (text, 0)


@given(st.lists(st.sampled_from(ORDINARY)).map("\n".join))
def test_any_order_of_ordinary_lines_stays(text: str) -> None:
    assert redact(text) == (text, 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON, st.sampled_from(sorted(SECRETS)))
def test_a_value_keeps_its_shape_and_is_clean_after_one_pass(value: object, kind: str) -> None:
    cleaned, n = redact([value, {"deep": [SECRETS[kind]]}])
    assert n >= 1
    assert cleaned[1] == {"deep": [MARK]}
    assert redact(cleaned) == (cleaned, 0)


@pytest.mark.parametrize(
    "piece",
    [
        "sk-", "sk-ant-", "sk-ant-a", "hf_", "ghp_", "github_pat_", "xoxb-", "eyJ", "eyJaaaaaaaa.",
        "a", "TOKEN", "TOKEN=", "token: ", "password=a", "Bearer ", "bearer a-", "://a", "://a:",
        "-----BEGIN PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----\nMIIEpAIBAAKCAQEA", "- ", '\\"',
        "-----BEGIN PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA" * 99 + "!", "AKIA", "A1", 'api_key\\\\"',
    ],
)  # fmt: skip
def test_hostile_text_takes_linear_time(piece: str) -> None:
    redact(
        piece * (1_000_000 // len(piece))
    )  # a quadratic pattern would not be back in the test's limit
