"""Applications that the platform is compared with; uvicorn and Celery's own command load them.

`SCANFLEET_BENCH_REDIS` and `SCANFLEET_BENCH_MONGODB` are the URLs of the servers that they use, and
`SCANFLEET_BENCH_DATABASE` is the orchestrator's database.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from motor.motor_asyncio import AsyncIOMotorClient
from pydantic import BaseModel

worker = Celery("bench", broker=os.environ.get("SCANFLEET_BENCH_REDIS"))
worker.conf.task_ignore_result = True


@worker.task  # type: ignore[untyped-decorator] # Celery has no types
def scan(subnet_id: int, policy_id: int) -> None:
    """Do nothing, like a scripted worker."""


class Task(BaseModel):
    subnet_ids: list[int]
    policy_id: int


def queue() -> FastAPI:
    """Accept a job by putting a task for each subnet on Celery's queue."""
    app = FastAPI()

    @app.post("/task", status_code=201)
    def create(task: Task) -> dict[str, Any]:
        return {"jobs": [scan.delay(subnet_id, task.policy_id).id for subnet_id in task.subnet_ids]}

    return app


def documents() -> FastAPI:
    """Answer the first page of a user's jobs from one process with motor."""
    app = FastAPI()
    client: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(os.environ["SCANFLEET_BENCH_MONGODB"])
    jobs = client[os.environ["SCANFLEET_BENCH_DATABASE"]]["jobs"]

    @app.get("/task")
    async def read(user_id: int, page_size: int) -> JSONResponse:
        newest = jobs.find({"user_id": user_id}).sort([("sort_time", -1), ("_id", -1)]).limit(page_size)
        total = await jobs.count_documents({"user_id": user_id})
        page = [{"id": each["_id"], "status": each["status"], "cidr": each["cidr"]} async for each in newest]
        return JSONResponse({"tasks": page, "total": total})

    return app
