"""The cost of the record of attempts on a real database."""

from __future__ import annotations

from collections import Counter

import pytest

from job_orchestrator.repository import MongoStore
from job_orchestrator_testing import Simulation
from scanfleet.contracts.messages import Run
from scanfleet.runtime.mongo import Database

pytestmark = pytest.mark.integration

RUN = Run(nmap="7.93", arguments="a" * 64, source="127.0.0.1", rules="b" * 64, began=1.0)


async def test_record_of_attempts_costs_no_write(mongo_store: MongoStore, database: Database) -> None:
    """As before attempts were recorded, one is written by its dispatch, its claim and its final report only."""
    simulation = Simulation(mongo_store)
    await simulation.start()
    simulation.worker.hold = True
    await simulation.worker.announce()
    await database.command("profile", 2)
    await simulation.submit("127.9.8.0/30")
    await simulation.settle()
    [first] = simulation.worker.tasks
    await simulation.worker.claim(first, run=RUN)
    await simulation.settle()
    await simulation.worker.release(first, "ss..", run=RUN)
    await simulation.worker.announce()
    await simulation.settle()
    [_, second] = simulation.worker.tasks
    await simulation.worker.claim(second, run=RUN)
    await simulation.settle()
    await simulation.worker.scanned(second, nmap="7.93", run=RUN)
    await simulation.settle()
    await database.command("profile", 0)
    writes = {"ns": f"{database.name}.chunks", "op": {"$in": ["insert", "update", "remove"]}}
    counts = Counter([each["op"] async for each in database["system.profile"].find(writes)])
    attempts, stored = 2, 1
    assert counts == {"insert": 1, "update": 3 * attempts + stored}
    chunk = (await mongo_store.chunks.get(["1-0"]))["1-0"]
    assert [(each.n, each.how, each.run) for each in chunk.attempts] == [(1, "released", RUN), (2, "scanned", RUN)]
    assert all(each.at <= each.claimed <= each.ended for each in chunk.attempts if each.claimed and each.ended)
