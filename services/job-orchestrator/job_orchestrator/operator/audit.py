"""`python -m job_orchestrator.operator.audit …`: verify, export or adopt the audit log; settings come from the environment."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from datetime import timedelta

from job_orchestrator.domain.chain import read_chain_keys
from job_orchestrator.repository import AuditVerifier, MongoAudit, Verification, platform_time
from job_orchestrator.settings import AuditSettings
from scanfleet.clock import utc_now
from scanfleet.errors import DependencyError
from scanfleet.runtime import mongo
from scanfleet.runtime.operator_command import command_entry, log_to_stderr
from scanfleet.services import ORCHESTRATOR

_SKEW = timedelta(minutes=1)
_TAMPERED = 2  # the exit code; 1 is a dependency's failure


def main() -> int:
    asked = _parser().parse_args()
    log_to_stderr()
    try:
        return asyncio.run(_run(AuditSettings(), asked))
    except DependencyError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m job_orchestrator.operator.audit", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    verify = commands.add_parser("verify", help="list every entry that was changed, removed or added in the database")
    verify.add_argument(
        "--head",
        metavar="BLOCK/SIGNATURE",
        help="printed by an earlier verify or export; the chain must still contain it",
    )
    export = commands.add_parser("export", help="write the sealed entries as JSON lines, oldest first")
    export.add_argument("--after", type=int, default=0, metavar="BLOCK", help="only entries of blocks above this one")
    commands.add_parser("adopt", help="sign the entries of release 0.1, once after the upgrade")
    return parser


async def _run(settings: AuditSettings, asked: argparse.Namespace) -> int:
    database = mongo.connect(settings.mongodb_uri, settings.database)
    keep = timedelta(days=settings.audit_days)
    try:
        clock = await platform_time(database)
        keys = read_chain_keys(settings.audit_key_file)
        audit = MongoAudit(database, keys, keep, clock.now)
        match asked.command:
            case "verify":
                await audit.add([command_entry(ORCHESTRATOR, "verify_audit", "the audit log")])
                return await _verify(AuditVerifier(database, keys, clock.now), asked.head, clock.now() - utc_now())
            case "export":
                await audit.add([command_entry(ORCHESTRATOR, "export_audit", f"blocks above {asked.after}")])
                await _export(audit, asked.after)
            case "adopt":
                adopted = await audit.adopt()
                await audit.add([command_entry(ORCHESTRATOR, "adopt_audit", f"{adopted} entries")])
                sys.stdout.write(f"{adopted} entries were signed\n")
    finally:
        database.client.close()
    return 0


async def _verify(verifier: AuditVerifier, head: str | None, ahead: timedelta) -> int:
    """Verify the log, and that the database's clock, which is `ahead` of this one, does not hide removals as due."""
    found = await verifier.verify()
    if abs(ahead) > _SKEW:
        found.add(f"the clock of MongoDB differs by {ahead.total_seconds():.0f} s from that of this command")
    if head is not None:
        await _verify_head(verifier, found, head)
    for finding in found.findings:
        sys.stdout.write(f"{_ascii(finding)}\n")
    if found.more:
        sys.stdout.write(f"{found.more} more\n")
    forgotten = f", {found.forgotten} forgotten by age" if found.forgotten else ""
    first = f", from block {found.first}" if found.first > 1 else ""
    sys.stdout.write(
        f"{found.blocks} blocks{first}; entries: {found.sealed} sealed{forgotten}, {found.waiting} not sealed yet; "
        f"head {found.head[0]}/{_ascii(found.head[1])}\n",
    )
    return _TAMPERED if found.findings else 0


async def _verify_head(verifier: AuditVerifier, found: Verification, head: str) -> None:
    """Compare the chain with a head that was stored elsewhere."""
    number, _, signature = head.partition("/")
    block = int(number) if number.isascii() and number.isdigit() else 0
    if 0 < block < found.first:
        return  # the block has expired, and `verify` has checked that it was due
    if await verifier.block_signature(block) != signature:
        found.add(f"block {number}: removed or replaced: it does not match the given head")


async def _export(audit: MongoAudit, after: int) -> None:
    async for each in audit.export(after):
        entry = each.entry.model_dump(mode="json", exclude={"genuine"})
        line = json.dumps(entry | {"block": each.block, "block_signature": each.block_signature})
        sys.stdout.write(f"{line}\n".replace("\x7f", "\\u007f"))


def _ascii(text: str) -> str:
    """Return `text` in printable ASCII, because ids in the database are untrusted."""
    return json.dumps(text)[1:-1].replace("\x7f", "\\u007f")


if __name__ == "__main__":
    sys.exit(main())
