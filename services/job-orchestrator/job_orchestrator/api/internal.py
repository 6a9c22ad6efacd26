"""Serve the gateway's queries on a caller's behalf; not part of the public API."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

from fastapi import APIRouter, Path

from job_orchestrator.api.state import Recorded, Recorder, State, StateDep
from job_orchestrator.api.tasks import audit_target, readable, readable_user, task_status
from job_orchestrator.domain.job import UNFINISHED, ScanJob
from scanfleet.contracts import queries, rest
from scanfleet.contracts.messages import CommandAccepted, CommandRejected
from scanfleet.contracts.messages.commands import CommandId
from scanfleet.contracts.messages.fields import MAX_ID
from scanfleet.errors import ConflictError, ForbiddenError, NotFoundError
from scanfleet.runtime.http.requests import PathId, parsed
from scanfleet.security.auth import AuthenticatedRoute, Caller, Principal

router = APIRouter(prefix="/internal", route_class=AuthenticatedRoute)

_LATEST_PAGE: Final = 200  # states of jobs: 0.1 MB of the database
_ENDED_WITHIN: Final = timedelta(days=1)  # clients that were disconnected for longer read the list
_CANCEL_PAGE: Final = 1_000  # jobs cancelled per request: a second of work, and of waiting for a silent broker


@router.get("/jobs/{job_id}/owner", name="read_results")
async def owner(job_id: PathId, caller: Caller, state: StateDep, record: Recorded) -> dict[str, int]:
    """Return the owner of the job, for callers who may read its results."""
    job = await _with_results(job_id, "results", caller, state, record)
    return {"user_id": job.user_id}


@router.get("/jobs/{job_id}/owner/hosts", name="read_hosts")
async def owner_of_hosts(job_id: PathId, caller: Caller, state: StateDep, record: Recorded) -> dict[str, int]:
    """Return the owner of the job, for callers who may read its hosts."""
    job = await _with_results(job_id, "hosts", caller, state, record)
    return {"user_id": job.user_id}


@router.get("/jobs/{job_id}/export", name="read_nmap_xml")
async def exported(job_id: PathId, caller: Caller, state: StateDep, record: Recorded) -> rest.ExportedJob:
    """Return the facts of a finished job for the document of its results, for callers who may read them."""
    job = await _with_results(job_id, "nmap.xml", caller, state, record)
    if not job.final or job.end_time is None:
        raise ConflictError(f"Job is {job.status}; its results are exported once it has ended")
    return rest.ExportedJob(
        job_id=job.id,
        status=job.status,
        error=job.error,
        cidr=job.cidr,
        ports=job.policy.ports,
        start=job.start_time or job.created_at,
        end=job.end_time,
    )


async def _with_results(job_id: int, what: str, caller: Principal, state: State, record: Recorder) -> ScanJob:
    """Return the job to a caller who may read its results; `what` is the requested part or form of them.

    Raises:
        NotFoundError: the job does not exist.
        ForbiddenError: it belongs to another user, and the caller is no administrator.
    """
    job = (await state.store.jobs.get([job_id])).get(job_id)
    if job is None:
        raise NotFoundError("Job not found")
    if job.user_id != caller.user_id:
        target = f"/api/v1/task/{job_id}/{what}"
        if not caller.admin:
            raise ForbiddenError("Job belongs to another user", target=target)
        await record.reading(audit_target(target, job))
    return job


@router.get("/jobs/{job_id}/latest", name="watch_task")
async def latest(job_id: PathId, caller: Caller, state: StateDep, record: Recorded) -> rest.Snapshot:
    """Return the current job and the `seq` from which its events continue."""
    job = await readable(state, caller, job_id, record, target=f"/api/v1/task/{job_id}/events", streamed=True)
    return rest.Snapshot(seq=job.seq, task=task_status(job))


@router.get("/jobs/latest", name="watch_tasks")
async def latest_of(
    *,
    caller: Caller,
    state: StateDep,
    record: Recorded,
    query: Annotated[queries.LatestJobs, parsed(queries.LatestJobs)],
) -> rest.Snapshots:
    """Return a page of a user's jobs in their current state: first unfinished ones, then those that ended since a time.

    A job that ends between two pages is in one of them, or in both.
    """
    whose = await readable_user(caller, query.user_id, record, target="/api/v1/events", streamed=True)
    time = await state.store.time()
    ids: list[int] = []
    ended: list[tuple[datetime, int]] = []
    if query.ended_after is None:
        ids = await state.store.jobs.latest(whose, query.after, _LATEST_PAGE, changed_since=query.changed_since)
    room = _LATEST_PAGE - len(ids)
    if room and query.ended_since is not None:
        place = None if query.ended_after is None else _place(query.ended_after)
        ended = await state.store.jobs.ended(whose, max(query.ended_since, time - _ENDED_WITHIN), room, place)
    return rest.Snapshots(
        snapshots=await state.store.jobs.snapshots([*ids, *(job_id for _, job_id in ended)]),
        next=None if room else ids[-1],
        next_ended=f"{ended[-1][0].timestamp() * 1_000:.0f}-{ended[-1][1]}" if room and len(ended) == room else None,
        time=time,
    )


def _place(ended_after: str) -> tuple[datetime, int]:
    """Return end time and id of the last job of a page, as `next_ended` has them."""
    milliseconds, _, job_id = ended_after.partition("-")
    return datetime.fromtimestamp(int(milliseconds) / 1_000, UTC), min(int(job_id), MAX_ID)


@router.post("/jobs/cancel", name="cancel_tasks")
async def cancel_page(body: rest.CancelJobs, caller: Caller, state: StateDep, record: Recorded) -> rest.CancelledPage:
    """Cancel a page of the caller's matching unfinished jobs; the caller repeats the request while there are more."""
    job_ids = await state.store.jobs.unfinished(
        caller.user_id,
        _CANCEL_PAGE,
        statuses=body.status or UNFINISHED,
        subnet_id=body.subnet_id,
        policy_id=body.policy_id,
    )
    await record.each(f"/api/v1/task/{job_id}" for job_id in job_ids)
    return rest.CancelledPage(
        job_ids=await state.cancels.cancel(job_ids),
        more=len(job_ids) == _CANCEL_PAGE,
    )


@router.post("/commands/{command_id}/expire")
async def expire(
    command_id: Annotated[CommandId, Path()],
    caller: Caller,
    state: StateDep,
) -> rest.Verdict:
    """Decide the command: it is expired, or its outcome is returned."""
    match await state.commands.expire(command_id, caller.user_id):
        case None:
            return rest.Verdict(rest.Expired())
        case CommandAccepted(jobs=jobs):
            return rest.Verdict(rest.Accepted(jobs=jobs))
        case CommandRejected(status=status, error=error):
            return rest.Verdict(rest.Rejected(status=status, error=error))


@router.post("/session/create", name="create_session", status_code=204)
@router.post("/session/refresh", name="refresh_session", status_code=204)
@router.post("/session/end", name="end_session", status_code=204)
async def record_session(_caller: Caller, record: Recorded) -> None:
    """Record a change of the caller's browser session in the audit log, before the gateway makes it."""
    await record(target="/api/v1/session")
