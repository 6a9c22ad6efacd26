"""The API of result-store over a store in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import httpx2
from fastapi import FastAPI

from result_store.api import hosts, nmap_xml, results
from result_store.api.turns import Limits
from result_store.domain.results import fold
from result_store_testing import Log, MemoryStore
from scanfleet.contracts.messages import HostScanned
from scanfleet.runtime import service
from scanfleet.runtime.settings import ConnectionSettings
from scanfleet.security.audit import Refusals
from scanfleet_testing.tokens import Issuer

ISSUER: Final = Issuer()


def client(store: MemoryStore) -> httpx2.AsyncClient:
    @asynccontextmanager
    async def nothing(_app: FastAPI) -> AsyncIterator[None]:
        yield

    app = service.create_app(
        name="result-store",
        refusals=Refusals("result-store"),
        settings=ConnectionSettings(),
        lifespan=nothing,
        routers=[results.router, hosts.router, nmap_xml.router],
    )
    app.state.store = store
    app.state.limits = Limits()
    app.state.verifier = ISSUER.verifier
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://result-store")


async def store_of(*messages: HostScanned) -> MemoryStore:
    store = MemoryStore()
    await store.add(list(fold(Log().append(*messages)).hosts.values()))
    return store


async def get(
    store: MemoryStore,
    path: str = "/api/v1/task/1/results",
    *,
    user: int = 7,
    admin: bool = False,
    accept: str | None = None,
) -> httpx2.Response:
    headers = ISSUER.bearer(user, admin=admin) | ({} if accept is None else {"Accept": accept})
    async with client(store) as http:
        return await http.get(path, headers=headers)
