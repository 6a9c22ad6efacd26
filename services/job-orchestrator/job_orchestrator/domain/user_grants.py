"""What the user grants say of a job that was accepted under one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv6Network
from typing import Final

from job_orchestrator.domain.job import ScanJob
from scanfleet.targets import parse_network
from scanfleet.user_grants import UserGrants


@dataclass(frozen=True, slots=True)
class JobGrants:
    """The grants of today; None if users are not limited."""

    grants: UserGrants | None = None
    nat64: Sequence[IPv6Network] = ()

    def refusal(self, job: ScanJob) -> str | None:
        """Why the job may not go on, whatever the hour; None if it may."""
        if self.grants is None:
            return None
        return self.grants.refusal(job.granted_by, job.user_id, parse_network(job.cidr), job.policy, self.nat64)

    def open_for(self, job: ScanJob, now: datetime) -> timedelta | None:
        """How long the hours of its grant go on; zero while they are closed, None if they do not limit it."""
        return self.grants.open_for(job.granted_by, job.user_id, now) if self.grants else None

    def closed(self, job: ScanJob, now: datetime) -> str | None:
        """That the job has to wait for its hours, as a sentence; None if it has not."""
        return self.grants.closed(job.granted_by, job.user_id, now) if self.grants else None

    def opens_at(self, job: ScanJob, now: datetime) -> datetime | None:
        """When its hours begin; None if they never do."""
        return self.grants.opens_at(job.granted_by, job.user_id, now) if self.grants else None


UNLIMITED: Final = JobGrants()
