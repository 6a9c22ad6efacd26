"""What the gateway asks on a caller's behalf; not part of the public API."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path

from job_orchestrator.api.state import Handed, Recorded
from job_orchestrator.api.tasks import mine, task_status
from scanfleet import rest
from scanfleet.auth import Caller, Guarded
from scanfleet.errors import ForbiddenError, NotFoundError, Rule
from scanfleet.messages import CommandAccepted
from scanfleet.service import PathId

router = APIRouter(prefix="/internal", route_class=Guarded)


@router.get("/jobs/{job_id}/owner", name="read_results")
async def owner(job_id: PathId, caller: Caller, state: Handed, record: Recorded) -> dict[str, int]:
    """Whose job it is, for those who may read its results."""
    job = (await state.store.jobs([job_id])).get(job_id)
    if job is None:
        raise NotFoundError("Job not found")
    if job.user_id != caller.user_id:
        results = f"/api/v1/task/{job_id}/results"
        if not caller.admin:
            raise ForbiddenError("Job belongs to another user", target=results)
        await record(target=results, rule=Rule.ROLE)
    return {"user_id": job.user_id}


@router.get("/jobs/{job_id}/latest", name="watch_task")
async def latest(job_id: PathId, caller: Caller, state: Handed) -> rest.Snapshot:
    """The job as it is now, for its owner, and the `seq` that its events go on from."""
    job = await mine(state, caller.user_id, job_id, target=f"/api/v1/task/{job_id}/events")
    return rest.Snapshot(seq=job.seq, task=task_status(job))


@router.post("/commands/{command_id}/expire")
async def expire(
    command_id: Annotated[str, Path(pattern=r"^[A-Za-z0-9._-]{1,64}$")],
    caller: Caller,
    state: Handed,
) -> dict[str, Any]:
    """After this answer the command is decided: expired, or as told here."""
    reply = await state.commands.expire(command_id, caller.user_id)
    if reply is None:
        return {"state": "expired"}
    if isinstance(reply, CommandAccepted):
        return {"state": "accepted", "jobs": [job.model_dump(mode="json") for job in reply.jobs]}
    return {"state": "rejected", "status": reply.status, "error": reply.error}
