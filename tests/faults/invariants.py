"""Invariants of the platform: one checker, the same after every fault.

It sees what users see, the public API and the topics from their beginning, and the documents in MongoDB.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any, Final

from job_orchestrator.domain.job import TABLE
from local.wait import until
from scanfleet.contracts.messages import HostScanned, JobEvent, JobProgressed, JobStatus
from scanfleet.contracts.messages.topics import SCAN_EVENTS, SCAN_RESULTS
from scanfleet.scanning.outcomes import Outcome, index_of
from scanfleet.security.auth import read_public_keys
from scanfleet.security.chunk_grants import Grants
from tests.client import FINAL
from tests.faults.documents import Document
from tests.faults.kit import Platform

PATIENCE_SECONDS: Final = 180.0  # for every job to end, on a loaded machine
PROBED: Final = ("answered", "silent", "down", "timed_out", "excluded")


class Invariants:
    """Checks a platform repeatedly, and remembers final states."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._final: dict[int, Document] = {}
        self._results: dict[int, list[Any]] = {}

    def check(self) -> None:
        """Wait until all jobs have ended, and check every guarantee.

        Raises:
            AssertionError: a guarantee is violated.
            TimeoutError: a job does not end.
        """
        platform = self._platform
        platform.stack.wait_until_ready()
        until(lambda: not platform.documents.jobs(settled=False), PATIENCE_SECONDS, "every job to end", 0.2)
        until(
            lambda: not platform.documents.jobs(outbox={"$exists": True}),
            PATIENCE_SECONDS,
            "every event to be published",
            0.2,
        )
        until(lambda: not platform.nmaps(), PATIENCE_SECONDS, "every nmap to end")
        platform.topics.until_read()
        until(
            lambda: not platform.documents.deletions(due={"$exists": True}),
            PATIENCE_SECONDS,
            "every deletion to be complete",
            0.2,
        )
        jobs = {job["_id"]: job for job in platform.documents.jobs()}
        deleted = {each["_id"] for each in platform.documents.deletions()}
        self._accepted_are_there(jobs, deleted)
        self._final_stays(jobs, deleted)
        self._events(jobs)
        first = self._first_hosts()
        for id_, job in jobs.items():
            if id_ not in self._final:
                self._one(job, first.get(id_, {}))
        self._final = jobs

    def _accepted_are_there(self, jobs: dict[int, Document], deleted: set[int]) -> None:
        """Check that every accepted job exists or was deleted, and that no two jobs belong to one subnet of a command."""
        assert self._platform.acknowledged <= jobs.keys() | deleted
        accepted = [
            job["_id"] for command in self._platform.documents.commands(state="accepted") for job in command["jobs"]
        ]
        assert sorted(accepted) == sorted([*jobs, *deleted])
        assert {job["status"] for job in jobs.values()} <= FINAL

    def _final_stays(self, jobs: dict[int, Document], deleted: set[int]) -> None:
        """Check that final states and results have not changed, and that nothing of a deleted job is stored."""
        for id_, before in self._final.items():
            assert id_ in deleted or jobs[id_] == before
        for id_, results in self._results.items():
            assert self._stored(id_) == ([] if id_ in deleted else results)
        for id_ in deleted:
            assert not [
                *self._platform.documents.hosts(job_id=id_),
                *self._platform.documents.closed(job_id=id_),
                *self._platform.documents.chunks(id_),
            ]

    def _stored(self, job_id: int) -> list[Any]:
        """Return every result in the database; hosts received after their chunk was closed are not results."""
        platform = self._platform
        closed = {chunk["_id"]: chunk for chunk in platform.documents.closed(job_id=job_id)}
        shown = []
        for host in sorted(platform.documents.hosts(job_id=job_id), key=lambda host: str(host["_id"])):
            chunk = closed.get(host["chunk_id"])
            counts = (
                chunk is None or chunk["outcomes"][index_of(chunk["first_address"], host["address"])] != Outcome.DOWN
            )
            if counts and "first_id" in host:
                shown.append((host["address"], host["first_id"], host["ports"]))
        return shown

    def _events(self, jobs: dict[int, Document]) -> None:
        """Check that life-cycle events first appear in `seq` order, without gaps, along the published graph; duplicates equal."""
        seen: dict[int, dict[int, tuple[str, JobEvent]]] = defaultdict(dict)
        for published in self._platform.topics.messages(SCAN_EVENTS, JobEvent):
            event = published.message
            assert isinstance(event, JobEvent)
            known = seen[event.job.id].setdefault(event.seq, (published.headers["ce_id"], event))
            assert known == (published.headers["ce_id"], event.model_copy(update={"traceparent": known[1].traceparent}))
        for id_, job in jobs.items():
            events = [event for _, event in seen[id_].values()]  # in the order of their first appearance
            lives = [event for event in events if not isinstance(event, JobProgressed)]
            assert [event.seq for event in lives] == sorted(event.seq for event in lives), id_
            if id_ in self._platform.forgotten:
                continue
            assert type(lives[0]).__name__ == "JobCreated", id_
            assert (lives[0].seq, lives[0].job.status) == (1, JobStatus.PENDING), id_
            states = [event.job.status for event in lives]
            assert all(after in TABLE[before].values() for before, after in pairwise(states)), id_
            assert states[-1] == job["status"], id_
            assert lives[-1].seq == job["seq"], id_
            progressed = [event for event in events if isinstance(event, JobProgressed)]
            assert all(lives[0].seq < event.seq < job["seq"] for event in progressed), id_
            assert len({event.seq for event in events}) == len(events) <= job["seq"], id_
            assert {event.user_id for event in events} == {job["user_id"]}, id_

    def _first_hosts(self) -> dict[int, dict[tuple[str, str], HostScanned]]:
        """Return, by job, the first message in the log about each address of each chunk with a valid signature."""
        grants = Grants(read_public_keys(self._platform.stack.folder / "chunk" / "public.pem"))
        found: dict[int, dict[tuple[str, str], HostScanned]] = defaultdict(dict)
        for published in self._platform.topics.messages(SCAN_RESULTS, HostScanned):
            host = published.message
            assert isinstance(host, HostScanned)
            if not grants.fault(host):
                found[host.job_id].setdefault((host.chunk_id, host.address), host)
        return found

    def _one(self, job: Document, first: dict[tuple[str, str], HostScanned]) -> None:
        """Check that the API agrees with the documents, the ledger adds up, and no result is duplicated."""
        platform, id_ = self._platform, job["_id"]
        user = platform.caller(job["user_id"])
        try:
            task, ledger, results = user.task(id_), user.ledger(id_), user.results(id_)
        finally:
            user.close()
        assert task["status"]["status"] == task["job"]["status"] == job["status"], id_
        assert task["job"]["end_time"] is not None, id_
        counts = ledger["counts"]
        assert sum(counts.values()) == ledger["request"]["probes"], id_
        probed = sum(counts[name] for name in PROBED)
        assert ledger["accounted"] == (probed == ledger["request"]["probes"]), id_
        assert (task["status"]["progress"] == 100) == (job["status"] == "completed"), id_
        assert (task["status"]["error"] != "") == (job["status"] == "failed"), id_
        if job["status"] == "completed":
            assert ledger["accounted"], id_
            assert counts["lost"] == counts["cancelled"] == counts["refused"] == 0, id_
        places = Counter((each["ip_address"], each["protocol"], each["port"]) for each in results)
        assert set(places.values()) <= {1}, id_
        assert len({each["id"] for each in results}) == len(results), id_
        self._results[id_] = stored = self._stored(id_)
        assert len(results) == sum(len(ports) for _, _, ports in stored), id_
        chunks = platform.documents.chunks(id_)
        assert {chunk["state"] for chunk in chunks} <= {"stored", "failed", "cancelled"}, id_
        answered = {
            (chunk["first_address"], index)
            for chunk in chunks
            for index, letter in enumerate(chunk["outcomes"])
            if letter == Outcome.ANSWERED
        }
        if job["status"] == "completed":
            assert task["status"]["machines_found"] == len(answered), id_
            reported = {(host.address, port.protocol, port.port) for host in first.values() for port in host.ports}
            if id_ not in platform.forgotten:
                assert set(places) == reported, id_
