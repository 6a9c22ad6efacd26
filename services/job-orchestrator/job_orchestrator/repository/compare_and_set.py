"""Store documents by compare-and-set on their `rev`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

from pymongo import UpdateOne

from job_orchestrator.domain.chunk import Chunk
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.repository.documents import read_all
from scanfleet.runtime.mongo import Collection, Document, dependency_errors

_Revised = TypeVar("_Revised", ScanJob, Chunk)

NO_RECEIPT: Final = {"deletion": {"$exists": False}}  # filter of jobs that are not deleted
RECEIPT: Final = {"deletion.stage": {"$exists": True}}  # the partial indexes of receipts have the same filter


@dependency_errors()
async def save(
    collection: Collection,
    changed: Sequence[_Revised],
    update: Callable[[_Revised], Document],
    read: Callable[[Document], _Revised],
) -> set[Any]:
    if not changed:
        return set()
    result = await collection.bulk_write(
        [UpdateOne({"_id": each.id, "rev": each.rev}, update(each)) for each in changed],
        ordered=False,
    )
    if result.matched_count == len(changed):
        return set()
    new = [replace(each, rev=each.rev + 1) for each in changed]
    # The response does not list the losers. A retried write can find its own first attempt, which is a success.
    found = collection.find({"_id": {"$in": [each.id for each in new]}} | NO_RECEIPT)
    stored = {each.id: each for each in await read_all(read, found, collection.name)}
    return {each.id for each in new if stored.get(each.id) != each}
