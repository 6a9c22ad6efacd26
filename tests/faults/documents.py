"""The documents of a platform in MongoDB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pymongo import MongoClient

Document = dict[str, Any]


class Documents:
    """Reads the documents of both services, and injects faults into mongod.

    Attributes:
        client: of the administrator.
    """

    def __init__(self, uri: str) -> None:
        self.client: MongoClient[Document] = MongoClient(uri, tz_aware=True)
        self._orchestrator = self.client["scanfleet_job_orchestrator"]
        self._result_store = self.client["scanfleet_result_store"]

    def jobs(self, **query: Any) -> list[Document]:
        return list(self._orchestrator["jobs"].find({"deletion": {"$exists": False}} | query))

    def deletions(self, **query: Any) -> list[Document]:
        """Return the receipts of deleted jobs."""
        return self.jobs(**{"deletion": {"$exists": True}} | query)

    def chunks(self, job_id: int, **query: Any) -> list[Document]:
        found = self._orchestrator["chunks"].find({"job_id": job_id} | query)
        return sorted(found, key=lambda chunk: chunk["index"])

    def commands(self, **query: Any) -> list[Document]:
        return list(self._orchestrator["commands"].find(query))

    def hosts(self, **query: Any) -> list[Document]:
        return list(self._result_store["hosts"].find(query))

    def closed(self, **query: Any) -> list[Document]:
        return list(self._result_store["chunks"].find(query))

    @contextmanager
    def failing(self, **data: Any) -> Iterator[None]:
        """Activate mongod's failCommand for the duration of the block."""
        mode = data.pop("mode", "alwaysOn")
        self.client.admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": data})
        try:
            yield
        finally:
            self.client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})


def holder(chunk: Document) -> str:
    """Return the name of the process that holds a running chunk."""
    return str(chunk["worker_id"]).rpartition("-")[0]
