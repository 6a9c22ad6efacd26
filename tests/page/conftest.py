"""One stack of real processes, servers for it to find, and Chromium with a user's session."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, Request, expect, sync_playwright

from local import nmap, ports, tokens
from local.stack import Stack
from scanfleet.services import SERVICES
from scanfleet_cli_testing.issuer import CLIENT_ID, Issuer, served
from tests.client import Client

USER = 7
PATIENCE_MS = 30_000  # that an expectation waits: this machine may be busy
HOSTILE = "SSH-2.0-<img src=x onerror=alert(1)>javascript:alert(2) \x1b[31m \u202eexe.txt\r\n"
NET = "127.44.8"  # no other test scans it
PORTS = "8020-8090"
SLOW = {"ports": "1-1000", "service_detection": False, "discovery": "none", "max_rate": 100}

# Violations of the page's content security policy, kept across the documents of a tab.
COLLECT_REPORTS = """
document.addEventListener("securitypolicyviolation", (event) =>
    console.error(`policy: ${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`));
"""


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stack."""
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="package")
def issuer(folder: Path) -> Iterator[Issuer]:
    """An OpenID provider on another site than the gateway, where the user is signed in; its tokens have the stack's key."""
    url = f"http://localhost:{ports.choose()}"
    own = tokens.Issuer(folder / "jwt", url)
    issuer = Issuer(httpx2.HTTPTransport(), url, lambda: own.token(USER, admin=True))
    with served(issuer):
        yield issuer


@pytest.fixture(scope="package")
def stack(kafka: str, mongodb: str, folder: Path, issuer: Issuer) -> Iterator[Stack]:
    gateway = ports.choose()
    stack = Stack(
        folder,
        replicas=dict.fromkeys(SERVICES, 1),
        kafka_at=kafka,
        mongodb_at=mongodb,
        topic_prefix="page-",
        database_prefix="page",
        usual_ports={"api-gateway": gateway},
        settings_of={
            "api-gateway": {
                "SCANFLEET_JWT_ISSUER": issuer.url,
                "SCANFLEET_OIDC_CLIENT_ID": CLIENT_ID,
                "SCANFLEET_PUBLIC_URL": f"http://127.0.0.1:{gateway}",
            }
        },
    )
    stack.up()
    yield stack
    stack.down()


@pytest.fixture(scope="package")
def servers() -> Iterator[nmap.OpenPorts]:
    """Servers on some addresses of the network, each of which sends a hostile banner; answers which."""
    places = {(f"{NET}.{host}", port) for host in (1, 7, 130, 254) for port in (8022, 8080)}
    with ExitStack() as stack:
        for place in sorted(places):
            stack.enter_context(_speaker(place))
        yield places


@contextmanager
def _speaker(place: tuple[str, int]) -> Iterator[None]:
    def speak() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # the listener is closed
            with connection:
                try:
                    connection.sendall(HOSTILE.encode())
                except OSError:
                    continue  # a probe that has left

    listener = socket.create_server(place, backlog=128)
    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "no chromium on PATH: install the package of that name, as Debian has it (Ubuntu has only a snap)"
    expect.set_options(timeout=PATIENCE_MS)
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox does not start as root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@contextmanager
def watched(context: BrowserContext, *urls: str) -> Iterator[Page]:
    """A tab whose policy reports, dialogs, faults and requests to other origins than these fail the test at its end."""
    context.set_default_timeout(PATIENCE_MS)
    context.add_init_script(COLLECT_REPORTS)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.text.startswith("policy: ") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))

    def opened(dialog: Dialog) -> None:
        wrong.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def requested(request: Request) -> None:
        if not request.url.startswith((*urls, "blob:")):
            wrong.append(f"request to {request.url}")

    page.on("dialog", opened)
    page.on("request", requested)
    yield page
    assert wrong == []


@pytest.fixture(scope="package")
def cookies(browser: Browser, stack: Stack) -> list[dict[str, object]]:
    """The session of the user, which is an administrator's."""
    with browser.new_context() as context, watched(context, stack.url) as page:
        page.goto(f"{stack.url}/app/jobs")
        page.get_by_label("Token").fill(stack.token(USER, admin=True))
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
        found = context.cookies()
    return [dict(each) for each in found]


@pytest.fixture
def page(browser: Browser, stack: Stack, cookies: list[dict[str, object]], tmp_path: Path) -> Iterator[Page]:
    """A tab of the signed-in user at 1280 px; a screenshot is left in `tmp_path` at the end."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.add_cookies(cookies)  # type: ignore[arg-type] # as the browser has returned them
        with watched(context, stack.url) as page:
            yield page
            page.screenshot(path=tmp_path / "end.png", full_page=True)


@pytest.fixture(scope="package")
def user(stack: Stack) -> Iterator[Client]:
    client = Client(stack.url, stack.token(USER, admin=True))
    yield client
    client.close()


@pytest.fixture(scope="package")
def finished(user: Client, servers: nmap.OpenPorts) -> int:
    """A job that has found the servers."""
    assert servers
    job_id = user.scan(
        f"{NET}.0/24", ports=PORTS, technique="connect", service_detection=False, scripts=["banner"], timing=4
    )
    assert user.finished(job_id)["status"]["status"] == "completed"
    return job_id
