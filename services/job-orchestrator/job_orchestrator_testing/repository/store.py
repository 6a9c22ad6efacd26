"""All repositories of one store in memory."""

from __future__ import annotations

from datetime import datetime

from job_orchestrator_testing.repository.access import MemoryAccess
from job_orchestrator_testing.repository.audit import MemoryAudit
from job_orchestrator_testing.repository.chunks import MemoryChunks
from job_orchestrator_testing.repository.commands import MemoryCommands
from job_orchestrator_testing.repository.data import Data
from job_orchestrator_testing.repository.deletions import MemoryDeletions
from job_orchestrator_testing.repository.dispatch import MemoryDispatch
from job_orchestrator_testing.repository.jobs import MemoryJobs
from job_orchestrator_testing.repository.resources import MemoryResources, MemorySubnets
from job_orchestrator_testing.repository.retention import MemoryRetention
from scanfleet.clock import utc_now
from scanfleet.errors import DependencyError
from scanfleet.scanning.policy import ScanPolicy


class MemoryStore:
    """A `Store`. Set `data.unavailable` to let every call fail as if the database were unreachable.

    A test replaces a repository by its own on the same `data`.
    """

    def __init__(self) -> None:
        self.data = Data()
        self.subnets = MemorySubnets(self.data, "subnets")
        self.policies = MemoryResources[ScanPolicy](self.data, "policies")
        self.audit = MemoryAudit(self.data)
        self.access = MemoryAccess(self.data)
        self.commands = MemoryCommands(self.data)
        self.jobs = MemoryJobs(self.data)
        self.deletions = MemoryDeletions(self.data)
        self.retention = MemoryRetention(self.data, self.subnets)
        self.chunks = MemoryChunks(self.data)
        self.dispatch = MemoryDispatch(self.data)

    async def time(self) -> datetime:
        if self.data.unavailable:
            raise DependencyError("the database is unavailable")
        return utc_now()
