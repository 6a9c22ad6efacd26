"""Store the orchestrator's documents in MongoDB."""

from __future__ import annotations

from job_orchestrator.repository.audit import Exported, MongoAudit
from job_orchestrator.repository.audit_verifier import AuditVerifier, Verification
from job_orchestrator.repository.store import MongoStore, platform_time, read_time

__all__ = ["AuditVerifier", "Exported", "MongoAudit", "MongoStore", "Verification", "platform_time", "read_time"]
