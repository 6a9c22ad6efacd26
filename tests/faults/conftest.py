"""One platform for all faults: what one does to it must not show to the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.invariants import Invariants
from tests.faults.kit import Caller, Platform


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    made = Platform(tmp_path_factory.mktemp("faults"))
    made.up()
    yield made
    made.down()


@pytest.fixture(scope="session")
def invariants(platform: Platform) -> Invariants:
    return Invariants(platform)


@pytest.fixture
def user(platform: Platform) -> Iterator[Caller]:
    """Somebody new, on the first gateway."""
    found = platform.caller()
    yield found
    found.close()
