"""Queries about jobs; they are made and cancelled by commands on the bus."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Query, Request

from job_orchestrator.api.state import Handed, Paged, State
from job_orchestrator.domain import ledger
from job_orchestrator.domain.job import ScanJob
from scanfleet import rest
from scanfleet.auth import Caller
from scanfleet.errors import BadRequestError, NotFoundError
from scanfleet.messages import JobStatus
from scanfleet.service import PathId

router = APIRouter(prefix="/api/v1/task")

_LEDGER_PAGE = 1_000  # addresses named on one page: a few hundred kilobytes


@router.get("")
async def list_(request: Request, caller: Caller, state: Handed, paged: Paged) -> rest.JobList:
    found, total = await state.store.list_jobs(caller.user_id, _statuses(request), paged.skip, paged.page_size)
    return rest.JobList(jobs=[job.view for job in found], total=total, page=paged.page, page_size=paged.page_size)


@router.get("/{job_id}")
async def read(job_id: PathId, caller: Caller, state: Handed) -> rest.TaskStatus:
    job = await _mine(state, caller.user_id, job_id)
    progress = rest.TaskProgress(
        status=job.status,
        progress=job.progress,
        machines_found=job.machines_found,
        error=job.error,
    )
    return rest.TaskStatus(job_id=str(job.id), status=progress, job=job.view)


@router.get("/{job_id}/ledger")
async def read_ledger(
    job_id: PathId,
    caller: Caller,
    state: Handed,
    page: Annotated[rest.Page, Query()] = 1,
    page_size: Annotated[int, Query(ge=1, le=_LEDGER_PAGE)] = 100,
) -> rest.Ledger:
    job = await _mine(state, caller.user_id, job_id)
    chunks = await state.store.job_chunks(job.id)
    counts = ledger.counts(job, ledger.tally(job.status, chunks))
    skip = (page - 1) * page_size
    named = islice(ledger.not_probed(job, chunks), skip, skip + page_size)
    entries = [
        rest.LedgerEntry(address=each.address, ports=each.ports, outcome=each.outcome, reason=each.reason)
        for each in named
    ]
    probes = job.addresses * job.ports
    return rest.Ledger(
        job_id=job.id,
        status=job.status,
        accounted=sum(counts[name] for name in ledger.ACCOUNTED) == probes,
        request=rest.LedgerRequest(addresses=job.addresses, ports=job.ports, probes=probes),
        counts=rest.LedgerCounts(**counts),
        not_probed=rest.LedgerPage(
            addresses=entries,
            total=sum(1 for _ in ledger.not_probed(job, chunks)),
            page=page,
            page_size=page_size,
        ),
    )


async def _mine(state: State, user_id: int, job_id: int) -> ScanJob:
    job = (await state.store.jobs([job_id])).get(job_id)
    if job is None or job.user_id != user_id:
        raise NotFoundError("Job not found")
    return job


def _statuses(request: Request) -> set[JobStatus]:
    """`status=running&status=pending`, `status[]=running` or `status=running,pending`."""
    given = request.query_params.getlist("status") + request.query_params.getlist("status[]")
    names = [name for text in given for name in text.split(",")]
    try:
        return {JobStatus(name) for name in names}
    except ValueError as error:
        raise BadRequestError(f"status must be of {', '.join(JobStatus)}") from error
