"""Floor 2's section of the settings."""

from pydantic import Field

from agent.settings import Section


class Quota(Section):
    """At most `per_day` sessions of a user use a model of this group, counted at a session's first use."""

    models: str
    """Glob over model names."""
    per_day: int = Field(ge=0)


class WarmSettings(Section):
    """Processes that wait for sessions with their imports done."""

    min: int = Field(default=1, ge=0)
    """Kept ready: more are started in the background where sessions took them."""
    spare: int = Field(default=8, ge=0)
    """On top of `min`, at most so many that sessions left are kept."""
    start_rate: float = Field(default=2.0, gt=0)
    """Starts per second in the background, at most; fewer while turns run."""
    max_uses: int = Field(default=50, ge=1)
    """Sessions that a process hosts, one after another, before it is replaced."""
    max_memory_mb: int = Field(default=160, ge=1)
    """Of a process that no session lives in; one that takes more is replaced."""


class ActorsSettings(Section):
    """Floor 2: capacity, placement, time limits."""

    max_sessions: int = Field(default=200, ge=1)
    max_sessions_per_user: int = Field(default=10, ge=1)
    bulk_share: float = Field(default=0.5, ge=0, le=1)
    """Of `max_sessions`, for the bulk lane."""
    reservation_s: float = Field(default=60.0, gt=0)
    """A slot that was taken and not confirmed is given back after this."""
    idle_s: float | None = Field(default=600.0, gt=0)
    """A session without a turn leaves after this. None: only when its slot or its memory is needed."""
    memory_high: float = Field(default=0.85, gt=0, le=1)
    """Share of a node's memory from which its idle sessions leave, the longest idle first. Ray kills
    processes at 0.95."""
    warm: WarmSettings = WarmSettings()
    call_timeout_s: float = Field(default=60.0, gt=0)
    """Limit of one call between the edge, the manager and a session actor."""
    gateway_silence_s: float = Field(default=60.0, ge=20)
    """A model gateway that sends nothing for this long, not even its heartbeat of 15 s, is lost."""
    page_wait_s: float = Field(default=10.0, gt=0, le=15)
    """Limit of one wait of a reader; the stream's heartbeat."""
    close_wait_s: float = Field(default=30.0, gt=0)
    """Limit for a session to come to rest when it is closed, deleted or drained."""
    drain_s: float = Field(default=30.0, gt=0)
    """What running turns get to reach a place between two steps when the cluster stops or is rolled."""
    max_recoveries: int = Field(default=3, ge=0)
    """Deaths of the process under one turn, within `recovery_window_s`, after which the turn is failed
    and not begun again."""
    recovery_window_s: float = Field(default=600.0, gt=0)
    sweep_s: float = Field(default=15.0, gt=0)
    """Between two looks for open turns that nobody works at."""
    probe_s: float = Field(default=10.0, gt=0)
    """A session's process that does not answer for this long, twice in a row, is replaced."""
    reap_s: float = Field(default=10.0, gt=0)
    """Between two looks of a node for processes that dead sessions left."""
    max_readers: int = Field(default=2000, ge=1)
    """Of one session at once; one more is refused."""
    ring_events: int = Field(default=2048, ge=16)
    """Events that an activation keeps for readers that come back; older facts come from the journal."""
    max_queued_turns: int = Field(default=32, ge=1)
    """Commands waiting behind a running turn; one more is QueueFull."""
    quotas: dict[str, Quota] = {}
    """By group name."""
