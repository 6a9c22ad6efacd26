"""Serve the list of deletions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter

from job_orchestrator.api.state import Recorded, StateDep
from job_orchestrator.api.tasks import readable_user
from job_orchestrator.domain.deletion import Deletion, Stage
from scanfleet.contracts import queries, rest
from scanfleet.runtime.http.requests import parsed
from scanfleet.security.auth import AuthenticatedRoute, Caller

router = APIRouter(prefix="/api/v1/deletion", route_class=AuthenticatedRoute)


@router.get("")
async def list_deletions(
    caller: Caller, state: StateDep, record: Recorded, query: Annotated[queries.Deletions, parsed(queries.Deletions)]
) -> rest.DeletionList:
    whose = await readable_user(caller, query.user_id, record, target="/api/v1/deletion", what="deletions")
    stages = [stage for stage in Stage if query.state is None or (stage is Stage.DONE) is (query.state == "done")]
    found, total = await state.store.deletions.page(whose, stages, query.skip, query.page_size)
    return rest.DeletionList(
        deletions=[_view(each) for each in found], total=total, page=query.page, page_size=query.page_size
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
