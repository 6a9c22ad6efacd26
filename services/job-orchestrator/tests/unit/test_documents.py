"""Documents that any release has written are read by this one."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import pytest
from bson import json_util
from pydantic import ValidationError

from job_orchestrator.domain.chunk import ChunkState
from job_orchestrator.domain.command import Command
from job_orchestrator.domain.coverage import MapPart
from job_orchestrator.domain.deletion import Counts
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.ledger import UnprobedPage
from job_orchestrator.repository import documents
from job_orchestrator_testing import chunk, scan_job
from job_orchestrator_testing.builders import THEN
from job_orchestrator_testing.golden import golden
from scanfleet.contracts import rest
from scanfleet.contracts.messages import JobCreated, JobStatus
from scanfleet.scanning.ports import PortSet
from scanfleet_testing.contracts import with_unknown_fields
from scanfleet_testing.event_loop import counting_turns

FOLDER: Final = Path(__file__).parents[1] / "documents"
READERS: Final[dict[str, Callable[[Any], Any]]] = {
    "audit": documents.read_audit,
    "chunk": documents.read_chunk,
    "clock": documents.read_account,
    "command": lambda document: asyncio.run(documents.read_command(document)),
    "deletion": documents.read_deletion,
    "job": documents.read_job,
    "policy": documents.read_policy,
    "revocation": documents.read_revocation,
    "subnet": documents.read_subnet,
    "worker": documents.read_worker,
}
ID_FIELDS: Final = {"clock": "user_id", "deletion": "job_id", "worker": "worker_id"}  # of other kinds: id
TOTALS: Final = ("probes", "addresses", "places")  # by outcome

every_document = pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=f"{path.parent.name} {path.stem}") for path in sorted(FOLDER.glob("*/*.json"))],
)


def stored(path: Path) -> Any:
    return json_util.loads(path.read_text(encoding="utf-8"), json_options=json_util.JSONOptions(tz_aware=True))


def kind(path: Path) -> str:
    return path.stem.partition("-")[0]


def test_every_resource_has_an_example_document() -> None:
    """Each resource has an example document, so that a release freezes the documents of all resources."""
    assert {resource.name for resource in rest.RESOURCES} <= golden().keys()


@pytest.mark.proves("F28")
@every_document
def test_documents_of_earlier_releases_are_read(path: Path) -> None:
    """A document is read, whichever release stored it, and unknown fields are ignored."""
    read = READERS[kind(path)]
    known = read(stored(path))
    assert getattr(known, ID_FIELDS.get(kind(path), "id")) == stored(path)["_id"]
    for changed in with_unknown_fields(stored(path), mappings=TOTALS):
        assert read(changed) == known


def test_view_of_a_stored_job_is_the_view_of_the_job() -> None:
    """A list shows the same of a job, whichever release stored it, as the job itself."""
    found = [stored(path) for path in sorted(FOLDER.glob("*/job-*.json"))]
    assert [documents.read_view(each) for each in found] == [documents.read_job(each).view for each in found] != []


def test_map_part_of_a_stored_chunk_is_the_part_of_the_chunk() -> None:
    """A map shows the same of a chunk, whichever release stored it, as the chunk itself."""
    found = [stored(path) for path in sorted(FOLDER.glob("*/chunk*.json"))]
    assert found
    for each in found:
        chunk = documents.read_chunk(each)
        part = documents.read_map_part({name: each[name] for name in documents.MAP_FIELDS if name in each})
        assert part == MapPart(chunk.index, chunk.first_address, chunk.state, chunk.outcomes, chunk.reach)


def job(name: str) -> ScanJob:
    return documents.read_job(stored(FOLDER / "0.1.0" / f"{name}.json"))


def test_jobs_of_the_first_release_keep_their_meaning() -> None:
    """State, policy and waiting events of a job are those that were stored, and new fields have their defaults."""
    pending, failed = job("job-pending"), job("job-failed")
    assert (pending.status, pending.policy.scripts, pending.policy.min_rate) == (
        JobStatus.PENDING,
        ("default", "banner", "http-title"),
        None,
    )
    (waiting,) = pending.outbox
    assert isinstance(waiting.event, JobCreated)
    assert waiting.event.traceparent == pending.traceparent
    assert (failed.status, failed.settled, failed.error) == (
        JobStatus.FAILED,
        True,
        "64 addresses were not scanned: nmap ended with exit code 1",
    )


def test_chunks_of_the_first_release_keep_their_meaning() -> None:
    """A chunk's state, token and map are those that were stored."""
    chunk = documents.read_chunk(stored(FOLDER / "0.1.0" / "chunk-running.json"))
    assert (chunk.state, chunk.attempt, chunk.worker_id, chunk.outcomes) == (
        ChunkState.RUNNING,
        2,
        "scanner-worker-1-3f9ac2",
        "aads....",
    )


@pytest.mark.parametrize(
    "damage", [{"requested_at": "yesterday"}, {"_id": "x"}, {"stage": "foo"}, {"counts": {"rows": -1}}]
)
def test_damaged_receipt_is_not_read(damage: dict[str, Any]) -> None:
    """Every field is validated, so that the loop that reads receipts omits a damaged one."""
    document = stored(FOLDER / "current" / "deletion.json")
    damaged = document | {"deletion": document["deletion"] | damage} | damage
    with pytest.raises(ValidationError):
        documents.read_deletion(damaged)


@pytest.mark.parametrize(
    "damage",
    [
        {"cidr": None},
        {"exclude": [7]},
        {"exclude": "127.0.0.1/32"},
        {"name": 7},
        {"user_id": "x"},
        {"created_at": "2026-11-28T04:00:00"},
    ],
)
def test_damaged_subnet_is_not_read(damage: dict[str, Any]) -> None:
    """Every field is validated, so that a list of its owner omits a damaged subnet instead of failing."""
    with pytest.raises(ValidationError):
        documents.read_subnet(stored(FOLDER / "current" / "subnet.json") | damage)


@pytest.mark.parametrize("name", ["chunk", "job"])
@pytest.mark.parametrize("rev", [None, "3", {}, "missing"])
def test_document_without_a_revision_is_not_read(name: str, rev: Any) -> None:
    """No save would match such a chunk or job, and its repetition would block others."""
    document = {"chunk": documents.write_chunk(chunk()), "job": documents.write_job(scan_job())}[name] | {"rev": rev}
    if rev == "missing":
        del document["rev"]
    with pytest.raises((ValidationError, KeyError)):
        READERS[name](document)


def test_updates_have_the_fields_that_can_change_only() -> None:
    """A save converts no field that never changes, and stores the next revision."""
    of_chunk, of_job = documents.update_chunk(chunk(rev=2))["$set"], documents.update_job(scan_job(rev=3))["$set"]
    assert (of_chunk["rev"], of_job["rev"]) == (3, 4)
    assert not {"_id", "job_id", "key", "first_address", "ports", "turn", "needs_raw"} & of_chunk.keys()
    assert not {"_id", "user_id", "policy", "cidr", "plan", "chunk_count", "estimate", "totals"} & of_job.keys()


@pytest.mark.parametrize(
    ("name", "field"), [("chunk", "dispatched_at"), ("chunk", "not_before"), ("chunk", "ask_at"), ("job", "created_at")]
)
def test_time_without_a_zone_is_not_read(name: str, field: str) -> None:
    """It could not be compared with the time now, so its repetition would end a loop."""
    document = {"chunk": documents.write_chunk(chunk()), "job": documents.write_job(scan_job())}[name]
    with pytest.raises(ValidationError):
        READERS[name](document | {field: "2026-11-29T14:00:00"})


def test_read_chunks_keep_few_port_sets_in_memory() -> None:
    """Only the cache of `PortSet` keeps ports, since a set of a long list takes a quarter of a megabyte."""

    def kept() -> int:
        return sum(isinstance(each, PortSet) for each in gc.get_objects())

    before = kept()
    for number in range(1_000):
        documents.read_chunk(documents.write_chunk(chunk(ports=f"{2 * number},60000")))
    assert kept() - before < 500


def test_receipt_with_some_counts_is_read() -> None:
    """A count that is missing is unknown."""
    document = stored(FOLDER / "current" / "deletion.json")
    del document["deletion"]["counts"]["rows"]
    assert documents.read_deletion(document).counts == Counts(hosts=2, chunks=1)


def test_totals_without_unprobed_addresses_are_read_as_not_counted() -> None:
    """If another release has counted chunks with such addresses, the ledger must look into them; of a new job there are none."""
    document = documents.write_job(scan_job())
    del document["totals"]["unprobed"]
    assert documents.read_job(document).totals.unprobed == ()
    document["totals"]["done"] = 1
    for probes, ranges in (({"answered": 2}, []), ({"lost": 1}, [(0, 1)])):
        document["totals"]["probes"] = probes
        old = documents.read_job(document)
        assert old.totals.unprobed is None
        assert list(UnprobedPage(old, 10).ranges()) == ranges


def test_job_with_scripts_no_longer_allowed_is_read() -> None:
    """A release that allows fewer scripts still reads and lists the jobs that were created with them."""
    document = stored(FOLDER / "0.1.0" / "job-failed.json")
    document["policy"]["scripts"] = ["default", "http-robots"]
    assert documents.read_job(document).policy.scripts == ("default", "http-robots")


async def test_command_with_many_jobs_is_read_while_other_tasks_run() -> None:
    """Reading a command for a thousand jobs runs other tasks in between, and its jobs share one policy."""
    jobs = tuple(scan_job(id_) for id_ in range(1, 1_001))
    document = documents.write_command(Command(id="c-1", user_id=7, state="accepted", jobs=jobs), THEN)
    async with counting_turns() as turns:
        command = await documents.read_command(document)
    assert turns.count >= 9
    assert command.jobs == jobs
    assert len({id(job.policy) for job in command.jobs}) == 1


async def test_many_documents_are_read_while_other_tasks_run() -> None:
    """Reading a thousand jobs that the database returned at once runs other tasks in between."""

    async def found() -> AsyncIterator[dict[str, Any]]:
        for id_ in range(1, 1_001):
            yield documents.write_job(scan_job(id_))

    async with counting_turns() as turns:
        jobs = await documents.read_all(documents.read_job, found(), "jobs")
    assert len(jobs) == 1_000
    assert turns.count >= 9
