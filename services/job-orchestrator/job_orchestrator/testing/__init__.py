"""What ships for testing: the store in memory, and a small world of scripted parts around real handlers."""

from __future__ import annotations

from job_orchestrator.testing.access import MemoryAccess
from job_orchestrator.testing.store import MemoryStore
from job_orchestrator.testing.things import KEYS, chunk, scan_job, scan_policy
from job_orchestrator.testing.world import RULES, ResultStore, Worker, World

__all__ = [
    "KEYS",
    "RULES",
    "MemoryAccess",
    "MemoryStore",
    "ResultStore",
    "Worker",
    "World",
    "chunk",
    "scan_job",
    "scan_policy",
]
