"""`LocalSessions`: the whole of floor 2 in one process, without Ray.

For tests, and as the reference that the bench measures Ray against. The same desk, activations and feeds.
"""

from typing import Self

from actors.desk import Desk, Host, Route
from actors.host import SessionHost
from actors.kit import Kit
from actors.routed import RoutedSessions
from agent.spec import AgentSpec
from agent.vault import Vault


class LocalHosts:
    """Every session gets a host of its own, as it gets an actor of its own on Ray."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self.desk: Desk
        self.by_name: dict[str, SessionHost] = {}
        self._n_made = 0

    @property
    def n_warm(self) -> int:
        return 0

    async def acquire(self) -> SessionHost:
        self._n_made += 1
        host = SessionHost(self._kit, f"local-{self._n_made}", self.desk.note)
        self.by_name[host.name] = host
        return host

    async def give_back(self, host: Host, *, clean: bool) -> None:
        del clean  # nothing is reused here
        if ended := self.by_name.pop(host.name, None):
            ended.alive = False


class LocalSessions(RoutedSessions):
    """
    Args:
        agents: by name; `kit.agent.default_agent` must be one of them.
    """

    def __init__(
        self, kit: Kit, agents: dict[str, AgentSpec], *, vault: Vault | None = None
    ) -> None:
        self.hosts = LocalHosts(kit)
        self.desk = Desk(
            kit, self.hosts, agents, default_model=kit.agent.default_model, vault=vault
        )
        self.hosts.desk = self.desk
        super().__init__(self.desk, kit)

    def _stage(self, route: Route) -> SessionHost:
        host = self.hosts.by_name.get(route.host)
        return host or SessionHost(self._kit, route.host, self.desk.note)

    async def __aenter__(self) -> Self:
        self.desk.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Bring every session to rest, end every process. The journal stays open: it was given."""
        await self.desk.drain()
        await self.desk.close()
