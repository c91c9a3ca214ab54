"""Floor 3's section of the settings, and the three sections together."""

from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from actors.settings import ActorsSettings
from agent.settings import AgentSettings, Section, load

HAPROXY_HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")  # noqa: S104  compared, not bound


class ServeSettings(Section):
    """Floor 3: where HTTP listens, who may call, how large bodies and streams may be."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0: any free one."""
    proxy: Literal["haproxy", "serve"] = "haproxy"
    """What stands between callers and replicas: HAProxy, which is fast, or Serve's own in Python."""
    replicas: int = Field(default=1, ge=1)
    """Processes of the edge. They hold no state; one is a core's worth."""
    dev: bool = False
    """No keys: every caller is the user `dev`. Only on a loopback host."""
    keys_file: Path = Path("keys.yaml")
    """Who may call, unless `dev`: see `serve_app.auth`."""
    max_body_bytes: int = Field(default=4 * 1024**2, ge=2 * 1024**2)
    """The lower bound leaves room for the longest message, fully escaped in JSON."""
    max_requests: int = Field(default=256, ge=1)
    """On one replica at once, without event streams; one more is QueueFull."""
    max_streams: int = Field(default=4000, ge=1)
    """On one replica at once; one more is QueueFull."""
    stream_max_s: float = Field(default=300.0, gt=0)
    stream_max_bytes: int = Field(default=4 * 1024**2, ge=64 * 1024)

    @model_validator(mode="after")
    def _dev_stays_at_home(self) -> Self:
        if self.dev and not is_loopback(self.host):
            raise ValueError(f"dev has no keys, so it listens on loopback only, not on {self.host}")
        return self

    @model_validator(mode="after")
    def _haproxy_reaches_the_replicas(self) -> Self:
        # Replicas listen where the proxy does, and HAProxy calls them by 127.0.0.1 (2.60).
        if self.proxy == "haproxy" and self.host not in HAPROXY_HOSTS:
            raise ValueError(
                f"HAProxy listens on {' or '.join(HAPROXY_HOSTS)}, not on {self.host};"
                " with `proxy: serve` any host can be had"
            )
        return self


class TroupeSettings(Section):
    agent: AgentSettings = AgentSettings()
    actors: ActorsSettings = ActorsSettings()
    serve: ServeSettings = ServeSettings()


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_settings(files: Sequence[Path] = ()) -> TroupeSettings:
    """`configs/default.yaml`, then `files`, then the environment; later wins.

    Raises:
        SettingsInvalid: names the file or the key, and what is wrong.
    """
    return load(TroupeSettings, files)


def with_absolute_paths(settings: TroupeSettings) -> TroupeSettings:
    """Files mean the same to every process of the cluster."""
    agent = settings.agent.model_copy(
        update={
            "storage_dir": settings.agent.storage_dir.resolve(),
            "agents_dir": _resolved(settings.agent.agents_dir),
        }
    )
    edge = settings.serve.model_copy(update={"keys_file": settings.serve.keys_file.resolve()})
    return settings.model_copy(update={"agent": agent, "serve": edge})


def _resolved(path: Path | None) -> Path | None:
    return path.resolve() if path else None
