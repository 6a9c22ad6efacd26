"""Apply the user grants to a job that was accepted under one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv6Network
from typing import Final, Protocol

from job_orchestrator.domain.job import ScanJob
from scanfleet.contracts.user_grants import UserGrants
from scanfleet.scanning.targets import parse_network


class Granted(Protocol):
    """A job, as far as its hours need it."""

    @property
    def user_id(self) -> int: ...

    @property
    def granted_by(self) -> str: ...


@dataclass(frozen=True, slots=True)
class JobGrants:
    """The current grants; None if users are not limited."""

    grants: UserGrants | None = None
    nat64: Sequence[IPv6Network] = ()

    def refusal(self, job: ScanJob) -> str | None:
        """Return why the grants no longer allow the job, regardless of hours; None if they do."""
        if self.grants is None:
            return None
        return self.grants.refusal(job.granted_by, job.user_id, parse_network(job.cidr), job.policy, self.nat64)

    def open_for(self, job: ScanJob, now: datetime) -> timedelta | None:
        """Return how long the grant's hours stay open; zero while closed, None without a limit."""
        return self.grants.open_for(job.granted_by, job.user_id, now) if self.grants else None

    def closed(self, job: Granted, now: datetime) -> str | None:
        """Return an error message while the grant's hours are closed, else None."""
        return self.grants.closed(job.granted_by, job.user_id, now) if self.grants else None

    def opens_at(self, job: ScanJob, now: datetime) -> datetime | None:
        """Return when the grant's hours begin; None if they never do."""
        return self.grants.opens_at(job.granted_by, job.user_id, now) if self.grants else None


UNLIMITED: Final = JobGrants()
