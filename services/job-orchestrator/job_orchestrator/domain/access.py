"""User ids and revoked tokens.

`job_orchestrator.repository` has the MongoDB store, `job_orchestrator_testing` the in-memory one; both pass the same suite.
Every method raises `DependencyError` if the database is unavailable.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol

from scanfleet.settings import MAX_LIFE_SECONDS

MAX_REVOCATIONS: Final = 1_000  # every gateway reads all of them every two seconds
KEPT: Final = timedelta(seconds=MAX_LIFE_SECONDS) + timedelta(days=1)
"""Longer than the lifetime of any token issued before a revocation, whatever the gateways' settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """Tokens that are refused: the one with this `jti`, or those issued before a time to this `sub` or user id."""

    id: int
    jti: str | None
    sub: str | None
    user_id: int | None
    issued_before: datetime | None
    created_by: int
    created_at: datetime
    expires_at: datetime


class Access(Protocol):
    async def user_id(self, issuer: str, subject: str) -> int:
        """Return the id of the issuer's user `subject`; the first call assigns it, and it never changes."""

    async def add_revocation(self, revocation: Revocation) -> bool:
        """Store the revocation; return False if there are already `MAX_REVOCATIONS`."""

    async def take_revocation_id(self) -> int: ...

    async def revocations(self) -> list[Revocation]:
        """Return all revocations, newest first."""

    async def delete_revocation(self, id_: int) -> bool:
        """Delete the revocation; return False if it does not exist."""
