"""The documents of the in-memory repositories."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from job_orchestrator.domain.chunk import Chunk
from job_orchestrator.domain.command import Command
from job_orchestrator.domain.deletion import Deletion
from job_orchestrator.domain.fairness import Account, Credit
from job_orchestrator.domain.job import ScanJob
from scanfleet.contracts import rest
from scanfleet.errors import DependencyError
from scanfleet.runtime.mongo import Document


@dataclass(kw_only=True)
class Data:
    """All documents of one store."""

    unavailable: bool = False
    ids: Counter[str] = field(default_factory=Counter)
    audit: dict[str, rest.AuditEntry] = field(default_factory=dict)
    users: dict[tuple[str, str], int] = field(default_factory=dict)
    revocations: dict[int, Document] = field(default_factory=dict)
    """As MongoDB stores them, so that a test can damage one."""

    commands: dict[str, Command] = field(default_factory=dict)
    jobs: dict[int, ScanJob] = field(default_factory=dict)
    receipts: dict[int, tuple[Deletion, datetime | None]] = field(default_factory=dict)
    """By job, with when to go on."""
    chunks: dict[str, Chunk] = field(default_factory=dict)
    accounts: dict[int, Account] = field(default_factory=dict)
    idle: dict[int, float] = field(default_factory=dict)
    """By user, since when the account is inactive."""
    virtual: float = 0.0
    workers: dict[str, tuple[Credit, float]] = field(default_factory=dict)


class MemoryRepository:
    """Every call fails while the data is unavailable."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __getattribute__(self, name: str) -> object:
        if not name.startswith("_") and object.__getattribute__(self, "_data").unavailable:
            raise DependencyError("the database is unavailable")
        return object.__getattribute__(self, name)

    def _take_ids(self, name: str, count: int) -> range:
        self._data.ids[name] += count
        return range(self._data.ids[name] - count + 1, self._data.ids[name] + 1)
