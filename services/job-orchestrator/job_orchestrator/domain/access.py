"""Who users are, and which of their tokens are revoked.

`job_orchestrator.repository` is the real store, `job_orchestrator.testing` holds the in-memory one; both pass the same suite.
Every method raises `DependencyError` when the database is unavailable.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol

from scanfleet.settings import MAX_LIFE_SECONDS

MAX_REVOCATIONS: Final = 1_000  # at once: every gateway reads all of them every two seconds
KEPT: Final = timedelta(seconds=MAX_LIFE_SECONDS) + timedelta(days=1)
"""No token that was issued before a revocation lives as long, whatever the gateways' settings are."""


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
        """The id of the user that the issuer calls `subject`; the first call assigns it, and it never changes."""

    async def add_revocation(self, revocation: Revocation) -> bool:
        """False if there are `MAX_REVOCATIONS` already."""

    async def take_revocation_id(self) -> int: ...

    async def revocations(self) -> list[Revocation]:
        """All of them, newest first."""

    async def delete_revocation(self, id_: int) -> bool:
        """False if there is none of this id."""
