"""Jobs of the fake API, and the objects of their results."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from scanfleet.clock import rfc3339
from scanfleet.contracts import rest
from scanfleet.contracts.messages import Job, JobStatus

NOW = datetime(2026, 3, 14, 9, 0, tzinfo=UTC)


State = tuple[JobStatus, int]
"""Status and progress."""


class FakeJob:
    """A job that advances through `states`, one for each event of a stream."""

    def __init__(self, id_: int, subnet_id: int, policy_id: int, states: list[State]) -> None:
        self.id, self.subnet_id, self.policy_id = id_, subnet_id, policy_id
        self.states = states
        self.created_at = NOW
        self.seq = 1
        self.results: list[dict[str, Any]] = []
        self.hosts: list[dict[str, Any]] = []
        self.not_probed: list[rest.LedgerEntry] = []
        self.counts: dict[str, int] = {"answered": 256}
        self.machines = 0
        self.error = ""
        self.letters = ""
        self.page_size = 1_000
        """Page size of the ledger."""

    @property
    def status(self) -> JobStatus:
        return self.states[min(self.seq, len(self.states)) - 1][0]

    @property
    def job(self) -> Job:
        started = self.status is not JobStatus.PENDING
        return Job(
            id=self.id,
            user_id=7,
            policy_id=self.policy_id,
            subnet_id=self.subnet_id,
            status=self.status,
            start_time=NOW if started else None,
            end_time=NOW.replace(minute=1, second=7) if self.status.final else None,
            created_at=self.created_at,
            updated_at=NOW,
        )

    @property
    def task(self) -> rest.TaskStatus:
        progress = self.states[min(self.seq, len(self.states)) - 1][1]
        status = rest.TaskProgress(
            status=self.status, progress=progress, machines_found=self.machines, error=self.error
        )
        return rest.TaskStatus(job_id=str(self.id), status=status, job=self.job)

    def ledger(self, page: int = 1, after: int | None = None) -> rest.Ledger:
        first = (page - 1) * self.page_size if after is None else after
        end = first + self.page_size
        counts = dict.fromkeys(rest.LedgerCounts.model_fields, 0) | self.counts
        probes = sum(counts.values())
        return rest.Ledger(
            job_id=self.id,
            status=self.status,
            accounted=not any(counts[name] for name in ("refused", "cancelled", "lost", "waiting")),
            request=rest.LedgerRequest(addresses=probes, ports=1, probes=probes),
            counts=rest.LedgerCounts(**counts),
            not_probed=rest.LedgerPage(
                addresses=self.not_probed[first:end],
                total=len(self.not_probed),
                page=page,
                page_size=self.page_size,
                next=end if end < len(self.not_probed) else None,
            ),
            eta_seconds=None,
        )


def result(number: int, address: str, port: int, **fields: Any) -> dict[str, Any]:
    """Return an open port as an object of the API."""
    known = {
        "protocol": "tcp",
        "service": "ssh",
        "version": "OpenSSH 9.2p1",
        "os_info": "",
        "status": "open",
        "banner": "",
    }
    times = {"created_at": rfc3339(NOW), "updated_at": rfc3339(NOW)}
    return {"id": number, "job_id": 41, "ip_address": address, "port": port, **known, "raw_data": "", **times, **fields}


def host_found(address: str, *ports: int, **fields: Any) -> dict[str, Any]:
    """Return a host as the service lists it."""
    found = rest.Host(
        job_id=41,
        ip_address=address,
        outcome="answered",
        reason="syn-ack",
        hostnames=[],
        mac="",
        vendor="",
        os_info="",
        systems=[],
        ports=[rest.HostPort(port=port, protocol="tcp", status="open", service="", version="") for port in ports],
        open_filtered="",
        port_count=len(ports),
        closed=0,
        filtered=0,
        scripts=[],
        seconds=None,
        created_at=NOW,
        updated_at=NOW,
    )
    return found.model_dump(mode="json") | fields
