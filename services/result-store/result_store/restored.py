"""`python -m result_store.restored`: once, before result-store starts on a database that was set back to a backup.

It reads scan-results anew, as far as Kafka keeps it: what was found since the backup is found again there, and what is in
the database already stays as it is. docs/operations.md has all steps of a restore.
"""

from __future__ import annotations

import sys

from result_store.repository import SEQUENCE
from result_store.settings import Settings
from scanfleet import command, mongo
from scanfleet.kafka.groups import move_group
from scanfleet.messages.topics import RESULT_STORE, SCAN_RESULTS


async def restored(settings: Settings) -> str:
    """Make a database that was set back fit for use; again does no harm. Answers what was done.

    Raises:
        DependencyError: Kafka or MongoDB is away, or a result-store still runs; call again.
    """
    await move_group(settings, RESULT_STORE, SCAN_RESULTS, "beginning")
    above = mongo.beyond()
    database = mongo.connect(settings.mongodb_uri, settings.database)
    try:
        await mongo.advance_ids(database, [SEQUENCE], above)
    finally:
        database.client.close()
    return f"ids go on above {above}\n{SCAN_RESULTS.name} is read from its beginning\n"


if __name__ == "__main__":
    sys.exit(command.run(restored(Settings())))
