"""Settings: YAML files and the environment, checked once, frozen, handed down.

`load` merges, later wins: `configs/default.yaml`, the files that are named, then variables such as
`TROUPE__ACTORS__MAX_SESSIONS=50` (two underscores between the parts; the value is read as YAML).
An unknown key is an error that names the key and the file. Each floor owns one section.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.faults import SettingsInvalid

DEFAULTS = Path(__file__).parent.parent / "configs" / "default.yaml"
ENV_PREFIX = "TROUPE__"


Sync = Literal["full", "normal"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


M = TypeVar("M", bound=BaseModel)


class ModelSettings(Section):
    """How models are reached. Provider keys come from the environment names that litellm reads."""

    api_base: str | None = None
    """Of an OpenAI-compatible server, for every model; None: the provider's own."""
    direct: bool = True
    """Ask OpenAI-compatible servers without litellm in between: `openai/`, `hosted_vllm/`,
    `huggingface/`, and any model when `api_base` is set. False: litellm asks for all."""
    first_token_s: float = Field(default=120.0, gt=0)
    between_tokens_s: float = Field(default=60.0, gt=0)
    whole_call_s: float = Field(default=600.0, gt=0)
    max_retries: int = Field(default=2, ge=0)
    """Of a call that failed before its first token, for a reason that may pass."""
    retry_base_s: float = Field(default=1.0, gt=0)
    """Doubles at each retry, with jitter; a provider's Retry-After wins."""
    limits: dict[str, "ModelLimits"] = {}
    """By glob over model names; the longest that matches counts. None that matches: no limit but
    those that refusals (429) teach."""
    limit_wait_s: float = Field(default=600.0, gt=0)
    """Of a call for its turn at a model's limit; then it fails as `model_busy`."""
    limit_queue: int = Field(default=1000, ge=1)
    """Calls that wait for one model; one more fails as `model_busy`."""
    windows: dict[str, int] = {}
    """Tokens, by model name, for models that litellm does not know."""
    default_window_tokens: int = Field(default=128_000, ge=1024)
    prices: dict[str, "Price"] = {}
    """By model name, for models that litellm cannot price."""


class ModelLimits(Section):
    """What all sessions together may ask of each model; None: as much as they like."""

    concurrency: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Input and output."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    shared: bool = False
    """All models that the glob matches share one limit, and its refusals."""


class Price(Section):
    input_usd_per_mtok: float = Field(ge=0)
    output_usd_per_mtok: float = Field(ge=0)
    cached_usd_per_mtok: float | None = None
    """None: cached prompt tokens cost as much as others."""


class ToolSettings(Section):
    bash_timeout_s: float = Field(default=240.0, gt=0)
    bash_max_timeout_s: float = Field(default=1200.0, gt=0)
    max_output_bytes: int = Field(default=25_000, ge=1000)
    read_max_lines: int = Field(default=2000, ge=1)

    max_tool_s: float = Field(default=1500.0, gt=0)
    """Of any one call; a tool's own limit comes first."""


class StorageSettings(Section):
    """Where workspaces are kept for other nodes."""

    url: str | None = None
    """An fsspec URL (`s3://bucket/prefix`, `file:///mnt/shared`, ...); None: `snapshots` in
    `storage_dir`. All nodes must see the same one."""
    max_bytes: int = Field(default=256 * 1024**2, ge=0)
    """Of one workspace's files together; those over it are left out and told of. 0: no snapshots."""
    max_files: int = Field(default=20_000, ge=1)
    timeout_s: float = Field(default=60.0, gt=0)
    """Of one save or restore."""


class JournalSettings(Section):
    """Where sessions are kept."""

    url: str = "sqlite:///journal.sqlite3"
    """`memory:`, `sqlite:///path` (relative to `storage_dir`), or `postgresql://user@host:port/db`,
    with the password in PGPASSWORD or a .pgpass file of every node."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Of one answer of a journal's server."""
    sync: Sync = "full"
    """What a loss of power may take: `full`, nothing that was acknowledged; `normal`, the last moments,
    and on a Postgres server its crash too. A death of a process of ours takes nothing either way. The
    memory journal knows no difference."""


class SecretsSettings(Section):
    key_env: str | None = None
    """Name of the environment variable with the Fernet key, on every node, under which users' tokens
    are kept in the journal's database. None: in memory only, so a restarted cluster has forgotten them."""


class AgentSettings(Section):
    """Floor 1."""

    journal: JournalSettings = JournalSettings()
    storage_dir: Path = Path("var")
    """Workspaces, trajectories and the embedded journal."""
    agents_dir: Path | None = None
    """More agents beside the shipped ones: a directory of `*.yaml`, each an AgentSpec."""
    default_agent: str = "default"
    default_model: str | None = None
    """None: the agent's own."""
    model: ModelSettings = ModelSettings()
    tools: ToolSettings = ToolSettings()
    storage: StorageSettings = StorageSettings()
    secrets: SecretsSettings = SecretsSettings()


def read_yaml(path: Path) -> dict[str, Any]:
    """
    Raises:
        SettingsInvalid: no such file, not YAML, or not a mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise SettingsInvalid(f"{path}: cannot be read ({cause.strerror})") from cause
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise SettingsInvalid(f"{path}: not YAML: {cause}") from cause
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SettingsInvalid(f"{path}: the file holds no mapping")
    return value  # pyright: ignore[reportUnknownVariableType]


def merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping; anything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = (
            merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value  # pyright: ignore[reportUnknownArgumentType]
        )
    return result


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The `TROUPE__A__B` variables as nested mappings.

    Raises:
        SettingsInvalid: names a variable whose value is not YAML.
    """
    tree: dict[str, Any] = {}
    for name, text in environ.items():
        if name.startswith(ENV_PREFIX):
            *parents, leaf = name.removeprefix(ENV_PREFIX).lower().split("__")
            try:
                branch: dict[str, Any] = {leaf: yaml.safe_load(text)}
            except yaml.YAMLError as cause:
                raise SettingsInvalid(f"{name}: not YAML") from cause
            for parent in reversed(parents):
                branch = {parent: branch}
            tree = merged(tree, branch)
    return tree


def load(kind: type[M], files: Sequence[Path] = (), environ: Mapping[str, str] = os.environ) -> M:
    """Read every source into one value of `kind`, whose fields are the sections.

    Raises:
        SettingsInvalid: names the file or the key, and what is wrong.
    """
    tree: dict[str, Any] = {}
    for path in (DEFAULTS, *files):
        tree = merged(tree, read_yaml(path))
        checked(kind, tree, str(path))
    return checked(kind, merged(tree, from_environment(environ)), "the environment")


def checked(kind: type[M], tree: dict[str, Any], source: str) -> M:
    """
    Raises:
        SettingsInvalid: names `source`, each key that is wrong, and what is wrong with it.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as cause:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in error['loc']) or 'settings'}: {_said(error)}"
            for error in cause.errors(include_url=False, include_input=False)
        )
        raise SettingsInvalid(f"{source}: {problems}") from cause


def _said(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "there is no such setting (configs/default.yaml has them all)"
    return error["msg"].removeprefix("Value error, ")
