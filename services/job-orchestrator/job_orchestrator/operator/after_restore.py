"""`python -m job_orchestrator.operator.after_restore`: run once before the start on a database restored from a backup.

Events that were published since the backup remain in the topics, and consumers have processed them. Therefore new ids and
sequence numbers start above all earlier ones, and jobs whose cancellation or deletion is in the log are cancelled.
docs/operations.md has all steps of a restore.
"""

from __future__ import annotations

import sys
from datetime import datetime, timedelta
from typing import Final

from job_orchestrator.domain.chain import ChainKeys, read_chain_keys
from job_orchestrator.domain.deletion import is_own
from job_orchestrator.domain.job import JobTrigger, change, restored_from_backup
from job_orchestrator.repository import MongoStore, platform_time
from job_orchestrator.settings import Settings
from scanfleet.contracts.messages import DeleteResults, JobCancelled, Message
from scanfleet.contracts.messages.audit import RESTORE
from scanfleet.contracts.messages.envelope import RawRecord, decode
from scanfleet.contracts.messages.topics import (
    SCAN_AUDIT,
    SCAN_AUDIT_OPERATOR,
    SCAN_COMMANDS,
    SCAN_DELETIONS,
    SCAN_EVENTS,
    SCAN_PROGRESS,
    SCAN_STORED,
    SCAN_WORKERS,
    Topic,
)
from scanfleet.errors import DependencyError, MessageError
from scanfleet.kafka import KafkaBus
from scanfleet.kafka.groups import move_group
from scanfleet.runtime import mongo, operator_command
from scanfleet.runtime.operator_command import command_entry
from scanfleet.services import ORCHESTRATOR

_PAGE: Final = 100  # jobs per query


async def prepare_restored(settings: Settings) -> str:
    """Prepare a restored database for use and return a summary. Idempotent.

    Raises:
        DependencyError: Kafka or MongoDB is unavailable, or an orchestrator still runs; call again.
    """
    # Records before the restore refer to documents that may no longer exist: skip them.
    for topic in (SCAN_COMMANDS, SCAN_WORKERS, SCAN_PROGRESS, SCAN_STORED):
        await move_group(settings, f"{ORCHESTRATOR}-{topic.name}", topic, "end")
    # Jobs that were deleted since the backup exist again: delete them again. Jobs that had not ended before it are cancelled
    # first: result-store would erase the results of a new run.
    await move_group(settings, f"{ORCHESTRATOR}-{SCAN_DELETIONS.name}", SCAN_DELETIONS, "beginning")
    # Refusals and operators' commands since the backup are stored again; those in the database do not change.
    for audit in (*SCAN_AUDIT.values(), SCAN_AUDIT_OPERATOR):
        await move_group(settings, f"{ORCHESTRATOR}-{audit.name}", audit, "beginning")
    above = mongo.next_id_floor()
    database = mongo.connect(settings.mongodb_uri, settings.database)
    try:
        clock = await platform_time(database)
        keys = read_chain_keys(settings.audit_key_file)
        store = MongoStore(database, keys, now=clock.now, keep_audit=timedelta(days=settings.audit_days))
        await store.audit.add([command_entry(ORCHESTRATOR, RESTORE, settings.database)])
        await store.advance_ids(above)
        # These commands are not sent again, and the backup may lie between a command and the last of its jobs.
        async for submit in store.commands.accepted_submits():
            await store.jobs.insert(submit.jobs)
        unfinished, cancelled = await _resume(store, await _ended(settings, keys), above, clock.now())
    finally:
        database.client.close()
    return f"new ids start above {above}\n{unfinished} unfinished jobs continue, {cancelled} were cancelled or deleted since the backup\n"


async def _ended(settings: Settings, keys: ChainKeys) -> set[int]:
    """Return the jobs whose cancellation or deletion is in the log; a deletion counts only if the orchestrator signed it."""
    bus = KafkaBus(settings, source=ORCHESTRATOR, instance=settings.instance)
    await bus.start()
    found = {0}
    try:
        for topic in (SCAN_EVENTS, SCAN_DELETIONS):
            found |= {_ended_by(topic, record, keys) async for record in bus.past(topic)}
    finally:
        await bus.stop()
    return found - {0}


def _ended_by(topic: Topic[Message], record: RawRecord, keys: ChainKeys) -> int:
    if any(("ce_type", type_.type_name().encode()) in record.headers for type_ in (JobCancelled, DeleteResults)):
        try:
            message = decode(topic, record)
        except MessageError:
            return 0
        if isinstance(message, JobCancelled):
            return message.job.id
        if isinstance(message, DeleteResults) and is_own(message, keys):
            return message.job_id
    return 0


async def _resume(store: MongoStore, ended: set[int], above: int, now: datetime) -> tuple[int, int]:
    """Update every unfinished job; return how many continue and how many it has cancelled."""
    after, continued, cancelled = 0, 0, 0
    while ids := await store.jobs.unsettled(after, _PAGE):
        jobs = [restored_from_backup(job, above) for job in (await store.jobs.get(ids)).values() if not job.final]
        updated = [change(job, JobTrigger.CANCEL, now) if job.id in ended else job for job in jobs]
        if lost := await store.jobs.save(updated):
            raise DependencyError(f"another process changes jobs {sorted(lost)}: stop every orchestrator")
        cancelled += sum(job.final for job in updated)
        continued += sum(not job.final for job in updated)
        after = max(ids)
    return continued, cancelled


if __name__ == "__main__":
    sys.exit(operator_command.run(prepare_restored(Settings())))
