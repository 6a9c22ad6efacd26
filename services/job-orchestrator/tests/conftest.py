"""The stores that everything runs on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from job_orchestrator.repository import MongoStore
from job_orchestrator_testing import KEYS, MemoryStore, Simulation
from scanfleet.clock import utc_now
from scanfleet.runtime import mongo
from scanfleet.runtime.mongo import Database


@pytest.fixture
async def database(mongodb: str) -> AsyncIterator[Database]:
    """A separate database on the real server."""
    database = mongo.connect(mongodb, f"jobs-{uuid4().hex[:12]}")
    yield database
    await database.client.drop_database(database.name)
    database.client.close()


@pytest.fixture
async def mongo_store(database: Database) -> MongoStore:
    store = MongoStore(database, KEYS, now=utc_now)
    await store.prepare()
    return store


@pytest.fixture(params=["memory", pytest.param("mongodb", marks=pytest.mark.integration)])
def store(request: pytest.FixtureRequest) -> MemoryStore | MongoStore:
    """Either store: what they promise is the same."""
    if request.param == "memory":
        return MemoryStore()
    mongo_store: MongoStore = request.getfixturevalue("mongo_store")
    return mongo_store


@pytest.fixture
async def simulation() -> Simulation:
    """One caught-up replica on memory, and a worker that has announced itself."""
    simulation = Simulation(MemoryStore())
    await simulation.start()
    await simulation.worker.announce()
    return simulation
