"""Users and revocations, in memory and in MongoDB alike."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson.datetime_ms import DatetimeMS

from job_orchestrator.domain.access import Revocation
from job_orchestrator.domain.audit import own_entry
from job_orchestrator.domain.deletion import Deletion, Stage
from job_orchestrator.domain.ports import AccessRepository, Store
from job_orchestrator.domain.resources import Owned, ScanTarget
from job_orchestrator.metrics import UNREADABLE
from job_orchestrator.repository import MongoStore
from job_orchestrator_testing import KEYS, scan_job
from scanfleet.clock import utc_now
from scanfleet.runtime.mongo import Database

NOW = datetime(2026, 11, 28, 4, tzinfo=UTC)


@pytest.fixture
def access(store: Store) -> AccessRepository:
    return store.access


def revocation(id_: int, **changed: Any) -> Revocation:
    fields: dict[str, Any] = {
        "jti": None,
        "sub": None,
        "user_id": 7,
        "issued_before": NOW,
        "created_by": 9,
        "created_at": NOW,
        "expires_at": utc_now().replace(microsecond=0) + timedelta(days=1),
    }
    return Revocation(id=id_, **(fields | changed))


async def test_user_id_is_stable_per_subject(access: AccessRepository) -> None:
    """A subject always has the same id; another subject or issuer has another."""
    first = await access.user_id("https://a.test", "x")
    others = [await access.user_id(*each) for each in (("https://a.test", "X"), ("https://b.test", "x"))]
    assert await access.user_id("https://a.test", "x") == first
    assert len({first, *others}) == 3
    assert min(first, *others) > 0


async def test_concurrent_first_uses_get_the_same_id(access: AccessRepository) -> None:
    """Concurrent requests for a new user's id all get the same one."""
    ids = await asyncio.gather(*(access.user_id("https://a.test", f"s-{n % 5}") for n in range(50)))
    assert len(set(ids)) == 5
    assert ids[:5] * 10 == ids


async def test_revocations_are_listed_until_they_are_deleted(access: AccessRepository) -> None:
    """Revocations are listed completely, newest first, and deleted once; adding one again changes nothing."""
    one = revocation(await access.take_revocation_id())
    two = revocation(await access.take_revocation_id(), jti="t-1", user_id=None, issued_before=None)
    for each in (one, two, one):
        assert await access.add_revocation(each)
    assert await access.revocations() == [two, one]
    assert await access.has_revocation(one.id)
    assert await access.delete_revocation(one.id)
    assert not await access.has_revocation(one.id)
    assert not await access.delete_revocation(one.id)
    assert await access.revocations() == [two]


@pytest.mark.integration
@pytest.mark.parametrize(
    "damage",
    [{"$unset": {"jti": 1}}, {"$set": {"issued_before": "yesterday"}}, {"$set": {"created_at": DatetimeMS(2**61)}}],
)
async def test_damaged_revocation_hides_no_other(
    mongo_store: MongoStore, database: Database, damage: dict[str, Any]
) -> None:
    """A revocation that cannot be read is omitted and counted, and can be found and deleted by its id."""
    damaged, good = revocation(1), revocation(2)
    for each in (damaged, good):
        assert await mongo_store.access.add_revocation(each)
    await database["revocations"].update_one({"_id": 1}, damage)
    before = UNREADABLE.labels("revocations")._value.get()
    assert await mongo_store.access.revocations() == [good]
    assert UNREADABLE.labels("revocations")._value.get() == before + 1
    assert await mongo_store.access.has_revocation(1)
    assert await mongo_store.access.delete_revocation(1)


@pytest.mark.integration
async def test_replicas_agree_on_a_new_user(mongo_store: MongoStore, database: Database) -> None:
    """Two replicas that meet a new user at the same moment give one id."""
    replicas = [mongo_store.access, MongoStore(database, KEYS, now=utc_now).access]
    ids = await asyncio.gather(*(replicas[n % 2].user_id("https://a.test", f"s-{n // 10}") for n in range(50)))
    assert [len(set(ids[n : n + 10])) for n in range(0, 50, 10)] == [1] * 5
    assert len(set(ids)) == 5
    assert await database["users"].count_documents({}) == 5


@pytest.mark.integration
async def test_assigned_ids_start_above_claimed_ones(mongo_store: MongoStore) -> None:
    """If tokens claimed user ids before, no assigned id is one of those."""
    subnet = Owned(id=1, user_id=7_000, name="x", content=ScanTarget("127.0.0.0/24"), created_at=NOW, updated_at=NOW)
    await mongo_store.subnets.add(subnet)
    assert await mongo_store.access.user_id("https://a.test", "x") == 7_001
    assert await mongo_store.access.user_id("https://a.test", "y") == 7_002


@pytest.mark.integration
@pytest.mark.proves("A10", "G15")
async def test_assigned_ids_begin_above_those_of_the_audit_log(mongo_store: MongoStore) -> None:
    """Users who own nothing any more, but are named in the audit log, share their ids with no other."""
    entry = own_entry("e", "read_task", "/api/v1/task/1", "refused", "owner")
    subjects = ("9", "10000", "job-orchestrator", "", "-20000", "20000x", "9" * 17)
    await mongo_store.audit.add([entry.model_copy(update={"id": f"e-{each}", "subject": each}) for each in subjects])
    assert await mongo_store.access.user_id("https://a.test", "x") == 10_001


@pytest.mark.integration
async def test_assigned_ids_begin_above_those_of_revocations(mongo_store: MongoStore) -> None:
    """The revocation of a user who owns nothing applies to no user with an assigned id."""
    await mongo_store.access.add_revocation(revocation(1, user_id=11_000))
    assert await mongo_store.access.user_id("https://a.test", "x") == 11_001


@pytest.mark.integration
async def test_assigned_ids_begin_above_those_of_deleted_jobs(mongo_store: MongoStore) -> None:
    """Receipts of deleted jobs hold the ids of their users too, whether the deletion is due or done."""
    for job in (scan_job(1, user_id=8_000), scan_job(2, user_id=9_000)):
        await mongo_store.jobs.insert([job])
        receipt = Deletion(job_id=job.id, user_id=job.user_id, subnet_id=1, reason="request", requested_at=NOW)
        assert await mongo_store.deletions.begin(job, receipt)
    await mongo_store.deletions.advance([2], Stage.RESULTS, Stage.DONE, None)
    assert await mongo_store.access.user_id("https://a.test", "x") == 9_001


@pytest.mark.integration
@pytest.mark.usefixtures("mongo_store")
async def test_revocations_end_by_themselves(database: Database) -> None:
    """The database removes a revocation at the time that it names."""
    indexes = await database["revocations"].index_information()
    assert indexes["expires_at_1"]["expireAfterSeconds"] == 0
