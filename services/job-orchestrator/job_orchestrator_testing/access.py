"""An in-memory `Access` that passes the same suite as the one on MongoDB."""

from __future__ import annotations

from itertools import count

from job_orchestrator.domain.access import MAX_REVOCATIONS, Revocation
from job_orchestrator_testing.store import MemoryStore
from scanfleet.errors import DependencyError


class MemoryAccess:
    """Unavailable while `store` is."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._users: dict[tuple[str, str], int] = {}
        self._revocations: dict[int, Revocation] = {}
        self._ids = count(1)

    async def user_id(self, issuer: str, subject: str) -> int:
        self._check()
        return self._users.setdefault((issuer, subject), len(self._users) + 1)

    async def take_revocation_id(self) -> int:
        self._check()
        return next(self._ids)

    async def add_revocation(self, revocation: Revocation) -> bool:
        self._check()
        if len(self._revocations) >= MAX_REVOCATIONS:
            return False
        self._revocations.setdefault(revocation.id, revocation)
        return True

    async def revocations(self) -> list[Revocation]:
        self._check()
        return sorted(self._revocations.values(), key=lambda each: -each.id)

    async def delete_revocation(self, id_: int) -> bool:
        self._check()
        return self._revocations.pop(id_, None) is not None

    def _check(self) -> None:
        if self._store.unavailable:
            raise DependencyError("the database is unavailable")
