"""The vault: what opens what, and that its key goes nowhere."""

import pickle
import traceback

import pytest
from cryptography.fernet import Fernet

from agent.faults import SettingsInvalid
from agent.settings import SecretsSettings
from agent.vault import Vault, new_key

TOKEN = "hf_correct horse \N{SNOWMAN}"
NAMED = SecretsSettings(key_env="TOKENS_KEY")


def test_what_is_sealed_opens_again_and_shows_nothing() -> None:
    sealed = Vault(new_key()).seal("s", TOKEN)
    assert b"horse" not in sealed
    key = new_key()
    assert Vault(key).unseal("s", Vault(key).seal("s", TOKEN)) == TOKEN


def test_only_its_own_key_and_session_open_it() -> None:
    vault = Vault(new_key())
    sealed = vault.seal("s", TOKEN)
    assert Vault(new_key()).unseal("s", sealed) is None
    assert vault.unseal("another", sealed) is None
    assert vault.unseal("s", sealed[:-1]) is None
    assert vault.unseal("s", b"") is None


def test_keys_rotate() -> None:
    old, new = new_key(), new_key()
    sealed = Vault(old).seal("s", TOKEN)
    both = Vault(f"{new}, {old}")
    assert both.unseal("s", sealed) == TOKEN
    assert Vault(new).unseal("s", both.seal("s", TOKEN)) == TOKEN
    assert Vault(new).unseal("s", sealed) is None


def test_no_variable_is_named_no_vault() -> None:
    assert Vault.of(SecretsSettings(), {"TOKENS_KEY": new_key()}) is None


def test_the_named_variable_holds_the_key() -> None:
    vault = Vault.of(NAMED, {"TOKENS_KEY": new_key()})
    assert vault
    assert vault.unseal("s", vault.seal("s", TOKEN)) == TOKEN


@pytest.mark.parametrize("environ", [{}, {"TOKENS_KEY": ""}])
def test_a_missing_variable_is_named(environ: dict[str, str]) -> None:
    with pytest.raises(SettingsInvalid, match=r"no environment variable TOKENS_KEY.*secrets-key"):
        Vault.of(NAMED, environ)


@pytest.mark.parametrize("held", ["my password", "a" * 44, "\N{SNOWMAN}", "A" * 43 + "=,"])
def test_a_malformed_key_is_named_and_not_quoted(held: str) -> None:
    with pytest.raises(SettingsInvalid, match="TOKENS_KEY holds no Fernet key") as caught:
        Vault.of(NAMED, {"TOKENS_KEY": held})
    assert held not in "".join(traceback.format_exception(caught.value))


def test_a_vault_does_not_travel() -> None:
    with pytest.raises(TypeError, match="stays in its process"):
        pickle.dumps(Vault(new_key()))


def test_a_new_key_is_a_fernet_key() -> None:
    Fernet(new_key())
    assert new_key() != new_key()
