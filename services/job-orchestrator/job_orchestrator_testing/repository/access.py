"""User ids and revoked tokens in memory."""

from __future__ import annotations

from job_orchestrator.domain.access import MAX_REVOCATIONS, Revocation
from job_orchestrator.repository import documents
from job_orchestrator_testing.repository.data import MemoryRepository


class MemoryAccess(MemoryRepository):
    """An `AccessRepository`."""

    async def user_id(self, issuer: str, subject: str) -> int:
        return self._data.users.setdefault((issuer, subject), len(self._data.users) + 1)

    async def take_revocation_id(self) -> int:
        return self._take_ids("revocations", 1)[0]

    async def add_revocation(self, revocation: Revocation) -> bool:
        if len(self._data.revocations) >= MAX_REVOCATIONS:
            return False
        self._data.revocations.setdefault(revocation.id, documents.write_revocation(revocation))
        return True

    async def revocations(self) -> list[Revocation]:
        newest = sorted(self._data.revocations.values(), key=lambda each: -each["_id"])
        read = [documents.readable(documents.read_revocation, each, "revocations") for each in newest]
        return [each for each in read if each is not None]

    async def has_revocation(self, id_: int) -> bool:
        return id_ in self._data.revocations

    async def delete_revocation(self, id_: int) -> bool:
        return self._data.revocations.pop(id_, None) is not None
