"""The client of the public API against a scripted gateway."""

from __future__ import annotations

import httpx2
import pytest

from tests.client import Client


def answering(*answers: httpx2.Response) -> Client:
    """A client whose requests get these responses in turn, and then 503."""
    client = Client("http://gateway", "token")
    client.close()
    left = iter(answers)
    transport = httpx2.MockTransport(lambda _: next(left, httpx2.Response(503)))
    client.http = httpx2.Client(base_url="http://gateway", transport=transport)
    return client


def task(status: str) -> httpx2.Response:
    return httpx2.Response(200, json={"job": {"id": 1}, "status": {"status": status}})


def test_finished_with_unavailable_service_returns_the_task() -> None:
    """Waiting for a job tolerates 503 before its end, and sends no request after it."""
    client = answering(httpx2.Response(503), task("running"), httpx2.Response(503), task("completed"))
    assert client.finished(1, limit_seconds=5)["status"]["status"] == "completed"


def test_finished_with_another_error_raises() -> None:
    """Waiting for a job does not hide an error other than 503."""
    with pytest.raises(httpx2.HTTPStatusError, match="404"):
        answering(httpx2.Response(404)).finished(1, limit_seconds=5)
