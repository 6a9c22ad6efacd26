"""One platform shared by all fault tests; a fault must leave no effects for the next test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import pytest

from tests.faults.invariants import Invariants
from tests.faults.kit import Caller, Platform

_P = TypeVar("_P", bound=Platform)
_Q = TypeVar("_Q", bound=Platform)


class Shared(Generic[_P]):
    """Provides one platform to all tests; after a failed test, whose effects are unknown, the next test gets a new one."""

    def __init__(self, session: pytest.Session, folders: pytest.TempPathFactory, make: Callable[[Path], _P]) -> None:
        self._session = session
        self._folders = folders
        self._make = make
        self._failures = 0
        self._lent: tuple[_P, Invariants] | None = None

    def lend(self) -> tuple[_P, Invariants]:
        if self._spoilt:
            self.close()
        if self._lent is None:
            self._failures = self._session.testsfailed
            made = self._make(self._folders.mktemp("faults"))
            self._lent = made, Invariants(made)
            made.up()
        return self._lent

    @contextmanager
    def replaced(self, make: Callable[[Path], _Q]) -> Iterator[Shared[_Q]]:
        """Close the platform, which scans the same addresses, and provide one that `make` creates in its place."""
        self.close()
        other = Shared(self._session, self._folders, make)
        yield other
        other.close()

    def close(self) -> None:
        if self._lent is not None:
            (platform, _), self._lent = self._lent, None
            (platform.discard if self._spoilt else platform.down)()

    @property
    def _spoilt(self) -> bool:
        return self._session.testsfailed > self._failures


@pytest.fixture(scope="package")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared[Platform]]:
    found = Shared(request.session, tmp_path_factory, Platform)
    yield found
    found.close()


@pytest.fixture
def platform(shared: Shared[Platform]) -> Platform:
    return shared.lend()[0]


@pytest.fixture
def invariants(shared: Shared[Platform]) -> Invariants:
    return shared.lend()[1]


@pytest.fixture
def user(platform: Platform) -> Iterator[Caller]:
    """A new user of the first gateway."""
    found = platform.caller()
    yield found
    found.close()
