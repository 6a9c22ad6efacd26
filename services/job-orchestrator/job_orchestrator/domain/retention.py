"""How long jobs are kept after their end. ADR 0072."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from pydantic import AwareDatetime

PROTECTED: Final = 2  # newest completed jobs of a subnet, which the next comparison needs


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A settled job, as far as retention needs it."""

    id: int
    end_time: AwareDatetime
    subnet_id: int


@dataclass(frozen=True, slots=True)
class SubnetRetention:
    """The retention of an existing subnet."""

    keep_days: int | None = None
    """The subnet's own; None for the platform's."""

    newest: frozenset[int] = frozenset()
    """Ids of the `PROTECTED` newest completed jobs."""


def is_due(job: EndedJob, subnet: SubnetRetention | None, keep: timedelta | None, now: datetime) -> bool:
    """Return whether the job is to be deleted by age.

    Args:
        job: the job.
        subnet: of the job; None if it was deleted.
        keep: the platform's retention; None keeps all.
        now: the platform's time.
    """
    if subnet is not None and job.id in subnet.newest:
        return False
    if subnet is not None and subnet.keep_days is not None:
        keep = timedelta(days=subnet.keep_days)
    return keep is not None and job.end_time < now - keep
