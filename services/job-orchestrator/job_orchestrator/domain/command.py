"""The decision on a command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from job_orchestrator.domain.job import ScanJob

KEY_REUSED: Final = "Idempotency-Key was used for another request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """The decision on one command id, or on one Idempotency-Key; the first insert wins.

    `accepted` submits contain all of their jobs with their snapshots, so that any replica can finish creating them. A request
    that creates another object under a key contains its answer.
    """

    id: str
    user_id: int
    state: Literal["accepted", "rejected", "expired"]
    body: str = ""
    """Hash of the request, which distinguishes a retry from another request with the same key."""
    idempotency_key: str | None = None
    jobs: tuple[ScanJob, ...] = ()
    created: str = ""
    """The created object of a resource, as the API shows it in JSON."""
    cancels: int | None = None
    """The job that a cancel refers to."""
    admin: bool = False
    """Whether an administrator cancels, who may cancel jobs of other users."""
    status: int = 0
    error: str = ""
    rule: str = ""
