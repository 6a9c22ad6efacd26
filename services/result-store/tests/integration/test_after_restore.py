"""Run `result_store.operator.after_restore` on a restored database."""

from __future__ import annotations

from uuid import uuid4

import pytest

from result_store.operator.after_restore import prepare_restored
from result_store.settings import Settings
from result_store_testing import host
from scanfleet.contracts.messages import OperatorActed
from scanfleet.contracts.messages.envelope import decode
from scanfleet.contracts.messages.topics import SCAN_AUDIT, SCAN_DELETIONS, SCAN_RESULTS
from scanfleet.errors import DependencyError
from scanfleet.kafka import KafkaBus
from scanfleet.kafka.topics import TopicSettings, create_topics
from scanfleet.runtime import mongo
from scanfleet.services import RESULT_STORE
from scanfleet_testing.consumers import Recorder, Running
from scanfleet_testing.waiting import until

pytestmark = pytest.mark.integration


async def test_restored_log_is_replayed_and_ids_advance(kafka: str, mongodb: str) -> None:
    """The log is read again, new ids exceed all earlier ones, and a run is recorded, which fails while a result-store runs."""
    settings = Settings(
        kafka=kafka,
        topic_prefix=f"{uuid4().hex}-",
        mongodb=mongodb,
        database=f"restored-{uuid4().hex[:12]}",
        internal_public_keys_file="unread.pem",
        chunk_public_keys_file="unread.pem",
    )
    audit = SCAN_AUDIT[RESULT_STORE]
    topics = [SCAN_RESULTS, SCAN_DELETIONS, audit]
    await create_topics(TopicSettings(kafka=kafka, topic_prefix=settings.topic_prefix), topics)
    bus, database = KafkaBus(settings, source="test", instance="test"), mongo.connect(mongodb, settings.database)
    await bus.start()
    try:
        ids = mongo.Ids(database, "results")
        before = await ids.take(7)
        first, again = Recorder(), Recorder()
        async with Running(bus.consume(SCAN_RESULTS, RESULT_STORE, first)):
            await bus.publish(SCAN_RESULTS, [host("127.9.8.1", 22)])
            await until(lambda: first.handled)
            with pytest.raises(DependencyError, match="members"):
                await prepare_restored(settings)
        above = mongo.next_id_floor()
        await prepare_restored(settings)
        assert (await ids.take()).start > above > before.stop
        async with Running(bus.consume(SCAN_RESULTS, RESULT_STORE, again)):
            await until(lambda: again.handled)
        acted = [decode(audit, record) async for record in bus.past(audit)]
        assert [each.entry.action for each in acted if isinstance(each, OperatorActed)] == ["restore_database"] * 2
    finally:
        await bus.stop()
        await database.client.drop_database(database.name)
        database.client.close()
