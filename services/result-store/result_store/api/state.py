"""Provide the routes with the store that `main.py` opens."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from result_store.domain.ports import Findings


async def _store(request: Request) -> Findings:  # without async the framework would use a thread
    return cast(Findings, request.app.state.store)


StoreDep = Annotated[Findings, Depends(_store)]
