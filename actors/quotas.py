"""Daily quotas for groups of models."""

from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase

from actors.kit import Kit
from actors.protocol import QuotaExceeded


async def charge(kit: Kit, user_id: str, session_id: str, model: str) -> None:
    """Count the session against the quotas of the model that is about to work. Once per session and
    group, however often it is called.

    Raises:
        QuotaExceeded
    """
    now = datetime.now(UTC)
    for group, quota in kit.actors.quotas.items():
        if fnmatchcase(model, quota.models) and not await kit.journal.charge_quota(
            user_id, group, session_id, day=now.date(), limit=quota.per_day
        ):
            raise QuotaExceeded(
                f"{quota.per_day} sessions a day may use models of the group {group}.",
                group=group,
                limit=quota.per_day,
                retry_after_s=_to_tomorrow_s(now),
            )


def _to_tomorrow_s(now: datetime) -> int:
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    return max(1, round((midnight - now).total_seconds()))
