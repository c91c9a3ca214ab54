import pytest


@pytest.fixture(autouse=True)
def watched(no_blocking_calls: None) -> None:
    """Everything in here runs under the detector of blocking calls."""
