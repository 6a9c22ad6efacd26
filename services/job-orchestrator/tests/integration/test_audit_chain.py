"""Detection of changed, removed and added entries and blocks of the audit log, with a real MongoDB and the real commands."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from bson import Code, Decimal128, encode
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument

from job_orchestrator.domain.chain import ChainKeys
from job_orchestrator.operator import audit as operator_audit
from job_orchestrator.repository import AuditVerifier, MongoStore, audit, signed_log
from job_orchestrator_testing import KEYS
from job_orchestrator_testing.builders import audit_entry
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import AuditEntry
from scanfleet.runtime import mongo
from scanfleet.runtime.mongo import Database, make_indexes

pytestmark = pytest.mark.integration

KEY = "signs-the-audit-log-of-one-test-alone"
STRANGER = ChainKeys(["what a stranger signs with, not knowing the key"])

Tamper = Callable[[Database], Awaitable[Any]]


@pytest.fixture
async def mongo_store(database: Database) -> MongoStore:
    """The store with the index that `verify` needs alone: all of them take longer to build than most tests here."""
    await database["audit"].create_index(signed_log.BY_BLOCK)
    return MongoStore(database, KEYS, now=utc_now)


@pytest.fixture
def verifier(database: Database) -> AuditVerifier:
    return AuditVerifier(database, KEYS, utc_now)


def entry(id_: int, **changed: Any) -> AuditEntry:
    return audit_entry(f"{id_}", **{"time": utc_now()} | changed)


async def filled(store: MongoStore) -> None:
    """Three blocks of two entries each, and an entry that is not sealed yet."""
    for number in range(0, 6, 2):
        await store.audit.add([entry(number), entry(number + 1)])
        await store.audit.seal()
    await store.audit.add([entry(6)])


async def forge(database: Database, block: object) -> None:
    genuine = await database["audit"].find_one({"_id": "job-orchestrator/1"})
    assert genuine is not None
    forged = genuine | {"_id": "job-orchestrator/forged", "block": block}
    await database["audit"].insert_one(forged)


async def forge_signed(database: Database) -> None:
    genuine = await database["audit"].find_one({"_id": "job-orchestrator/1"})
    assert genuine is not None
    content = {name: value for name, value in genuine.items() if name not in {"mac", "block"}}
    content["_id"] = "job-orchestrator/forged"
    await database["audit"].insert_one(content | {"mac": STRANGER.sign("entry", content), "block": 0})


def change(collection: str, id_: object, **values: object) -> Tamper:
    return lambda database: database[collection].update_one({"_id": id_}, {"$set": values})


def remove(collection: str, *ids: object) -> Tamper:
    return lambda database: database[collection].delete_many({"_id": {"$in": list(ids)}})


async def retype(database: Database, collection: str, id_: object, *names: str) -> None:
    """Replace times by objects that an encoder of times could produce for them."""
    document = await database[collection].find_one({"_id": id_})
    assert document is not None
    values = {name: {"ms": int(document[name].timestamp() * 1000)} for name in names}
    await database[collection].update_one({"_id": id_}, {"$set": values})


async def retype_expiry(database: Database) -> None:
    """Remove an entry, and retype its expiry in its block."""
    await database["audit"].delete_one({"_id": "job-orchestrator/2"})
    block = await database["audit_blocks"].find_one({"_id": 2})
    assert block is not None
    expiry = {"ms": int(block["entries"][0]["forget_at"].timestamp() * 1000)}
    await database["audit_blocks"].update_one({"_id": 2}, {"$set": {"entries.0.forget_at": expiry}})


async def forge_undecodable(database: Database, collection: str, document: dict[str, Any]) -> None:
    """Insert a time that Python's times cannot represent, and a text that is not valid UTF-8."""
    raw = encode(document | {"time": DatetimeMS(2**61), "text": "not valid"}).replace(b"not valid", b"not \xff\xfe!!!")
    await database[collection].insert_one(cast(Any, RawBSONDocument(raw)))


async def test_verify_of_an_unchanged_log_has_no_findings(mongo_store: MongoStore, verifier: AuditVerifier) -> None:
    """Sealed and unsealed entries are counted, and the head is the last block's signature."""
    await filled(mongo_store)
    found = await verifier.verify()
    assert (found.findings, found.blocks, found.sealed, found.waiting, found.first) == ([], 3, 6, 1, 1)
    assert found.head == (3, await verifier.block_signature(3))


@pytest.mark.proves("A26", "G15")
@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        (change("audit", "job-orchestrator/2", subject="8"), "entry job-orchestrator/2: changed"),
        (change("audit", "job-orchestrator/2", note="x"), "entry job-orchestrator/2: changed"),
        (change("audit", "job-orchestrator/2", block=7), None),
        (change("audit", "job-orchestrator/6", rule="x"), "entry job-orchestrator/6: added or changed"),
        (change("audit", "job-orchestrator/6", block=2), "entry job-orchestrator/6: added: block 2"),
        (change("audit", "job-orchestrator/6", block=-1), "entry job-orchestrator/6: added, or its block removed"),
        (remove("audit", "job-orchestrator/3"), "entry job-orchestrator/3: removed"),
        (lambda database: forge(database, 0), "entry job-orchestrator/forged: added or changed"),
        (lambda database: forge(database, 1), "entry job-orchestrator/forged: added: block 1"),
        (lambda database: forge(database, 9), "entry job-orchestrator/forged: added or changed"),
        (lambda database: forge(database, [-1, 1_000_000_000]), "entry job-orchestrator/forged: added"),
        (lambda database: forge(database, [1, 2]), "entry job-orchestrator/forged: added"),
        (lambda database: forge(database, 1.5), "entry job-orchestrator/forged: added"),
        (lambda database: forge(database, 2.0), "entry job-orchestrator/forged: added: block 2"),
        (lambda database: forge(database, float("nan")), "entry job-orchestrator/forged: added or changed"),
        (lambda database: forge(database, {"$": 1}), "entry job-orchestrator/forged: added or changed"),
        (forge_signed, "entry job-orchestrator/forged: added or changed"),
        (
            lambda database: database["audit"].insert_one({"_id": {"x": 1}, "block": 2}),
            "entry {'x': 1}: added: block 2",
        ),
        (
            lambda database: forge_undecodable(database, "audit", {"_id": "bad", "block": 2}),
            "entry bad: added: block 2",
        ),
        (
            lambda database: forge_undecodable(database, "audit", {"_id": "bad", "block": 0}),
            "entry bad: added or changed",
        ),
        (lambda database: forge_undecodable(database, "audit_blocks", {"_id": 4}), "block 4: added or changed"),
        (lambda database: retype(database, "audit", "job-orchestrator/2", "time"), "entry job-orchestrator/2: changed"),
        (
            lambda database: retype(database, "audit", "job-orchestrator/2", "time", "received_at", "forget_at"),
            "entry job-orchestrator/2: changed",
        ),
        (
            lambda database: retype(database, "audit", "job-orchestrator/6", "forget_at"),
            "entry job-orchestrator/6: added",
        ),
        (change("audit", "job-orchestrator/2", subject=Code("7")), "entry job-orchestrator/2: changed"),
        (change("audit", "job-orchestrator/2", mac="\xe9"), "entry job-orchestrator/2: changed"),
        (retype_expiry, "block 2: added or changed"),
        (lambda database: retype(database, "audit_blocks", 2, "forget_at"), "block 2: added or changed"),
        (change("audit_blocks", 2, entries=[{"id": {"x": 1}, "mac": 1, "forget_at": 1}]), "block 2: added or changed"),
        (change("audit", "job-orchestrator/6", block=False), "entry job-orchestrator/6: added, or its block removed"),
        (change("audit_blocks", 2, sealed_at=utc_now() - timedelta(days=1)), "block 2: added or changed"),
        (change("audit_blocks", 2, entries=[]), "block 2: added or changed"),
        (remove("audit_blocks", 1), "block 1: removed before its time"),
        (remove("audit_blocks", 2), "blocks 2 to 2: removed"),
        (remove("audit_blocks", 2), "entry job-orchestrator/2: added, or its block removed"),
        (remove("audit_blocks", 3), "entry job-orchestrator/4: added, or its block removed"),
        (remove("audit_blocks", 1, 2, 3), "entry job-orchestrator/0: added, or its block removed"),
        (lambda database: database["audit_blocks"].insert_one({"_id": 4}), "block 4: added or changed"),
        (lambda database: database["audit_blocks"].insert_one({"_id": "x"}), "block x: added"),
        (lambda database: database["audit_blocks"].insert_one({"_id": 4.0}), "block 4.0: added"),
        (lambda database: database["audit_blocks"].insert_one({"_id": math.inf}), "block inf: added"),
        (lambda database: database["audit_blocks"].insert_one({"_id": 2**62}), f"block {2**62}: added"),
    ],
)
async def test_verify_names_changed_removed_and_added_entries(
    mongo_store: MongoStore, verifier: AuditVerifier, database: Database, tamper: Tamper, named: str | None
) -> None:
    """Every change, removal and addition is named, also after the next entries were sealed."""
    await filled(mongo_store)
    await tamper(database)
    before = await verifier.verify()
    await mongo_store.audit.seal()
    await mongo_store.audit.add([entry(7)])
    await mongo_store.audit.seal()
    after = await verifier.verify()
    if named is None:  # the mark is not what proves: the block names the entry all the same
        assert before.findings == after.findings == []
        return
    assert [finding for finding in before.findings if finding.startswith(named)], before.findings
    if "audit_blocks" not in named and "block 3" not in named:
        assert after.findings, "the next seal must not hide it"


@pytest.mark.proves("A26")
@pytest.mark.parametrize(
    "forged",
    [[math.inf], [math.nan, -math.inf], [4.0], [4], [4, 5.0, 6], [2**53 - 1], [2**63 - 1], [Decimal128("4")], [4.5]],
)
async def test_seal_continues_beside_forged_blocks(
    mongo_store: MongoStore, verifier: AuditVerifier, database: Database, forged: list[object]
) -> None:
    """A forged block neither stops the chain nor becomes a part of it, and no entry is named."""
    await filled(mongo_store)
    await database["audit_blocks"].insert_many([{"_id": each} for each in forged])
    await mongo_store.audit.seal()
    await mongo_store.audit.add([entry(7)])
    await mongo_store.audit.seal()
    found = await verifier.verify()
    assert (found.sealed, found.waiting) == (8, 0)
    assert len(found.findings) >= len(forged)
    assert all(finding.startswith("block") for finding in found.findings)
    assert found.head[1] == await verifier.block_signature(found.head[0])
    assert await verifier.block_signature(found.head[0] + 1) is None


@pytest.mark.proves("A26")
async def test_verify_without_blocks_names_forged_entries(
    mongo_store: MongoStore, verifier: AuditVerifier, database: Database
) -> None:
    """Before the first block every entry is compared with its signature, whatever its mark."""
    await mongo_store.audit.add([entry(1)])
    for mark in ([-1, 1_000_000_000], 1.5, 7):
        await forge(database, mark)
        found = await verifier.verify()
        assert (found.findings, found.waiting) == (
            ["entry job-orchestrator/forged: added or changed: its signature is not the platform's"],
            1,
        )
        await database["audit"].delete_one({"_id": "job-orchestrator/forged"})


@pytest.mark.proves("A26")
async def test_verify_and_export_read_blocks_page_by_page(
    mongo_store: MongoStore, verifier: AuditVerifier, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit of a query does not limit the size of the log: no query reads more than a page of blocks."""
    monkeypatch.setattr(mongo, "_PAGE", 10)
    for number in range(35):
        await mongo_store.audit.add([entry(number)])
        await mongo_store.audit.seal()
    await database["audit_blocks"].insert_many([{"_id": id_} for id_ in (None, -1, 7.5, 2**60, "x")])
    await database.command("profile", 2)
    found = await verifier.verify()
    assert len([each async for each in mongo_store.audit.export()]) == 35
    await database.command("profile", 0)
    assert (found.blocks, found.sealed) == (35, 35)
    assert [each.split(":")[0] for each in found.findings] == [
        "block None", "block -1", "block 1152921504606846976", "block x", "block 7.5"
    ]  # fmt: skip
    reads = [each async for each in database["system.profile"].find({"ns": f"{database.name}.audit_blocks"})]
    assert [each["op"] for each in reads].count("getmore") == 0
    assert max(each["docsExamined"] for each in reads) == 10


@pytest.mark.proves("A26")
async def test_verify_reads_entries_by_their_index(database: Database, verifier: AuditVerifier) -> None:
    """The cost of a verification is that of the entries of each block, and of those outside the blocks."""
    store = MongoStore(database, KEYS, now=utc_now)
    await make_indexes(database, audit.INDEXES)
    for number in range(40):
        await store.audit.add([entry(2 * number), entry(2 * number + 1)])
        await store.audit.seal()
    await forge(database, [-1, 5, 5.5, 1_000_000_000])
    await database.command("profile", 2)
    assert len((await verifier.verify()).findings) == 2
    await database.command("profile", 0)
    read = [each async for each in database["system.profile"].find({"ns": f"{database.name}.audit"})]
    assert len(read) == 82
    assert all(each["docsExamined"] <= 4 and each["keysExamined"] <= 10 for each in read), [
        (each["docsExamined"], each["keysExamined"], each.get("planSummary")) for each in read
    ]


@pytest.mark.proves("A26")
async def test_seal_of_a_backlog_that_cannot_be_sealed_ends(
    mongo_store: MongoStore, verifier: AuditVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that seals nothing is not repeated at once, whatever the backlog."""
    monkeypatch.setattr(audit, "MAX_BLOCK", 2)
    await mongo_store.audit.add([entry(number) for number in range(4)])
    tries = 0

    async def collides(*_: object) -> set[int]:
        nonlocal tries
        tries += 1
        return {0}

    with monkeypatch.context() as patch:
        patch.setattr(audit, "insert_missing", collides)
        async with asyncio.timeout(20):
            await mongo_store.audit.seal()
    assert tries == 1
    await mongo_store.audit.seal()
    assert (await verifier.verify()).sealed == 4


@pytest.mark.proves("A26")
async def test_page_and_export_of_forged_entries(mongo_store: MongoStore, database: Database) -> None:
    """The list of entries marks forged and changed ones, and the export omits them."""
    await filled(mongo_store)
    await mongo_store.audit.seal()
    await forge(database, [-1, 1_000_000_000])
    await database["audit"].update_one({"_id": "job-orchestrator/2"}, {"$set": {"subject": "8", "genuine": True}})
    await retype(database, "audit", "job-orchestrator/3", "time")
    await forge_undecodable(database, "audit", {"_id": "bad", "received_at": utc_now()})
    listed, _ = await mongo_store.audit.page(0, 10)
    marked = {each.id.partition("/")[2]: each.genuine for each in listed}
    assert marked == dict.fromkeys("01456", True) | {"forged": False, "2": False}
    exported = [each.entry.id async for each in mongo_store.audit.export()]
    assert exported == [f"job-orchestrator/{number}" for number in (0, 1, 4, 5, 6)]


async def test_verify_with_an_earlier_head_notices_a_cut_chain(
    mongo_store: MongoStore, verifier: AuditVerifier, database: Database
) -> None:
    """A chain whose end was removed with its entries is whole in itself, and differs from the head that was kept."""
    await filled(mongo_store)
    head = (await verifier.verify()).head
    await database["audit_blocks"].delete_one({"_id": 3})
    await database["audit"].delete_many({"_id": {"$in": [f"job-orchestrator/{number}" for number in (4, 5)]}})
    assert (await verifier.verify()).findings == []
    assert await verifier.block_signature(head[0]) != head[1]
    await mongo_store.audit.seal()
    assert await verifier.block_signature(head[0]) != head[1]


async def test_seal_by_many_replicas_makes_one_chain(
    mongo_store: MongoStore, verifier: AuditVerifier, database: Database
) -> None:
    """Replicas that write and seal at the same time lose nothing, and no entry is in two blocks."""
    replicas = [mongo_store, *(MongoStore(database, KEYS, now=utc_now) for _ in range(3))]

    async def work(number: int, store: MongoStore) -> None:
        for each in range(20):
            await store.audit.add([entry(100 * number + each)])
            await store.audit.seal()

    await asyncio.gather(*(work(number, store) for number, store in enumerate(replicas)))
    await mongo_store.audit.seal()
    found = await verifier.verify()
    assert (found.findings, found.sealed, found.waiting) == ([], 80, 0)
    exported = [each.entry.id async for each in mongo_store.audit.export()]
    assert len(exported) == len(set(exported)) == 80


async def test_seal_continues_after_a_crash_between_block_and_marks(
    mongo_store: MongoStore, verifier: AuditVerifier, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash right after a block is written the chain is complete, and the next block has only newer entries."""
    await mongo_store.audit.add([entry(1)])

    async def dies(*_: object) -> None:
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(mongo_store.audit, "_mark", dies)
        with pytest.raises(asyncio.CancelledError):
            await mongo_store.audit.seal()
    found = await verifier.verify()
    assert (found.findings, found.sealed, found.waiting) == ([], 1, 0)
    await mongo_store.audit.add([entry(2)])
    await mongo_store.audit.seal()
    blocks = [[each["id"] for each in block["entries"]] async for block in database["audit_blocks"].find().sort("_id")]
    assert blocks == [["job-orchestrator/1"], ["job-orchestrator/2"]]


class CountingKeys(ChainKeys):
    """Counts the checks of each entry."""

    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__(secrets)
        self.checked: list[object] = []

    def verify(self, kind: str, content: Mapping[str, Any], signature: object) -> bool:
        if kind == "entry":
            self.checked.append(content["_id"])
        return super().verify(kind, content, signature)


async def test_seal_checks_and_marks_each_entry_once(database: Database) -> None:
    """Entries of blocks that this replica has marked are neither checked nor marked again."""
    keys = CountingKeys([KEY])
    store = MongoStore(database, keys, now=utc_now)
    await database.command("profile", 2)
    for number in range(3):
        await store.audit.add([entry(number)])
        await store.audit.seal()
    await store.audit.seal()
    await database.command("profile", 0)
    assert keys.checked == [f"job-orchestrator/{number}" for number in range(3)]
    updates = database["system.profile"].find({"op": "update", "ns": f"{database.name}.audit"})
    assert [each["nModified"] async for each in updates] == [1, 1, 1]


async def test_seal_makes_blocks_of_a_bounded_size(
    mongo_store: MongoStore, verifier: AuditVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backlog is sealed in one call, in blocks of at most so many entries."""
    monkeypatch.setattr(audit, "MAX_BLOCK", 10)
    await mongo_store.audit.add([entry(number) for number in range(25)])
    await mongo_store.audit.seal()
    found = await verifier.verify()
    assert (found.findings, found.blocks, found.sealed) == ([], 3, 25)


@pytest.mark.proves("G15")
@pytest.mark.usefixtures("mongo_store")
async def test_verify_distinguishes_expired_from_removed(database: Database) -> None:
    """Entries and blocks that have expired are counted; one that is missing before its time is named."""
    now = begin = utc_now()
    short, mongo_store = (
        MongoStore(database, KEYS, now=lambda: now, keep_audit=timedelta(hours=hours)) for hours in (1, 1_000)
    )
    verifier = AuditVerifier(database, KEYS, lambda: now)
    for number, store in enumerate((short, short, mongo_store)):
        await store.audit.add([entry(number)])
        await store.audit.seal()
    now = begin + timedelta(hours=2)
    await database["audit"].delete_one({"_id": "job-orchestrator/1"})
    found = await verifier.verify()
    assert (found.findings, found.sealed, found.forgotten) == ([], 2, 1)
    await database["audit_blocks"].delete_one({"_id": 1})  # its entry is not deleted yet
    await database["audit_blocks"].delete_one({"_id": 2})
    found = await verifier.verify()
    assert (found.findings, found.blocks, found.first, found.sealed) == ([], 1, 3, 1)
    now = begin
    assert (await verifier.verify()).findings == [
        "block 2: removed before its time, and every one before it that is not there",
        "entry job-orchestrator/0: added, or its block removed: it belongs to block 1, which does not exist",
    ]


@pytest.mark.proves("G15")
@pytest.mark.parametrize(("ahead", "code"), [(-59, 0), (59, 0), (-61, 2), (34_560_000, 2)])
async def test_verify_with_a_wrong_clock_of_the_database_is_a_finding(
    mongo_store: MongoStore, verifier: AuditVerifier, capsys: pytest.CaptureFixture[str], ahead: int, code: int
) -> None:
    """A database that was taken over could hide removed entries as expired by its clock: a difference is named."""
    await filled(mongo_store)
    assert await operator_audit._verify(verifier, None, timedelta(seconds=ahead)) == code
    named = f"the clock of MongoDB differs by {ahead} s from that of this command" in capsys.readouterr().out
    assert named is (code > 0)


async def test_adopt_signs_the_entries_of_an_earlier_release(
    mongo_store: MongoStore, verifier: AuditVerifier, database: Database
) -> None:
    """Entries of release 0.1 are reported until an operator adopts them; then they are sealed, with no time in the future."""
    old = entry(1).model_dump(exclude={"id"}) | {"forget_at": utc_now() + timedelta(days=365)}
    far = old | {"time": utc_now() + timedelta(days=365_000)}
    bad: list[dict[str, Any]] = [
        {"forget_at": {"ms": 1}},
        {"forget_at": None},
        {"more": 1.5},
        {"time": "2026-11-28T04:00:00Z"},
    ]
    await database["audit"].insert_many([old | {"_id": "plain"}, far | {"_id": "far"}])
    assert len((await verifier.verify()).findings) == 2
    await database["audit"].insert_many([old | each | {"_id": f"bad{n}"} for n, each in enumerate(bad)])
    assert await mongo_store.audit.adopt() == 2
    await mongo_store.audit.seal()
    found = await verifier.verify()
    assert (len(found.findings), found.sealed) == (len(bad), 2)
    await database["audit"].delete_many({"_id": {"$regex": "^bad"}})
    assert (await verifier.verify()).findings == []
    entries, _ = await mongo_store.audit.page(0, 10)
    assert all(each.received_at <= utc_now() for each in entries)


class Operator:
    """An operator at the command line."""

    def __init__(self, mongodb: str, database: str, key_file: Path) -> None:
        self._environment = {
            "SCANFLEET_MONGODB": mongodb,
            "SCANFLEET_DATABASE": database,
            "SCANFLEET_AUDIT_KEY_FILE": str(key_file),
        }

    async def runs(self, *words: str, command: str = "audit") -> tuple[int, list[str]]:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", f"job_orchestrator.operator.{command}", *words],
            env=os.environ | self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"{done.stdout} {done.stderr}".replace("\n", "").isprintable()
        return done.returncode, done.stdout.splitlines()


async def test_command_resumes_retention_under_audit(database: Database, mongodb: str, tmp_path: Path) -> None:
    """`resume` ends the halt of deletion by age with an audit entry; a second run reports that deletion is not halted."""
    file = tmp_path / "audit-key"
    file.write_text(KEY)
    store = MongoStore(database, ChainKeys([KEY]), now=utc_now)
    await store.prepare()
    await store.retention.halt(timedelta(days=1))
    operator = Operator(mongodb, database.name, file)
    assert await operator.runs("resume", command="retention") == (0, ["deletion by age continues within ten minutes"])
    assert await store.retention.halted() is None
    assert await operator.runs("resume", command="retention") == (0, ["deletion by age is not halted"])
    entries, total = await store.audit.page(0, 10)
    assert total == 1
    assert [(each.action, each.decision, each.rule) for each in entries] == [
        ("resume_retention", "allowed", "operator")
    ]


@pytest.mark.proves("A26", "A29")
async def test_commands_verify_and_export(
    database: Database, verifier: AuditVerifier, mongodb: str, tmp_path: Path
) -> None:
    """`verify` prints a head that it accepts later, and names a change with exit code 2; `export` continues after a block."""
    file = tmp_path / "audit-key"
    file.write_text(KEY)
    store = MongoStore(database, ChainKeys([KEY]), now=utc_now)
    await store.prepare()
    operator = Operator(mongodb, database.name, file)
    await filled(store)
    await store.audit.add([entry(8, target="\x1b[31m\x9b31m\u202e\x7f")])
    code, (summary,) = await operator.runs("verify")
    assert code == 0
    # With the entry of this command.
    assert summary.startswith("3 blocks; entries: 6 sealed, 3 not sealed yet; head 3/")
    head = summary.rpartition(" ")[2]
    await store.audit.seal()
    assert (await operator.runs("verify", "--head", head))[0] == 0
    assert (await operator.runs("verify", "--head", head[:-1] + "x"))[0] == 2

    code, lines = await operator.runs("export", "--after", "3")
    exported = [json.loads(line) for line in lines]
    assert [each["id"] for each in exported[:2]] == ["job-orchestrator/6", "job-orchestrator/8"]
    assert [(each["action"], each["rule"], each["block"]) for each in exported[2:]] == [("verify_audit", "operator", 4)]
    assert exported[1]["target"] == "\x1b[31m\x9b31m\u202e\x7f"
    assert {each["block_signature"] for each in exported} == {await verifier.block_signature(4)}
    assert len((await operator.runs("export"))[1]) == 9
    read = [each.action for each in (await store.audit.page(0, 5))[0]]
    assert read == ["export_audit", "export_audit", "verify_audit", "verify_audit", "verify_audit"]

    await database["audit"].update_one({"_id": "job-orchestrator/0"}, {"$set": {"subject": "8"}})
    await database["audit"].insert_one({"_id": "\x1b[2J\u202e"})
    code, lines = await operator.runs("verify")
    assert code == 2
    assert "entry job-orchestrator/0: changed" in lines
    assert [line for line in lines if line.startswith(r"entry \u001b[2J\u202e: added")]
    assert await operator.runs("adopt") == (0, ["0 entries were signed"])
