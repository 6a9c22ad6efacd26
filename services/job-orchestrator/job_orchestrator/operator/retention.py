"""`python -m job_orchestrator.operator.retention resume`: resume deletion by age after a jump of the database's clock.

Settings come from the environment.
"""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta

from job_orchestrator.domain.chain import read_chain_keys
from job_orchestrator.repository import MongoAudit, platform_time
from job_orchestrator.repository.retention import MongoRetention
from job_orchestrator.settings import AuditSettings
from scanfleet.runtime import mongo
from scanfleet.runtime.operator_command import command_entry, run
from scanfleet.services import ORCHESTRATOR


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m job_orchestrator.operator.retention", description=__doc__)
    parser.add_argument("command", choices=["resume"], help="resume: delete expired jobs again")
    parser.parse_args()
    return run(_resume(AuditSettings()))


async def _resume(settings: AuditSettings) -> str:
    database = mongo.connect(settings.mongodb_uri, settings.database)
    keep = timedelta(days=settings.audit_days)
    retention = MongoRetention(database)
    try:
        clock = await platform_time(database)
        audit = MongoAudit(database, read_chain_keys(settings.audit_key_file), keep, clock.now)
        if await retention.halted() is None:
            return "deletion by age is not halted\n"
        await audit.add([command_entry(ORCHESTRATOR, "resume_retention", "deletion by age")])
        await retention.resume()
    finally:
        database.client.close()
    return "deletion by age continues within ten minutes\n"


if __name__ == "__main__":
    sys.exit(main())
