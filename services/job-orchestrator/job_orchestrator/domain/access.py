"""Revoked tokens."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from scanfleet.runtime.settings import MAX_LIFE_SECONDS

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
