"""Queries about jobs; they are made and cancelled by commands on the bus."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from job_orchestrator.api.state import Handed, Paged, State
from job_orchestrator.domain import ledger
from job_orchestrator.domain.job import ScanJob
from scanfleet import rest
from scanfleet.auth import Caller, Guarded
from scanfleet.errors import BadRequestError, NotFoundError, Rule
from scanfleet.messages import JobStatus
from scanfleet.service import PathId

router = APIRouter(prefix="/api/v1/task", route_class=Guarded)

_LIST_QUERY = {"status", "status[]", "page", "page_size"}
_MAX_ERROR_CHARS = 200  # an error may quote the caller, but not at length
_LEDGER_PAGE = 1_000  # addresses named on one page: a few hundred kilobytes


@router.get("")
async def list_tasks(request: Request, caller: Caller, state: Handed, paged: Paged) -> rest.JobList:
    found, total = await state.store.list_jobs(caller.user_id, _statuses(request), paged.skip, paged.page_size)
    return rest.JobList(jobs=[job.view for job in found], total=total, page=paged.page, page_size=paged.page_size)


@router.get("/{job_id}")
async def read_task(job_id: PathId, caller: Caller, state: Handed) -> rest.TaskStatus:
    return task_status(await mine(state, caller.user_id, job_id))


@router.get("/{job_id}/ledger")
async def read_ledger(
    job_id: PathId,
    caller: Caller,
    state: Handed,
    page: Annotated[rest.Page, Query()] = 1,
    page_size: Annotated[int, Query(ge=1, le=_LEDGER_PAGE)] = 100,
) -> rest.Ledger:
    job = await mine(state, caller.user_id, job_id)
    tally, names = ledger.Tally(job), ledger.Names(job, (page - 1) * page_size, page_size)
    async for chunk in state.store.job_chunks(job.id):
        if chunk.index >= job.totals.done:
            tally.add(chunk)
        names.add(chunk)
    names.add_unmade()
    return rest.Ledger(
        job_id=job.id,
        status=job.status,
        accounted=tally.accounted,
        request=rest.LedgerRequest(
            addresses=job.addresses,
            ports=job.ports,
            probes=job.addresses * job.ports,
        ),
        counts=rest.LedgerCounts(**tally.counts),
        not_probed=rest.LedgerPage(
            addresses=[
                rest.LedgerEntry(address=each.address, ports=each.ports, outcome=each.outcome, reason=each.reason)
                for each in names.page
            ],
            total=names.total,
            page=page,
            page_size=page_size,
        ),
    )


async def mine(state: State, user_id: int, job_id: int, *, target: str = "") -> ScanJob:
    """The user's own job.

    Raises:
        NotFoundError: there is none, or it is another's; `target` is what was asked for, when the path does not say it.
    """
    job = (await state.store.jobs([job_id])).get(job_id)
    if job is None or job.user_id != user_id:
        raise NotFoundError("Job not found", rule=Rule.OWNER if job else None, target=target)
    return job


def task_status(job: ScanJob) -> rest.TaskStatus:
    """The job as its owner is shown it."""
    progress = rest.TaskProgress(
        status=job.status,
        progress=job.progress,
        machines_found=job.machines_found,
        error=job.error,
    )
    return rest.TaskStatus(job_id=str(job.id), status=progress, job=job.view)


def _statuses(request: Request) -> set[JobStatus]:
    """`status=running&status=pending`, `status[]=running` or `status=running,pending`."""
    if unknown := request.query_params.keys() - _LIST_QUERY:
        raise BadRequestError(f"unknown in a query: {', '.join(sorted(unknown))}"[:_MAX_ERROR_CHARS])
    given = request.query_params.getlist("status") + request.query_params.getlist("status[]")
    names = [name for text in given for name in text.split(",")]
    try:
        return {JobStatus(name) for name in names}
    except ValueError as error:
        raise BadRequestError(f"status must be of {', '.join(JobStatus)}") from error
