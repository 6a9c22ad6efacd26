"""In-memory repositories, for tests without a database, that pass the same suite as those on MongoDB."""

from __future__ import annotations

from job_orchestrator_testing.repository.chunks import MemoryChunks
from job_orchestrator_testing.repository.data import Data
from job_orchestrator_testing.repository.deletions import MemoryDeletions
from job_orchestrator_testing.repository.dispatch import MemoryDispatch
from job_orchestrator_testing.repository.jobs import MemoryJobs
from job_orchestrator_testing.repository.resources import MemorySubnets
from job_orchestrator_testing.repository.store import MemoryStore

__all__ = ["Data", "MemoryChunks", "MemoryDeletions", "MemoryDispatch", "MemoryJobs", "MemoryStore", "MemorySubnets"]
