"""The gateway's responses under /app."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from api_gateway.api import page
from scanfleet.runtime.http.errors import ERROR_HANDLERS
from scanfleet.runtime.http.responses import error_response

HTML = {"Accept": "text/html,application/xhtml+xml"}


async def miss(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, "no")


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<!doctype html>the page")
    (tmp_path / "assets" / "main-ABC.js").write_text("1")
    app = FastAPI(exception_handlers={HTTPException: miss})
    page.serve(app, tmp_path)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://gateway") as client:
        yield client


@pytest.mark.proves("A31")
async def test_page_response_has_the_restricting_headers(client: httpx2.AsyncClient) -> None:
    """Files, the fallback and misses under /app forbid frames, inline code, other hosts and every feature."""
    for path in ("/app/", "/app/jobs/41", "/app/assets/main-ABC.js", "/app/assets/none.js"):
        headers = (await client.get(path, headers=HTML)).headers
        policy = headers["Content-Security-Policy"]
        for part in ("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "trusted-types 'none'"):
            assert part in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Opener-Policy"] == headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "camera=()" in headers["Permissions-Policy"]


async def test_page_path_of_the_page_is_its_index(client: httpx2.AsyncClient) -> None:
    """A navigation below /app is answered with the index; any other path without a file is a 404 in the common form."""
    assert (await client.get("/app/jobs/41", headers=HTML)).text == "<!doctype html>the page"
    miss = await client.get("/app/jobs/41", headers={"Accept": "application/json"})
    assert (miss.status_code, json.loads(miss.text)) == (404, {"error": "no"})
    assert (await client.get("/app/../../etc/passwd", headers={"Accept": "*/*"})).status_code == 404
    assert (await client.get("/app/%2e%2e/%2e%2e/etc/passwd")).status_code == 404


@pytest.mark.parametrize("requested", ["bytes=x", "bytes=9999999-", "bytes=0-1,3-4", "bytes=0-0"])
async def test_page_request_for_a_range_returns_the_whole_file(client: httpx2.AsyncClient, requested: str) -> None:
    """A Range header has no effect, also if it is malformed, beyond the end, or asks for many parts."""
    answer = await client.get("/app/index.html", headers={"Range": requested})
    assert (answer.status_code, answer.text) == (200, "<!doctype html>the page")


async def test_page_hashed_files_are_kept_and_the_index_is_not(client: httpx2.AsyncClient) -> None:
    """Browsers cache hashed files, and validate all others each time."""
    kept = (await client.get("/app/assets/main-ABC.js")).headers["Cache-Control"]
    assert kept == "public, max-age=31536000, immutable"
    for path in ("/app/", "/app/jobs", "/app/assets/none.js"):
        assert (await client.get(path, headers=HTML)).headers["Cache-Control"] == "no-cache"


async def test_page_post_is_405_with_allow(tmp_path: Path) -> None:
    """Another method than GET and HEAD under /app is a 405 that names these."""
    (tmp_path / "index.html").write_text("the page")
    app = FastAPI(redirect_slashes=False)
    app.add_exception_handler(HTTPException, ERROR_HANDLERS[HTTPException])
    page.serve(app, tmp_path)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://gateway") as client:
        answer = await client.post("/app/")
    assert (answer.status_code, answer.headers.get("Allow")) == (405, "GET, HEAD")


async def test_page_root_redirects_browsers_to_app(client: httpx2.AsyncClient) -> None:
    """A browser is redirected from / and /app to /app/ on the same host; any other client gets a 404."""
    for path in ("/", "/app"):
        answer = await client.get(path, headers=HTML)
        assert (answer.status_code, answer.headers["Location"]) == (303, "/app/")
        assert (await client.get(path)).status_code == 404


async def test_page_that_is_not_built_is_a_404(tmp_path: Path) -> None:
    """A gateway without the built files serves everything else."""
    app = FastAPI(redirect_slashes=False)
    page.serve(app, tmp_path)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://gateway") as client:
        assert (await client.get("/app/", headers=HTML)).status_code == 404


def test_page_built_files_stay_within_their_budget() -> None:
    """The scripts have at most 40 kB and the styles 8 kB compressed, and the index has no inline code and names no other host."""
    index = (page.BUILT / "index.html").read_text(encoding="utf-8")
    sizes: Counter[str] = Counter()
    for file in (page.BUILT / "assets").iterdir():
        assert f"/app/assets/{file.name}" in index
        sizes[file.suffix] += len(gzip.compress(file.read_bytes()))
    assert 0 < sizes[".js"] <= 40_000
    assert 0 < sizes[".css"] <= 8_000
    assert re.findall(r"<script(?![^>]* src=\"/app/)|<style|style=| on\w+=|https?://", index) == []
