"""Serve the list of deletions."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from job_orchestrator.api.state import Handed, Paged, Recorded
from job_orchestrator.api.tasks import Whose, readable_user
from job_orchestrator.domain.deletion import Deletion, Stage
from scanfleet.contracts import rest
from scanfleet.security.auth import Caller, Guarded

router = APIRouter(prefix="/api/v1/deletion", route_class=Guarded)


@router.get("")
async def list_deletions(
    *,
    caller: Caller,
    state: Handed,
    paged: Paged,
    record: Recorded,
    state_: Annotated[Literal["open", "done"] | None, Query(alias="state")] = None,
    user_id: Whose = None,
) -> rest.DeletionList:
    whose = await readable_user(caller, user_id, record, target="/api/v1/deletion", what="deletions")
    stages = [stage for stage in Stage if state_ is None or (stage is Stage.DONE) is (state_ == "done")]
    found, total = await state.store.deletions.page(whose, stages, paged.skip, paged.page_size)
    return rest.DeletionList(
        deletions=[_view(each) for each in found], total=total, page=paged.page, page_size=paged.page_size
    )


def _view(deletion: Deletion) -> rest.Deletion:
    counts = deletion.counts
    return rest.Deletion(
        job_id=deletion.job_id,
        user_id=deletion.user_id,
        subnet_id=deletion.subnet_id,
        reason=deletion.reason,
        requested_by=deletion.requested_by,
        requested_at=deletion.requested_at,
        state=deletion.stage.value,
        completed_at=deletion.completed_at,
        deleted=rest.DeletedCounts(hosts=counts.hosts, rows=counts.rows, chunks=counts.chunks),
    )
