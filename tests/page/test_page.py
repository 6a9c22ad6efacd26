"""The page in a real browser, on a real stack: scan, watch and read."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, Request, Route, ViewportSize, expect

from local.nmap import OpenPorts, open_ports
from local.paths import SCANFLEET
from local.stack import Stack
from scanfleet_cli_testing.issuer import Issuer
from tests.client import Client
from tests.page.conftest import NET, PORTS, SLOW, USER, watched
from tests.page.kit import VISIT, busy_stream, many_results, refuse

pytestmark = pytest.mark.e2e

WIDE = 1280  # px
NARROWEST = 320  # px at which nothing scrolls sideways (WCAG 1.4.10)
AXE = Path(__file__).parents[2] / "page" / "node_modules" / "axe-core" / "axe.min.js"
SCREENSHOTS = Path(__file__).parents[2] / ".local" / "screenshots"  # an artefact of CI
CHECK = """async (only) => (await axe.run({ runOnly: only }))
    .violations.map((each) => `${each.id}: ${each.nodes.map((node) => node.target.join(" ")).join(", ")}`)"""
RULES = {
    "light": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
    "dark": ["color-contrast"],  # all that a theme changes
}
# True once nothing is wider than the screen: the map adapts to a new width in a frame or two.
FITS = """async () => {
    const fits = () => document.documentElement.scrollWidth <= innerWidth;
    for (let frame = 0; frame < 100 && !fits(); frame++) await new Promise(requestAnimationFrame);
    return fits();
}"""


def rows(page: Page) -> OpenPorts:
    """Address and port of each row of the results."""
    cells = page.locator(".results tbody tr:not(.space)").all()
    return {
        (row.locator("td").nth(0).inner_text(), int(row.locator("td").nth(1).inner_text().split("/")[0]))
        for row in cells
    }


@pytest.mark.parametrize(("width", "theme", "owner"), [(WIDE, "light", 8), (375, "dark", 88)])
def test_page_story_from_sign_in_to_results(
    *,
    browser: Browser,
    stack: Stack,
    servers: OpenPorts,
    width: int,
    theme: Literal["light", "dark"],
    owner: int,
) -> None:
    """A user signs in with a token, scans a /24, watches it end, and reads what plain nmap finds; wide and narrow."""
    screen: ViewportSize = {"width": width, "height": 800}
    with (
        browser.new_context(color_scheme=theme, viewport=screen) as context,
        watched(context, stack.url) as page,
    ):
        page.goto(f"{stack.url}/")
        page.get_by_label("Token").fill("forged")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text("the token is not valid")
        expect(page.get_by_role("alert")).to_contain_text(re.compile("request [0-9a-f]{32}"))
        page.get_by_label("Token").fill(stack.token(owner))
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_text("There are no jobs yet.")).to_be_visible()
        assert page.evaluate("document.cookie") == ""

        page.get_by_role("link", name="New scan").click()
        page.get_by_label("Another network").fill(f"{NET}.0/33")
        page.get_by_label("Ports").fill(PORTS)
        page.get_by_role("button", name="Start").click()
        expect(page.get_by_role("alert")).to_contain_text(re.compile("request [0-9a-f]{32}"))
        expect(page.get_by_label("Ports")).to_have_value(PORTS)
        page.get_by_label("Another network").fill("10.0.0.0/24")
        refusal = "10.0.0.0/24 is not within the networks that this platform allows"
        expect(page.get_by_text(f"would be refused: {refusal}")).to_be_visible()
        page.get_by_label("Another network").fill(f"{NET}.0/24")
        page.get_by_label("Preset").select_option("quick")
        estimate = re.compile(r"1 job: 256 addresses × 71 ports = 18,176 probes\. About \d+:\d\d of one worker slot")
        expect(page.get_by_text(estimate)).to_be_visible()
        expect(page.get_by_text("would be refused")).to_have_count(0)
        page.get_by_role("button", name="Start").click()

        expect(page.get_by_role("heading", name=re.compile(r"Job \d+ completed ✓"))).to_be_visible(timeout=90_000)
        expect(page.get_by_role("status").filter(has_text=re.compile(r"Job \d+ completed, 100 %"))).to_have_count(1)
        expect(page.get_by_text("· quick: ")).to_be_visible()
        expect(page.get_by_text("✓ accounted for")).to_be_visible()
        answered = page.locator(".legend li", has_text="answered").locator(".number").first
        expect(answered).to_have_text("256")  # on loopback every address answers, most of them that the port is closed
        page.get_by_role("link", name="Results").click()
        expect(page.get_by_text(f"{len(servers)} of {len(servers)} results")).to_be_visible()
        assert rows(page) == servers == open_ports("-sT", "-T4", "-p", PORTS, f"{NET}.0/24")
        page.get_by_role("link", name="Not probed 0").click()
        expect(page.get_by_text("Every address was fully probed.")).to_be_visible()
        page.get_by_role("link", name="Jobs").click()
        expect(page.get_by_role("row", name="completed").first).to_contain_text(f"{NET}.0/24")


def test_page_opens_the_job_at_the_address_of_the_command(
    page: Page, stack: Stack, finished: int, tmp_path: Path
) -> None:
    """`scanfleet job open` prints the address of the job's page."""
    environment = os.environ | {"SCANFLEET_URL": stack.url, "XDG_CONFIG_HOME": str(tmp_path)}
    command = [SCANFLEET, "job", "open", str(finished)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    page.goto(printed.strip())
    expect(page.get_by_role("heading", name=f"Job {finished} completed")).to_be_visible()


def test_page_map_cursor_shows_the_open_ports_of_its_address(page: Page, stack: Stack, finished: int) -> None:
    """At the cell of a machine the cursor's text has the number of its open ports, and names some of them, read by its address."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "address=" in request.url else None)
    page.goto(f"{stack.url}/app/jobs/{finished}")
    page.get_by_role("application").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".cursor")).to_have_text(f"{NET}.1 — answered, 2 ports open: 8022/tcp, 8080/tcp")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".cursor")).to_have_text(f"{NET}.2 — answered, no port open")
    hosts = f"{stack.url}/api/v1/task/{finished}/hosts"
    read = [url for url in asked if not url.endswith(f"={NET}.0")]  # a slow page may rest at the first cell
    assert read == [f"{hosts}?address={NET}.{host}" for host in (1, 2)]


def tab_to(page: Page, target: Locator) -> None:
    """Press Tab until the target has the focus."""
    expect(target).to_be_visible()
    for _ in range(60):
        page.keyboard.press("Tab")
        if target.evaluate("(element) => element === document.activeElement"):
            return
    raise AssertionError(f"{target} is not reached by Tab")


def test_page_keyboard_alone_scans_reads_and_cancels(browser: Browser, stack: Stack) -> None:
    """With only the keyboard a user signs in, starts a scan, reads each part of its job, and cancels it in a dialog."""
    with browser.new_context() as context, watched(context, stack.url) as page:
        page.goto(f"{stack.url}/app/")
        expect(page.get_by_label("Token")).to_be_focused()
        page.keyboard.insert_text(stack.token(10))
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Jobs")).to_be_focused()

        page.keyboard.press("n")
        expect(page.get_by_role("heading", name="New scan")).to_be_focused()
        tab_to(page, page.get_by_label("Another network"))
        page.keyboard.insert_text("127.44.16.0/22")
        tab_to(page, page.get_by_label("Ports"))
        page.keyboard.insert_text("1-10000")
        page.keyboard.press("Enter")
        heading = page.get_by_role("heading", name=re.compile(r"Job \d+ running"))
        expect(heading).to_be_visible()
        job_id = page.url.rpartition("/")[2]

        for name, shown in (
            ("Results", page.get_by_text(re.compile("None yet|results"))),
            ("Not probed", page.get_by_text("None so far.")),
            ("Request", page.get_by_text("127.44.16.0/22").last),
            ("Overview", page.get_by_role("application")),
        ):
            tab_to(page, page.get_by_role("navigation", name="parts of the job").get_by_role("link", name=name))
            page.keyboard.press("Enter")
            expect(shown).to_be_visible()
        tab_to(page, page.get_by_role("application"))
        for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
            page.keyboard.press(key)
        expect(page.locator(".cursor")).to_contain_text(re.compile(r"127\.44\.16\.\d+ — "))

        page.keyboard.press("?")
        expect(page.get_by_role("dialog")).to_contain_text("next row, previous row")
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)
        page.keyboard.press("Control+k")
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.insert_text("jobs")
        page.keyboard.press("Enter")
        expect(page.get_by_role("link", name=job_id, exact=True)).to_be_visible()
        page.keyboard.press("j")
        expect(page.get_by_role("link", name=job_id, exact=True)).to_be_focused()
        page.keyboard.press("Enter")
        expect(heading).to_be_visible()

        page.keyboard.press("x")
        expect(page.get_by_role("dialog")).to_contain_text("No further packets are sent for this job.")
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(heading).to_be_visible()
        page.keyboard.press("x")
        tab_to(page, page.get_by_role("button", name="Cancel the job"))
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name=f"Job {job_id} cancelled")).to_be_visible()
        expect(page.get_by_role("dialog")).to_have_count(0)


def test_page_sign_in_at_the_issuer_returns_to_the_page(browser: Browser, stack: Stack, issuer: Issuer) -> None:
    """The code flow begins a session at the URL that was opened, in another tab renews one, and a refusal is shown."""
    with browser.new_context() as context, watched(context, stack.url, issuer.url) as page:
        page.goto(f"{stack.url}/app/subnets/new?from=here")
        link = page.get_by_role("link", name=f"Sign in with {urlsplit(issuer.url).netloc}")
        issuer.approves = False
        link.click()
        expect(page.get_by_role("alert")).to_contain_text("The sign-in was not completed")
        issuer.approves = True
        link.click()
        expect(page.get_by_role("heading", name="New subnet")).to_be_visible()
        assert page.url == f"{stack.url}/app/subnets/new?from=here"
        assert page.evaluate("document.cookie") == ""
        assert [each["name"] for each in context.cookies(stack.url)] == ["__Host-session"]

        page.get_by_label("Network").fill("127.44.11.0/24")
        context.clear_cookies()
        page.get_by_role("button", name="Save").click()
        with page.expect_popup() as opened:
            page.get_by_role("dialog").get_by_role("link", name="Sign in with").click()
        expect(opened.value.get_by_role("heading", name="New subnet")).to_be_visible()
        opened.value.close()
        page.evaluate("dispatchEvent(new Event('focus'))")  # a headless browser's tabs all have the focus
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(page.get_by_label("Network")).to_have_value("127.44.11.0/24")
        page.locator("summary").click()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("heading", name="Sign in to Scanfleet")).to_be_visible()
        assert context.cookies(stack.url) == []


@pytest.mark.proves("A15", "A31")
def test_page_hostile_banner_is_text(page: Page, stack: Stack, finished: int) -> None:
    """A banner of markup, escapes and direction marks is shown as text and runs nothing."""
    page.goto(f"{stack.url}/app/jobs/{finished}/results?columns=ip_address,port,banner")
    cell = page.locator("td.banner").first
    expect(cell).to_contain_text("<img src=x onerror=alert(1)>javascript:alert(2)")
    assert "\x1b" not in cell.inner_text()
    assert "\u202e" not in cell.inner_text()
    assert page.locator("td.banner img").count() == 0


@pytest.mark.proves("A15", "A31")
def test_page_hostile_names_and_reasons_are_text(page: Page, stack: Stack, user: Client, finished: int) -> None:
    """Markup in the names of subnets and policies, in the audit log and in the reasons of a ledger is shown as text."""
    hostile = "<img src=x onerror=alert(1)>\x1b[31m\u202e"
    subnet = {"id": 1, "name": hostile, "cidr": "10.0.0.0/24", "exclude": []}
    policy = {"id": 1, "name": hostile, "ports": "80", "technique": "connect", "timing": 3, "scripts": []}
    entry = {"id": "1", "time": "2026-01-01T00:00:00Z", "subject": hostile, "action": hostile, "target": hostile}
    entry |= {"decision": "refused", "rule": "owner", "reason": hostile, "source": hostile, "request_id": hostile}
    unprobed = {"address": "10.0.0.1", "ports": "80", "outcome": "lost", "reason": hostile}
    page.route("**/api/v1/subnet?*", lambda route: route.fulfill(json={"subnets": [subnet], "total": 1}))
    page.route("**/api/v1/policy?*", lambda route: route.fulfill(json={"policies": [policy], "total": 1}))
    page.route("**/api/v1/audit?*", lambda route: route.fulfill(json={"entries": [entry], "total": 1}))

    ledger = user.ledger(finished)
    ledger["counts"]["lost"] = 1
    ledger["not_probed"] = {"addresses": [unprobed], "total": 1}
    page.route("**/ledger?*", lambda route: route.fulfill(json=ledger))
    page.goto(f"{stack.url}/app/subnets")
    for path in ("subnets", "policies", "audit", "new", f"jobs/{finished}/not-probed"):
        page.evaluate(VISIT, f"/app/{path}")
        main = page.locator("main")
        expect(main).to_contain_text("<img src=x onerror=alert(1)>")
        assert main.locator("img").count() == 0, path
        assert not {"\x1b", "\u202e"} & set(main.inner_text()), path


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page_every_page_is_accessible_and_fits(
    *,
    browser: Browser,
    stack: Stack,
    user: Client,
    cookies: list[dict[str, object]],
    finished: int,
    theme: Literal["light", "dark"],
) -> None:
    """On every page, wide and narrow, axe finds no violation, and no element exceeds a narrow screen; keeps screenshots."""
    job = user.finished(finished)["job"]
    paths = [
        "new",
        "subnets",
        "subnets/new",
        "subnets/import",
        "policies",
        "policies/new",
        f"subnets/{job['subnet_id']}",
        f"policies/{job['policy_id']}",
        "audit",
        "jobs/999999",
        "jobs",
    ]
    paths += [f"jobs/{finished}{tab}" for tab in ("", "/results", "/not-probed", "/request")]
    found: list[str] = []
    for width in (WIDE, 375):
        screen: ViewportSize = {"width": width, "height": 800}
        with (
            browser.new_context(color_scheme=theme, viewport=screen) as context,
            watched(context, stack.url) as page,
        ):
            page.goto(f"{stack.url}/app/")
            expect(page.get_by_label("Token")).to_be_visible()
            page.screenshot(path=SCREENSHOTS / f"sign-in-{width}-{theme}.png")
            page.evaluate(AXE.read_text(encoding="utf-8"))
            found += [f"sign in, {width}: {each}" for each in page.evaluate(CHECK, RULES[theme])]
            context.add_cookies(cookies)  # type: ignore[arg-type] # as the browser has returned them
            page.reload()
            expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
            page.evaluate(AXE.read_text(encoding="utf-8"))
            for path in paths:
                page.evaluate(VISIT, f"/app/{path}")
                expect(page.locator("body[data-busy]")).to_have_count(0)
                if path == "subnets/import":
                    page.get_by_label("CSV").fill(f"name,cidr,exclude\nlab,{NET}.0/24,{NET}.1;{NET}.2\n")
                    page.get_by_role("button", name="Check").click()
                    expect(page.get_by_role("cell", name=f"{NET}.0/24")).to_be_visible()
                found += [f"{path}, {width}: {each}" for each in page.evaluate(CHECK, RULES[theme])]
                name = re.sub(r"\W+", "-", re.sub(r"\d+", "n", path)).strip("-")
                page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{theme}.png")
                for narrow in (width, NARROWEST) if width < WIDE else (width,):
                    page.set_viewport_size({"width": narrow, "height": 800})
                    if not page.evaluate(FITS):
                        found.append(f"{path} is wider than {narrow} px")
                page.set_viewport_size(screen)
            if width == WIDE:
                running = user.scan("127.44.10.0/24", **SLOW)
                page.goto(f"{stack.url}/app/jobs/{running}")
                expect(page.get_by_role("heading", name=re.compile("running"))).to_be_visible()
                page.evaluate(AXE.read_text(encoding="utf-8"))
                page.screenshot(path=SCREENSHOTS / f"running-{theme}.png")
                found += [f"running job: {each}" for each in page.evaluate(CHECK, RULES[theme])]
                page.keyboard.press("x")
                expect(page.get_by_role("dialog")).to_be_visible()
                page.screenshot(path=SCREENSHOTS / f"dialog-{theme}.png")
                found += [f"dialog: {each}" for each in page.evaluate(CHECK, RULES[theme])]
                page.keyboard.press("Tab")
                page.keyboard.press("Enter")
                expect(page.get_by_role("heading", name=re.compile("cancelled"))).to_be_visible()
                page.goto(f"{stack.url}/app/jobs/{running}/not-probed")
                expect(page.get_by_role("row", name="cancelled").first).to_be_visible()
                page.screenshot(path=SCREENSHOTS / f"cancelled-{theme}.png")
    assert found == []


def test_page_invalid_form_shows_the_sentence_at_its_field(page: Page, stack: Stack) -> None:
    """The API's error is shown at the field that it names, with the request's id, and no input is lost."""
    page.goto(f"{stack.url}/app/policies/new")
    page.get_by_label("Name").fill("mine")
    page.get_by_label("Ports").fill("http")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_label("Ports")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("alert")).to_contain_text("ports must look like")
    expect(page.get_by_role("alert")).to_contain_text(re.compile("request [0-9a-f]{32}"))
    expect(page.get_by_label("Name")).to_have_value("mine")


def test_page_counts_each_address_and_port_once(page: Page, stack: Stack, user: Client) -> None:
    """Overlapping exclusions and ports that are named twice are counted once, as the scan takes them."""
    user.subnet("127.44.18.0/24", ["127.44.18.128/25", "127.44.18.192/26", "127.44.18.1", "127.44.18.1"])
    page.goto(f"{stack.url}/app/subnets")
    expect(page.get_by_role("row", name="127.44.18.0/24").get_by_role("cell", name="127", exact=True)).to_be_visible()
    page.evaluate(VISIT, "/app/new")
    page.get_by_label("Another network").fill(f"{NET}.1")
    page.get_by_label("Ports").fill("T:22,22,20-25,U:22")
    expect(page.get_by_text("1 address × 7 ports = 7 probes")).to_be_visible()


def test_page_estimate_is_of_the_latest_input(page: Page, stack: Stack, user: Client) -> None:
    """The estimate accounts for exclusions; a request for earlier input is aborted."""
    body = {"name": "half", "cidr": "127.44.16.0/24", "exclude": ["127.44.16.128/25"]}
    subnet_id = user.http.post("/api/v1/subnet", json=body).json()["id"]

    def hold(route: Route) -> None:
        if "8021" not in (route.request.post_data or ""):
            route.continue_()

    page.route("**/api/v1/task/estimate", hold)
    page.goto(f"{stack.url}/app/new?subnet={subnet_id}")
    expect(
        page.get_by_text("128 addresses × 1,000 ports = 128,000 probes; 128 addresses are excluded.")
    ).to_be_visible()
    with page.expect_request("**/api/v1/task/estimate"):
        page.get_by_label("Ports").fill("8021")
    expect(page.get_by_text("1 job: estimating …")).to_be_visible()
    with page.expect_event("requestfailed", lambda each: each.url.endswith("/estimate")):
        page.get_by_label("Ports").fill("8022-8025")
    expect(page.get_by_text("128 addresses × 4 ports = 512 probes")).to_be_visible()
    page.get_by_label("Ports").fill("T:8022,70000")
    expect(page.locator(".field", has=page.get_by_label("Ports")).locator(".wrong")).to_contain_text("is not a port")


def test_page_jobs_of_all_users_name_their_owner(page: Page, stack: Stack) -> None:
    """Only the list of all users' jobs has a column of owners; no other user's job is read, which would be audited."""
    job = {
        "id": 999_999,  # no job of the stack, whose events would change it
        "user_id": 8,
        "policy_id": 1,
        "subnet_id": 1,
        "status": "pending",
        "start_time": None,
        "end_time": None,
    }
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/999999") else None)
    page.route("**/api/v1/task?*", lambda route: route.fulfill(json={"jobs": [job], "total": 1}))
    page.goto(f"{stack.url}/app/jobs?user_id=all")
    expect(page.get_by_role("row", name="999999 8 pending")).to_be_visible()
    page.evaluate(VISIT, "/app/jobs")
    expect(page.get_by_role("row", name="999999 pending")).to_be_visible()
    expect(page.get_by_role("columnheader", name="User")).to_have_count(0)
    expect(page.locator("body[data-busy]")).to_have_count(0)
    assert asked == []


def test_page_list_of_jobs_beyond_its_end_leads_back(page: Page, stack: Stack, finished: int) -> None:
    """A page after the last one does not claim that there are no jobs, and links to the last one."""
    assert finished
    page.goto(f"{stack.url}/app/jobs?page=900")
    expect(page.get_by_text("The list has no page 900.")).to_be_visible()
    expect(page.get_by_text("There are no jobs yet.")).to_have_count(0)
    page.get_by_role("link", name="previous").click()
    expect(page.locator("tbody a[data-row]").last).to_be_visible()


def test_page_list_of_jobs_of_an_invalid_user_has_no_stream(page: Page, stack: Stack) -> None:
    """Once the API has refused a list, the page does not try its stream again."""
    path = "**/api/v1/task?user_id=abc&page=*"
    page.route(path, refuse)
    page.goto(f"{stack.url}/app/jobs?user_id=abc")
    expect(page.locator(".dot")).to_have_text("connection lost, trying again")
    page.unroute(path)
    expect(page.get_by_role("alert")).to_contain_text("user_id")
    expect(page.locator(".dot")).to_have_class("dot off")


def test_page_invalid_network_shows_the_sentence_at_its_field(page: Page, stack: Stack) -> None:
    """A network that is none, one that the platform does not allow, and a wrong exclusion are each shown at their field."""
    page.goto(f"{stack.url}/app/subnets/new")
    for network, exclude, field, sentence in (
        ("127.44.8.1/24", "", "Network", "has host bits set; the network is 127.44.8.0/24"),
        ("10.0.0.0/24", "", "Network", "is not within the networks that this platform allows"),
        (f"{NET}.0/24", "127.44.8.1/24", "Exclude", "has host bits set"),
    ):
        page.get_by_label("Network").fill(network)
        page.get_by_label("Exclude").fill(exclude)
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_label(field)).to_have_attribute("aria-invalid", "true")
        expect(page.locator(".field", has=page.get_by_label(field)).locator(".wrong")).to_contain_text(sentence)
        expect(page.locator("[aria-invalid=true]")).to_have_count(1)


def test_page_shows_100_000_results_in_a_window(page: Page, stack: Stack, finished: int) -> None:
    """A hundred thousand results are counted, filtered, sorted and scrolled with a few dozen rows in the document."""
    page.add_init_script(many_results(100_000))
    page.goto(f"{stack.url}/app/jobs/{finished}/results")
    expect(page.get_by_text("100,000 of 100,000 results")).to_be_visible()
    page.get_by_label("Search results").fill("10.20.3. :443")
    expect(page.get_by_text("64 of 100,000 results")).to_be_visible()
    page.get_by_label("Search results").fill("")
    page.get_by_role("button", name="Port").click()
    page.get_by_role("button", name="Port").click()
    expect(page.get_by_role("columnheader", name="Port")).to_have_attribute("aria-sort", "descending")
    expect(page.locator("td.port").first).to_have_text("8080/tcp")
    page.locator(".window").evaluate("box => { box.scrollTop = box.scrollHeight; }")
    expect(page.locator("td.port").last).to_have_text("22/tcp")
    assert page.locator(".results tr").count() < 100
    expect(page.locator(".results tr").nth(5)).to_have_attribute("aria-rowindex", re.compile(r"\d{5}"))


def test_page_draft_does_not_overwrite_a_later_version(page: Page, stack: Stack) -> None:
    """A draft that is older than the object is not saved over it, also if the object was loaded again meanwhile."""
    page.goto(f"{stack.url}/app/policies")
    change = """async ([method, path, body]) => (await (await fetch(path, { method, body: JSON.stringify(body),
        headers: { "Content-Type": "application/json" } })).json()).id"""
    policy_id = page.evaluate(change, ["POST", "/api/v1/policy", {"name": "first", "preset": "quick"}])
    path = f"/app/policies/{policy_id}"
    page.evaluate(VISIT, path)
    page.get_by_label("Ports").fill("8022")
    page.evaluate(VISIT, "/app/policies")
    page.evaluate(change, ["PUT", f"/api/v1/policy/{policy_id}", {"name": "theirs", "preset": "quick"}])
    page.evaluate(VISIT, path)
    expect(page.get_by_label("Ports")).to_have_value("8022")
    expect(page.locator("body[data-busy]")).to_have_count(0)
    page.get_by_role("button", name="Save").click()
    page.get_by_role("button", name="Discard mine and load theirs").click()
    expect(page.get_by_label("Name")).to_have_value("theirs")
    page.get_by_label("Ports").fill("8023")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("row", name="theirs")).to_contain_text("8023")


def test_page_policy_of_another_preset_has_its_values(page: Page, stack: Stack, user: Client) -> None:
    """A new preset replaces the values of the former one, and keeps those that differed from it."""
    policy_id = user.policy(name="changes its preset", preset="quick", max_retries=3)
    page.goto(f"{stack.url}/app/policies/{policy_id}")
    page.get_by_label("Preset").select_option("full")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("row", name="changes its preset")).to_contain_text("full")
    saved = user.http.get(f"/api/v1/policy/{policy_id}").raise_for_status().json()
    full = user.http.get("/api/v1/info").raise_for_status().json()["presets"]["full"]
    assert {name: saved[name] for name in full} == full | {"max_retries": 3}


def test_page_map_of_too_many_ports_asks_for_some(page: Page, stack: Stack, finished: int) -> None:
    """A map that is too large for all ports of the job is offered for some of them."""

    def large(route: Route) -> None:
        if "ports=" in route.request.url:
            route.fallback()
        else:
            route.fulfill(status=413, json={"error": "name some of the job's ports, as in ?ports=8020"})

    page.route("**/map?*", large)
    page.goto(f"{stack.url}/app/jobs/{finished}")
    expect(page.get_by_role("alert")).to_contain_text("name some of the job's ports")
    page.get_by_label("Ports of the map").fill("8022,8080")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("application")).to_be_visible()
    expect(page.get_by_role("link", name="all ports")).to_be_visible()
    assert page.url.endswith("?ports=8022%2C8080")


@pytest.mark.parametrize(
    ("cidr", "addresses", "second"), [("10.0.0.0/15", 131_072, "10.0.4.0"), ("2001:db8::/112", 65_536, "2001:db8::400")]
)
def test_page_map_of_a_large_network_has_a_cell_per_chunk(
    page: Page, stack: Stack, user: Client, finished: int, *, cidr: str, addresses: int, second: str
) -> None:
    """The map of a /15 or of an IPv6 network shows chunks, each with its worst outcome; a chunk opens its addresses."""
    path, first = f"/api/v1/task/{finished}", cidr.partition("/")[0]
    snapshot = user.http.get(f"{path}/snapshot").json() | {"cidr": cidr, "addresses": addresses}
    asked: list[str] = []

    def answer(route: Route) -> None:
        asked.append(route.request.url.partition("?")[2])
        of_chunks = "by=chunk" in asked[-1]
        letters = "al" + "s" * (addresses // 1_024 - 2) if of_chunks else "l" * 65_536
        drawn = {"job_id": finished, "seq": 1, "status": "completed", "first": first if of_chunks else second}
        drawn |= {"addresses": addresses if of_chunks else 65_536, "step": 1_024 if of_chunks else 1}
        route.fulfill(json=drawn | {"blocks": [{"ports": "22", "letters": letters}]})

    page.route(f"**{path}/snapshot", lambda route: route.fulfill(json=snapshot))
    page.route(f"**{path}/map?*", answer)
    page.goto(f"{stack.url}/app/jobs/{finished}")
    chunks = page.get_by_role("application", name=f"Coverage of {addresses // 1_024} chunks from {first}")
    chunks.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".cursor")).to_have_text(f"{second}/{118 if ':' in cidr else 22} — lost")
    expect(page.get_by_text("Each cell is a chunk of 1,024 addresses")).to_be_visible()
    expect(page.get_by_role("button", name="lost")).to_contain_text("1")
    page.keyboard.press("Enter")
    expect(page.get_by_role("application", name=f"Coverage of 65,536 addresses from {second}")).to_be_visible()
    page.get_by_role("link", name="all chunks").click()
    expect(chunks).to_be_visible()
    chunks.click(position={"x": 5, "y": 5})
    expect(page.get_by_role("application", name="Coverage of 65,536 addresses")).to_be_visible()
    assert asked[0] == "by=chunk"
    assert parse_qs(urlsplit(page.url).query)["from"] == [first]


def test_page_without_ledger_does_not_claim_that_nothing_answered(page: Page, stack: Stack, finished: int) -> None:
    """An empty list of results makes no statement about machines until the ledger is loaded."""
    page.route("**/results?fields=*", lambda route: route.fulfill(body=""))
    page.route("**/ledger?*", refuse)
    page.goto(f"{stack.url}/app/jobs/{finished}/results")
    expect(page.get_by_text("The ledger is not loaded yet.")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("the service is unavailable")
    page.unroute("**/ledger?*")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_text("answered, none has an open port.")).to_be_visible()


@pytest.mark.parametrize(("ids", "shown"), [(0, "0"), (3, "3"), (1_000, "1,000+")])
def test_page_tab_has_the_number_of_results(page: Page, stack: Stack, finished: int, ids: int, shown: str) -> None:
    """The tab of the results has their number, which is counted up to a thousand."""
    page.route("**/results?after=0&limit=1000&fields=id", lambda route: route.fulfill(body='{"id":1}\n' * ids))
    page.goto(f"{stack.url}/app/jobs/{finished}")
    expect(page.get_by_role("link", name=f"Results {shown}", exact=True)).to_be_visible()


@pytest.mark.parametrize("owner", [USER, USER + 1], ids=["own", "other"])
def test_page_results_are_counted_for_their_owner_up_to_the_maximum(
    page: Page, stack: Stack, user: Client, finished: int, owner: int
) -> None:
    """The results of a running job are not counted again beyond the maximum, nor read for an administrator who opens the job."""
    task = user.finished(finished)
    running = task | {"status": task["status"] | {"status": "running"}, "job": task["job"] | {"user_id": owner}}
    counted: list[str] = []

    def count(route: Route) -> None:
        counted.append(route.request.url)
        route.fulfill(body='{"id":1}\n' * 1_000)

    page.route(f"**/api/v1/task/{finished}", lambda route: route.fulfill(json=running))
    page.route("**/results?*", count)
    page.add_init_script(busy_stream(running))
    page.goto(f"{stack.url}/app/jobs/{finished}")
    expect(page.get_by_role("link", name="Results 1,000+" if owner == USER else "Results", exact=True)).to_be_visible()
    for _ in range(2):
        with page.expect_request("**/ledger?*"):
            pass
    assert len(counted) == (1 if owner == USER else 0)


def test_page_cancelled_and_lost_probes_are_not_accounted_for(
    page: Page, stack: Stack, user: Client, finished: int
) -> None:
    """Only probes with an outcome of their own are counted as accounted for, and a cancelled address has a reason."""
    ledger = user.ledger(finished)
    counts = ledger["counts"] | {"answered": ledger["counts"]["answered"] - 76, "cancelled": 71, "lost": 5}
    entry = {"address": f"{NET}.9", "ports": "8080", "outcome": "cancelled", "reason": ""}
    ledger |= {"accounted": False, "counts": counts, "not_probed": {"addresses": [entry], "total": 1}}
    page.route("**/ledger?*", lambda route: route.fulfill(json=ledger))
    page.goto(f"{stack.url}/app/jobs/{finished}/not-probed")
    expect(page.get_by_text("18,100 of 18,176 probes accounted for")).to_be_visible()
    expect(page.get_by_role("row", name=f"{NET}.9")).to_contain_text("the job was cancelled")


def test_page_counts_addresses_that_were_not_probed_as_the_command(
    page: Page, stack: Stack, user: Client, finished: int
) -> None:
    """An address in several blocks of ports counts once, and excluded addresses do not count."""
    ledger = user.ledger(finished)
    ports = ledger["request"]["ports"]
    lost = ledger["counts"] | {"answered": 192 * ports, "lost": 64 * ports}
    excluded = ledger["counts"] | {"answered": 128 * ports, "excluded": 128 * ports}
    ledger["not_probed"] = {"addresses": [], "total": 2_048}
    page.route("**/ledger?*", lambda route: route.fulfill(json=ledger))
    for counts, accounted, number in ((lost, False, 64), (excluded, True, 0)):
        ledger |= {"accounted": accounted, "counts": counts}
        page.goto(f"{stack.url}/app/jobs/{finished}")
        expect(page.get_by_role("link", name=f"Not probed {number}", exact=True)).to_be_visible()
        expect(page.get_by_text("64 of 256 addresses were NOT probed.")).to_have_count(1 if number else 0)
    expect(page.locator(".problem")).to_have_count(0)
    page.get_by_role("link", name="Not probed 0").click()
    expect(page.get_by_text("Every address was fully probed.")).to_be_visible()


def test_page_long_ledger_names_the_lost_addresses_behind_others(
    page: Page, stack: Stack, user: Client, finished: int
) -> None:
    """Addresses that are down do not count towards the maximum number of entries that the page lists."""
    ledger = user.ledger(finished)
    ledger["counts"] |= {"answered": 0, "down": 255 * ledger["request"]["ports"], "lost": ledger["request"]["ports"]}

    def answer(route: Route) -> None:
        after = int(parse_qs(urlsplit(route.request.url).query)["after"][0])
        outcome, following = ("lost", None) if after == 11_000 else ("down", after + 1_000)
        number = 1_000 if following else 1
        entry = {"address": f"{NET}.9", "ports": PORTS, "outcome": outcome, "reason": "nmap was killed"}
        route.fulfill(json=ledger | {"not_probed": {"addresses": [entry] * number, "total": 11_001, "next": following}})

    page.route("**/ledger?*", answer)
    page.goto(f"{stack.url}/app/jobs/{finished}/not-probed")
    expect(page.get_by_role("row", name=f"{NET}.9 lost")).to_contain_text("nmap was killed")
    expect(page.get_by_role("row", name="down")).to_have_count(0)


def test_page_short_pages_of_a_ledger_are_followed_to_its_end(
    page: Page, stack: Stack, user: Client, finished: int
) -> None:
    """A page without an address is not the end of the list: the answer names the position of the next one."""
    ledger = user.ledger(finished)
    ledger["counts"] |= {"timed_out": 1}
    entry = {"address": f"{NET}.9", "ports": "8080", "outcome": "timed_out", "reason": ""}
    parts = {"0": ([], 70), "70": ([entry], 90), "90": ([], None)}

    def answer(route: Route) -> None:
        addresses, following = parts[parse_qs(urlsplit(route.request.url).query)["after"][0]]
        route.fulfill(json=ledger | {"not_probed": {"addresses": addresses, "total": 1, "next": following}})

    page.route("**/ledger?*", answer)
    page.goto(f"{stack.url}/app/jobs/{finished}/not-probed")
    expect(page.get_by_role("row", name=f"{NET}.9")).to_contain_text("timed out")
    expect(page.get_by_text("may be more")).to_have_count(0)


def test_page_ended_job_is_loaded_once(page: Page, stack: Stack, finished: int) -> None:
    """The page of an ended job opens no stream, and loads its ledger and its map once."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path.rpartition("/")[2]))
    page.goto(f"{stack.url}/app/jobs/{finished}")
    expect(page.get_by_role("application")).to_be_visible()
    page.evaluate(VISIT, f"/app/jobs/{finished}")
    expect(page.locator("body[data-busy]")).to_have_count(0)
    assert (asked.count("ledger"), asked.count("map"), asked.count("events")) == (1, 1, 0)


def test_page_saved_results_hold_no_formula(page: Page, stack: Stack, finished: int) -> None:
    """In the file of what is shown, text that a spreadsheet would run has a quote before it, as in the API's own file."""
    result = {"id": 1, "ip_address": "10.20.0.1", "port": 22, "protocol": "tcp", "status": "open", "service": "=1+1"}
    result |= {"version": ' "@SUM(1)', "os_info": "x;-1", "banner": "\uff1d1+1\u202e"}
    page.route("**/results?fields=*", lambda route: route.fulfill(body=json.dumps(result)))
    page.goto(f"{stack.url}/app/jobs/{finished}/results?columns=service,version,os_info,banner")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save shown as CSV").click()
    _, line = csv.reader(Path(download.value.path()).read_text(encoding="utf-8").splitlines())
    assert line == ["'=1+1", "' \"@SUM(1)", "x;'-1", "'\uff1d1+1\\u202e"]


def test_page_long_list_is_paged_and_reports_omissions(page: Page, stack: Stack) -> None:
    """Of thousands of subnets fifty are shown at once, each with its last scan, which may be unknown."""

    def subnets(route: Route) -> None:
        first = 2_500 - 100 * (int(re.findall(r"[?&]page=(\d+)", route.request.url)[0]) - 1)
        found = [
            {"id": n, "name": f"net {n}", "cidr": f"10.0.{n % 256}.0/24", "exclude": []}
            for n in range(first, first - 100, -1)
        ]
        route.fulfill(json={"subnets": found, "total": 2_500})

    asked: list[str] = []

    def last_scan(route: Route) -> None:
        asked.append(route.request.url)
        refuse(route)

    page.route("**/api/v1/subnet?*", subnets)
    page.route("**/api/v1/task?*", last_scan)
    page.goto(f"{stack.url}/app/subnets")
    expect(page.get_by_text("The page keeps the first 2,000 of 2,500.")).to_be_visible()
    expect(page.get_by_role("cell", name="unknown")).to_have_count(50)
    assert len(asked) == 50
    page.get_by_role("link", name="next").click()
    expect(page.get_by_role("link", name="10.0.146.0/24", exact=True)).to_be_visible()


def test_page_scan_from_a_preset_makes_one_policy(page: Page, stack: Stack) -> None:
    """A second scan with the same preset and ports uses the policy of the first."""
    made: list[Request] = []
    page.on(
        "request", lambda each: made.append(each) if each.method == "POST" and each.url.endswith("/policy") else None
    )
    for address in ("127.44.12.1", "127.44.12.2"):
        page.goto(f"{stack.url}/app/new")
        page.get_by_label("Another network").fill(address)
        page.get_by_label("Preset").select_option("quick")
        page.get_by_label("Ports").fill("8021")
        expect(page.locator("body[data-busy]")).to_have_count(0)
        page.get_by_role("button", name="Start").click()
        expect(page.get_by_role("heading", name=re.compile(r"Job \d+"))).to_be_visible()
    assert len(made) == 1


def test_page_import_is_the_apis(page: Page, stack: Stack) -> None:
    """A file is checked and sent as a whole: an invalid line creates nothing, a repeat no duplicates, an update no second one."""
    page.goto(f"{stack.url}/app/subnets/import")
    page.get_by_label("CSV").fill('cidr,name,exclude\n127.44.13.0/24,"a\nb",\n127.44.14.0/24,c,\n')
    page.get_by_role("button", name="Check").click()
    expect(page.get_by_role("row", name="3 127.44.13.0/24")).to_be_visible()
    expect(page.get_by_role("row", name="4 127.44.14.0/24,c, to create")).to_be_visible()
    page.get_by_label("CSV").fill(
        'cidr,name,exclude\n127.44.13.0/24,"a, b",127.44.13.1;127.44.13.2\n\n127.44.14.1/24,c,\n'
    )
    page.get_by_role("button", name="Check").click()
    summary = "2 subnets in the file: 1 to create, 0 there already, 1 refused"
    expect(page.get_by_role("status").filter(has_text=summary)).to_be_visible()
    expect(page.get_by_role("row", name="4 127.44.14.1/24,c,")).to_contain_text(
        "cidr: 127.44.14.1/24 has host bits set"
    )
    page.get_by_role("button", name="Import").click()
    expect(page.get_by_role("alert")).to_contain_text("line 4: cidr: 127.44.14.1/24 has host bits set")
    page.get_by_label("CSV").fill(
        'cidr,name,exclude\n127.44.13.0/24,"a, b",127.44.13.1;127.44.13.2\n127.44.14.0/24,c,\n'
    )
    for message in ("2 subnets created", "0 subnets created"):
        page.get_by_role("button", name="Import").click()
        expect(page.get_by_role("status").filter(has_text=message)).to_be_visible()
    page.get_by_role("button", name="Check").click()
    expect(page.get_by_role("link", name="there already")).to_have_count(2)
    page.get_by_label("CSV").fill('cidr,name,exclude\n127.44.13.0/24,"a, b",127.44.13.1\n127.44.14.0/24,c,\n')
    page.get_by_label("Update the subnets of the same names").check()
    page.get_by_role("button", name="Check").click()
    summary = "2 subnets in the file: 0 to create, 1 to update, 1 there already, 0 refused"
    expect(page.get_by_role("status").filter(has_text=summary)).to_be_visible()
    page.get_by_role("button", name="Import").click()
    expect(page.get_by_role("status").filter(has_text="0 subnets created, 1 updated")).to_be_visible()
    page.evaluate(VISIT, "/app/subnets")
    expect(page.get_by_role("row", name="127.44.13.0/24")).to_contain_text("255")


def test_page_audit_times_are_utc(browser: Browser, stack: Stack, cookies: list[dict[str, object]]) -> None:
    """Times of the audit log are UTC in the form as in the list; what is no time is ignored."""
    with browser.new_context(timezone_id="Asia/Tokyo") as context, watched(context, stack.url) as page:
        context.add_cookies(cookies)  # type: ignore[arg-type] # as the browser has returned them
        with page.expect_request("**/api/v1/audit?since=2026-01-01T09%3A00%3A00.000Z&*"):
            page.goto(f"{stack.url}/app/audit?since=2026-01-01T09:00&until=x")
        expect(page.get_by_label("since (UTC)")).to_have_value("2026-01-01T09:00")
        expect(page.get_by_role("table")).to_be_visible()


def test_page_audit_is_not_asked_for_by_others(browser: Browser, stack: Stack) -> None:
    """A user who is no administrator reads that the audit log is not for them, and no request is refused."""
    with browser.new_context() as context, watched(context, stack.url) as page:
        asked: list[str] = []
        page.on("request", lambda each: asked.append(each.url) if "/audit?" in each.url else None)
        page.goto(f"{stack.url}/app/audit")
        page.get_by_label("Token").fill(stack.token(8))
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_text("The audit log is for administrators.")).to_be_visible()
        expect(page.locator("body[data-busy]")).to_have_count(0)
    assert asked == []


def test_page_unknown_names_in_the_url_are_not_blank(page: Page, stack: Stack, finished: int) -> None:
    """An unknown part of a job is named as such, and without a known column the results have the usual ones."""
    page.goto(f"{stack.url}/app/jobs/{finished}/nonsense")
    expect(page.get_by_text("A job has no such page.")).to_be_visible()
    page.goto(f"{stack.url}/app/jobs/{finished}/results?columns=foo")
    expect(page.get_by_role("columnheader", name="Address")).to_be_visible()


def test_page_url_has_the_state_of_the_page(page: Page, stack: Stack, finished: int) -> None:
    """Searches, the filter and the cursor of a map, and a paused list are the same after a reload of the URL."""
    subnets = [{"id": n, "name": f"net {n}", "cidr": f"10.0.{n}.0/24", "exclude": []} for n in range(1, 13)]
    page.route("**/api/v1/subnet?*", lambda route: route.fulfill(json={"subnets": subnets, "total": len(subnets)}))
    for path in ("subnets", "new"):
        page.goto(f"{stack.url}/app/{path}")
        page.get_by_label("Search subnets").fill("net 7")
        page.wait_for_url(f"**/app/{path}?q=net+7")  # the browser learns of it after the page
        page.reload()
        expect(page.get_by_label("Search subnets")).to_have_value("net 7")
        expect(page.get_by_text("10.0.7.0/24").first).to_be_visible()
        expect(page.get_by_text("10.0.8.0/24")).to_have_count(0)

    page.goto(f"{stack.url}/app/jobs/{finished}")
    answered = page.get_by_role("button", name="answered")
    answered.click()
    page.get_by_role("application").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.wait_for_url(f"**/app/jobs/{finished}?only=answered&at={NET}.1")
    page.reload()
    expect(page.locator(".cursor")).to_contain_text(f"{NET}.1 — answered, 2 ports open")
    expect(answered).to_have_attribute("aria-pressed", "true")

    page.goto(f"{stack.url}/app/jobs")
    page.get_by_role("button", name="pause").click()
    page.wait_for_url("**/app/jobs?paused=1")
    page.reload()
    expect(page.locator(".dot")).to_have_text("paused")
