"""Real Ray for `tests/cluster`: one local cluster for the whole run."""

import os
from collections.abc import Iterator

import pytest

# Ray reads these when it is imported.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Otherwise every worker of a driver under `uv run` starts through `uv run` in a copy of the tree.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 1024 * 1024,
    )
    yield
    ray.shutdown()
