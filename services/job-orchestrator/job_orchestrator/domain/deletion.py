"""The deletion of a finished job. ADR 0064."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final, get_args

from pydantic import AwareDatetime, NonNegativeInt

from job_orchestrator.domain.chain import ChainKeys
from scanfleet.contracts.messages import DeleteResults, JobDeleted
from scanfleet.contracts.messages.deletions import DeletionReason
from scanfleet.contracts.messages.fields import Id

REASONS: Final[tuple[DeletionReason, ...]] = get_args(DeletionReason)

LEAST_RECEIPT_DAYS: Final = 30  # longer than a command can be repeated or a record replayed: 7 and 14 days
# No signature of an audit entry is valid for a request, and none of a request for an entry.
_KIND: Final = "DeleteResults"
KEEP_RECEIPTS: Final = timedelta(days=1_095)


class Stage(StrEnum):
    """The remaining work of a deletion; each stage is safe to repeat."""

    WAITING = "waiting"
    """The last chunks of the job, which was cancelled a moment before, are being stopped."""
    RESULTS = "results"
    CHUNKS = "chunks"
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Numbers of deleted documents of a job; None while unknown."""

    hosts: NonNegativeInt | None = None
    rows: NonNegativeInt | None = None
    chunks: NonNegativeInt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """The receipt of a deleted job.

    It replaces the job's document under the same id: no query for jobs finds it, and a late insert of the job fails.
    """

    job_id: Id
    user_id: Id
    subnet_id: Id
    reason: DeletionReason
    requested_at: AwareDatetime
    requested_by: NonNegativeInt | None = None
    """The user who requested it; None for retention, and in receipts of older releases."""
    stage: Stage = Stage.RESULTS
    counts: Counts = Counts()
    completed_at: AwareDatetime | None = None


def request(deletion: Deletion, keys: ChainKeys) -> DeleteResults:
    """Return the request to result-store, signed: result-store may write to the topic too."""
    unsigned = DeleteResults(
        job_id=deletion.job_id,
        reason=deletion.reason,
        requested_by=deletion.requested_by,
        requested_at=deletion.requested_at,
    )
    return unsigned.model_copy(update={"signature": keys.sign(_KIND, _content(unsigned))})


def announcement(deletion: Deletion) -> JobDeleted:
    """Return the event for subscribers, the same each time that the deletion is completed."""
    return JobDeleted(
        job_id=deletion.job_id,
        user_id=deletion.user_id,
        subnet_id=deletion.subnet_id,
        reason=deletion.reason,
        requested_at=deletion.requested_at,
    )


def is_own(message: DeleteResults, keys: ChainKeys) -> bool:
    """Return whether the orchestrator has signed the request."""
    return keys.verify(_KIND, _content(message), message.signature)


def _content(message: DeleteResults) -> dict[str, object]:
    return message.model_dump(include={"job_id", "reason", "requested_by", "requested_at"})
