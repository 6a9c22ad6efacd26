"""Store the orchestrator's documents in MongoDB."""

from __future__ import annotations

from job_orchestrator.repository.audit import Exported, MongoAudit, Verification
from job_orchestrator.repository.store import MongoStore, platform_time, read_time

__all__ = ["Exported", "MongoAudit", "MongoStore", "Verification", "platform_time", "read_time"]
