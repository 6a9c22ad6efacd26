"""`python -m result_store.operator.after_restore`: run once before the start on a database restored from a backup.

It moves the consumer group to the beginning of scan-results, as far as Kafka retains it. Results that are newer than the
backup are stored again from the log; those already in the database do not change. docs/operations.md has all steps of a
restore.
"""

from __future__ import annotations

import sys

from result_store.repository import SEQUENCE
from result_store.settings import Settings
from scanfleet.contracts.messages import OperatorActed
from scanfleet.contracts.messages.audit import RESTORE
from scanfleet.contracts.messages.topics import SCAN_AUDIT, SCAN_DELETIONS, SCAN_RESULTS
from scanfleet.kafka import KafkaBus
from scanfleet.kafka.groups import move_group
from scanfleet.runtime import mongo, operator_command
from scanfleet.runtime.operator_command import command_entry
from scanfleet.services import RESULT_STORE


async def prepare_restored(settings: Settings) -> str:
    """Prepare a restored database for use and return a summary. Idempotent.

    Raises:
        DependencyError: Kafka or MongoDB is unavailable, or a result-store still runs; call again.
    """
    await _record(settings)
    await move_group(settings, RESULT_STORE, SCAN_RESULTS, "beginning")
    await move_group(settings, f"{RESULT_STORE}-{SCAN_DELETIONS.name}", SCAN_DELETIONS, "beginning")
    above = mongo.next_id_floor()
    database = mongo.connect(settings.mongodb_uri, settings.database)
    try:
        await mongo.advance_ids(database, [SEQUENCE], above)
    finally:
        database.client.close()
    return f"new ids start above {above}\n{SCAN_RESULTS.name} will be read from its beginning\n"


async def _record(settings: Settings) -> None:
    """Publish the audit entry of this command, which the orchestrator stores once it runs."""
    bus = KafkaBus(settings, source=RESULT_STORE, instance=settings.instance)
    await bus.start()
    try:
        entry = command_entry(RESULT_STORE, RESTORE, settings.database)
        await bus.publish(SCAN_AUDIT[RESULT_STORE], [OperatorActed(entry=entry)])
    finally:
        await bus.stop()


if __name__ == "__main__":
    sys.exit(operator_command.run(prepare_restored(Settings())))
