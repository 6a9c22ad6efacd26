"""Support for tests: an in-memory store, and a simulated platform of scripted workers around real handlers."""

from __future__ import annotations

from job_orchestrator_testing.builders import KEYS, chunk, replanned, scan_job, scan_policy
from job_orchestrator_testing.repository import MemoryStore
from job_orchestrator_testing.simulation import RULES, ResultStore, Simulation, Worker

__all__ = [
    "KEYS",
    "RULES",
    "MemoryStore",
    "ResultStore",
    "Simulation",
    "Worker",
    "chunk",
    "replanned",
    "scan_job",
    "scan_policy",
]
