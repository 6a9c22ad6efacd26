"""The page when answers are lost, cut off or late, when sessions end, and when clocks differ."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from local.nmap import OpenPorts
from local.stack import Stack
from tests.client import Client
from tests.page.conftest import SLOW, USER, watched
from tests.page.kit import VISIT, busy_stream, many_results, refuse

pytestmark = pytest.mark.e2e

# The bodies of answers whose path contains PART end too early as long as `cut` is set.
CUT_BODY = """
const whole = window.fetch;
window.cut = true;
window.fetch = async (path, options) => {
    const answer = await whole(path, options);
    if (!window.cut || !String(path).includes("PART")) return answer;
    return new Response(new ReadableStream({
        start(controller) {
            controller.enqueue(new TextEncoder().encode("{"));
            setTimeout(() => controller.error(new TypeError("network error")), 10);
        },
    }), answer);
};
"""
# The answers to the requests in `lost`, such as "POST /api/v1/task", are lost once each, after the requests have arrived.
LOSE_ANSWERS = """
const arriving = window.fetch;
window.lost = [];
window.fetch = async (path, options) => {
    const answer = await arriving(path, options);
    const index = window.lost.indexOf(`${options?.method} ${path}`);
    if (index < 0) return answer;
    window.lost.splice(index, 1);
    throw new TypeError("network error");
};
"""
# Longer than the page waits between two loads of the ledger.
SLOW_LEDGER = """
const real = window.fetch;
window.fetch = async (path, options) => {
    if (String(path).includes("/ledger?")) await new Promise((resolve) => setTimeout(resolve, 3000));
    return real(path, options);
};
"""
HIDE = """(state) => {
    Object.defineProperty(document, "visibilityState", { get: () => state, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""
# Counts the renderings of new text, and those that change a live region.
COUNT_ANNOUNCEMENTS = """
window.shown = window.announced = 0;
new MutationObserver((changes) => {
    window.shown++;
    if (changes.some(({ target }) => (target.closest ? target : target.parentElement)?.closest("[role=status]"))) window.announced++;
}).observe(document, { childList: true, characterData: true, subtree: true });
"""


def subnets(user: Client) -> list[dict[str, Any]]:
    """Return the user's newest subnets, newest first."""
    found: list[dict[str, Any]] = user.http.get("/api/v1/subnet", params={"page_size": 100}).json()["subnets"]
    return found


def test_page_gateway_restarted_says_so_and_recovers(page: Page, stack: Stack, user: Client) -> None:
    """While the gateway is unavailable the page shows that the connection is lost; then it recovers without user action."""
    page.goto(f"{stack.url}/app/jobs")
    expect(page.locator(".dot")).to_have_text("live")
    stack.stop("api-gateway")
    expect(page.locator(".dot")).to_have_text("connection lost, trying again")
    expect(page.get_by_role("alert")).to_contain_text("The connection to Scanfleet is lost.")
    stack.start("api-gateway")
    stack.wait_until_ready()
    expect(page.locator(".dot")).to_have_text("live")
    expect(page.get_by_role("alert")).to_have_count(0)
    job_id = user.scan("127.44.10.0/30", ports="8022", preset="quick")
    expect(page.get_by_role("row", name=re.compile(rf"^{job_id} .*completed"))).to_be_visible()


def test_page_session_after_its_end_asks_again_and_keeps_input(page: Page, stack: Stack) -> None:
    """When the session has ended the page shows a sign-in dialog above the form, and keeps its content."""
    page.goto(f"{stack.url}/app/subnets/new")
    page.get_by_label("Network").fill("127.44.11.0/24")
    page.get_by_label("Name").fill("typed before")
    page.context.clear_cookies()
    page.get_by_role("button", name="Save").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Your session has ended")
    expect(dialog.get_by_role("link", name="Sign in with")).to_have_attribute("target", "_blank")
    for _ in range(3):
        page.keyboard.press("Escape")
        expect(dialog).to_be_visible()
    dialog.get_by_label("Token").fill(stack.token(USER, admin=True))
    dialog.get_by_role("button", name="Sign in").click()
    expect(dialog).to_have_count(0)
    assert page.url == f"{stack.url}/app/subnets/new"
    expect(page.get_by_label("Name")).to_have_value("typed before")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("row", name="typed before")).to_be_visible()


def test_page_session_of_another_user_loads_the_page_again(page: Page, stack: Stack) -> None:
    """When another tab has signed in as another user, no data of the former user stays."""
    page.goto(f"{stack.url}/app/subnets/new")
    page.get_by_label("Name").fill("of the former user")
    headers = {"Authorization": f"Bearer {stack.token(9)}"}
    page.evaluate("async (headers) => (await fetch('/api/v1/session', { method: 'POST', headers })).status", headers)
    page.evaluate(HIDE, "visible")
    expect(page.get_by_text("user 9")).to_be_visible()
    expect(page.get_by_label("Name")).to_have_value("")


def test_page_start_that_fails_can_be_tried_again(page: Page, stack: Stack) -> None:
    """While the gateway cannot identify the user, the page shows the gateway's error instead of an empty page."""
    page.route("**/api/v1/me", refuse)
    page.goto(f"{stack.url}/app/jobs")
    expect(page.get_by_role("alert")).to_contain_text("the service is unavailable")
    page.unroute("**/api/v1/me")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_page_proxy_without_gateway_is_a_lost_connection(
    page: Page, stack: Stack, user: Client, finished: int, servers: OpenPorts
) -> None:
    """A proxy's own 502 is a lost connection; when it is back all is loaded again, and no older state is shown."""
    task = user.finished(finished)
    late = task | {"status": task["status"] | {"status": "running"}}
    page.route(f"**/api/v1/task/{finished}", lambda route: route.fulfill(json=late))
    page.goto(f"{stack.url}/app/jobs/{finished}/request")
    completed = page.get_by_role("heading", name=f"Job {finished} completed")
    expect(completed).to_be_visible()  # by the stream
    page.route("**/api/v1/**", lambda route: route.fulfill(status=502, body="<h1>Bad Gateway</h1>"))
    page.evaluate(VISIT, f"/app/jobs/{finished}/results")
    expect(page.get_by_role("alert").filter(has_text="The connection to Scanfleet is lost.")).to_be_visible()
    with page.expect_response(lambda answer: answer.status == 200 and answer.url.endswith(f"/task/{finished}")):
        page.unroute("**/api/v1/**")
    expect(page.get_by_text(f"{len(servers)} of {len(servers)} results")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(completed).to_be_visible()


def test_page_hidden_tab_has_no_stream(page: Page, stack: Stack) -> None:
    """A hidden tab closes its stream, of which a browser has few, and opens it when it is shown again."""
    page.goto(f"{stack.url}/app/jobs")
    expect(page.locator(".dot")).to_have_text("live")
    page.evaluate(HIDE, "hidden")
    expect(page.locator(".dot")).to_have_text("")
    page.evaluate(HIDE, "visible")
    expect(page.locator(".dot")).to_have_text("live")


def test_page_busy_job_shows_a_slow_ledger(page: Page, stack: Stack, user: Client, finished: int) -> None:
    """A ledger is shown although it loads more slowly than the job's states arrive."""
    task = user.finished(finished)
    late = task | {"status": task["status"] | {"status": "running"}}
    page.route(f"**/api/v1/task/{finished}", lambda route: route.fulfill(json=late))
    page.add_init_script(SLOW_LEDGER + busy_stream(late))
    page.goto(f"{stack.url}/app/jobs/{finished}")
    expect(page.get_by_text("probes accounted for")).to_be_visible()


def test_page_busy_job_with_a_slow_stream_of_results_updates_its_ledger(
    page: Page, stack: Stack, user: Client, finished: int
) -> None:
    """The ledger of a running job is loaded again while its results are still being sent."""
    task = user.finished(finished)
    running = task | {"status": task["status"] | {"status": "running"}}
    page.route(f"**/api/v1/task/{finished}", lambda route: route.fulfill(json=running))
    page.route("**/results?fields=*", lambda _route: None)
    page.add_init_script(busy_stream(running))
    page.goto(f"{stack.url}/app/jobs/{finished}/results")
    expect(page.get_by_text("Loading results…")).to_be_visible()
    for _ in range(2):
        with page.expect_request("**/ledger?*"):
            pass


def test_page_ledger_from_before_the_end_is_loaded_again(page: Page, stack: Stack, user: Client, finished: int) -> None:
    """A ledger that was read just before the job ended is replaced, although an ended job has no stream."""
    early = user.ledger(finished) | {"status": "running", "accounted": False}
    page.route("**/ledger?*", lambda route: route.fulfill(json=early), times=1)
    page.goto(f"{stack.url}/app/jobs/{finished}")
    expect(page.get_by_text("✓ accounted for")).to_be_visible()


def test_page_results_go_on_after_an_error(page: Page, stack: Stack, finished: int, servers: OpenPorts) -> None:
    """Results that were unavailable are requested again, without a click."""
    page.route("**/results?fields=*", refuse, times=1)
    page.goto(f"{stack.url}/app/jobs/{finished}/results")
    expect(page.get_by_text(f"{len(servers)} of {len(servers)} results")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize("minutes", [10, -10], ids=["ahead", "behind"])
def test_page_session_is_refreshed_by_the_gateways_clock(page: Page, stack: Stack, user: Client, minutes: int) -> None:
    """A token of five minutes is replaced once, a minute before its end, although the browser's clock is ten minutes wrong."""
    found = user.http.get("/api/v1/me").json()
    assert "date" in user.http.get("/api/v1/me").headers
    life = timedelta(minutes=5)
    ends = datetime.now(UTC) + life
    refreshed = 0

    def me(route: Route) -> None:
        date = format_datetime(datetime.now(UTC), usegmt=True)
        route.fulfill(json=found | {"expires_at": ends.isoformat()}, headers={"Date": date})

    def refresh(route: Route) -> None:
        nonlocal ends, refreshed
        refreshed += 1
        ends += life
        route.fulfill(status=204)

    page.route("**/api/v1/me", me)
    page.route("**/api/v1/session/refresh", refresh)
    page.clock.install(time=datetime.now(UTC) + timedelta(minutes=minutes))
    page.goto(f"{stack.url}/app/subnets")
    expect(page.get_by_role("heading", name="Subnets")).to_be_visible()
    page.clock.fast_forward("03:30")
    page.evaluate(VISIT, "/app/policies")
    assert refreshed == 0
    with page.expect_response("**/api/v1/session/refresh"):
        page.clock.fast_forward("00:40")
    with page.expect_response("**/api/v1/me"):
        pass
    page.evaluate(VISIT, "/app/subnets")
    assert refreshed == 1


def test_page_cut_body_is_a_lost_connection(page: Page, stack: Stack) -> None:
    """An answer whose body is cut off is a lost connection, and is loaded again without a click."""
    page.add_init_script(CUT_BODY.replace("PART", "/subnet?"))
    page.goto(f"{stack.url}/app/subnets")
    expect(page.get_by_role("alert").filter(has_text="Scanfleet cannot be reached.")).to_be_visible()
    expect(page.get_by_role("alert").filter(has_text="The connection to Scanfleet is lost.")).to_be_visible()
    page.evaluate("window.cut = false")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_role("link", name="New subnet")).to_be_visible()


def test_page_body_that_is_always_cut_is_requested_rarely(page: Page, stack: Stack, finished: int) -> None:
    """An answer that is cut off each time, unlike the others, is requested again with the backoff of a lost connection."""
    page.add_init_script(CUT_BODY.replace("PART", "/map"))
    asked: list[float] = []
    page.on("request", lambda each: asked.append(time.monotonic()) if "/map" in each.url else None)
    page.goto(f"{stack.url}/app/jobs/{finished}")
    while len(asked) < 4:
        with page.expect_request("**/map*"):
            pass
    assert asked[3] - asked[0] > 3  # 0.5 s, 1 s and 2 s


def test_page_token_that_no_header_can_hold_is_refused_in_the_page(browser: Browser, stack: Stack) -> None:
    """A token with an invisible character is rejected in the page with its reason, without a request."""
    with browser.new_context() as context, watched(context, stack.url) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.method))
        page.goto(f"{stack.url}/app/jobs")
        page.get_by_label("Token").fill(f"{stack.token(USER)}\u200b")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text("The token has a space, a line break or another character")
        expect(page.get_by_role("alert").filter(has_text="The connection to Scanfleet is lost.")).to_have_count(0)
    assert "GET" in asked
    assert "POST" not in asked


def test_page_job_deleted_without_its_stream_is_reported(page: Page, stack: Stack, user: Client) -> None:
    """A job that was deleted while its stream was closed is reported as missing, and its stream is not opened again."""
    job_id = user.scan("127.44.10.0/24", **SLOW)
    page.goto(f"{stack.url}/app/jobs/{job_id}")
    expect(page.locator(".dot")).to_have_text("live")
    page.evaluate(HIDE, "hidden")
    user.cancel(job_id)
    user.finished(job_id)
    user.http.delete(f"/api/v1/task/{job_id}").raise_for_status()
    page.evaluate(HIDE, "visible")
    expect(page.get_by_role("alert")).to_contain_text("Job not found")
    expect(page.locator(".dot")).to_have_count(0)


def test_page_growing_results_are_announced_rarely(page: Page, stack: Stack, finished: int) -> None:
    """While results stream in, the page shows each portion, and its live regions change at most twice."""
    page.add_init_script(many_results(64, portion=1, pause=40) + COUNT_ANNOUNCEMENTS + "window.held = true;")
    page.goto(f"{stack.url}/app/jobs/{finished}/results")
    expect(page.get_by_text(re.compile("[1-9] of [1-9] results"))).to_be_visible()
    page.evaluate("window.shown = window.announced = 0; window.held = false")
    expect(page.get_by_text("64 of 64 results")).to_be_visible()
    expect(page.get_by_role("status").filter(has_text="Results: 64 of 64")).to_have_count(1)
    assert page.evaluate("[shown >= 4, announced <= 2]") == [True, True]


def test_page_stops_at_its_maximum_of_results(page: Page, stack: Stack, user: Client, finished: int) -> None:
    """The page keeps 250,000 results of a job, also when it is loaded again after the maximum was reached."""
    task = user.finished(finished)
    running = task | {"status": task["status"] | {"status": "running"}}
    page.route(f"**/api/v1/task/{finished}", lambda route: route.fulfill(json=running))
    page.add_init_script(many_results(260_000, portion=10_000) + busy_stream(running))
    page.goto(f"{stack.url}/app/jobs/{finished}/results")
    expect(page.get_by_text("the page stops at 250,000")).to_be_visible()
    page.unroute(f"**/api/v1/task/{finished}")
    page.evaluate(
        "task => window.stream.dispatchEvent(new MessageEvent('completed', { data: task }))", json.dumps(task)
    )
    expect(page.get_by_role("heading", name=f"Job {finished} completed")).to_be_visible()
    page.evaluate("() => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 60)))")
    assert page.evaluate("window.streams") == 1
    expect(page.get_by_text("the page stops at 250,000")).to_be_visible()


def test_page_estimate_that_fails_has_its_request_id(page: Page, stack: Stack) -> None:
    """An error of the estimate is shown with its request id, whether or not it names a field; unfinished text is not sent."""
    page.goto(f"{stack.url}/app/new")
    page.get_by_label("Another network").fill("127.44.8.1/24")
    expect(page.locator(".field", has=page.get_by_label("Another network")).locator(".wrong")).to_contain_text(
        "host bits"
    )
    expect(page.get_by_role("alert")).to_contain_text(re.compile("request [0-9a-f]{32}"))
    page.route("**/api/v1/task/estimate", refuse)
    page.get_by_label("Another network").fill("127.44.8.1")
    expect(page.get_by_role("alert")).to_contain_text("the service is unavailable")
    page.unroute("**/api/v1/task/estimate")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_text("1 address × 1,000 ports")).to_be_visible()
    page.get_by_label("Ports").fill("8000-9")
    expect(page.get_by_role("status").filter(has_text="1 job")).to_have_text("1 job")
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize(
    ("network", "again"), [("127.44.19.0/24", ".7"), ("127.44.20.0/24", ".8")], ids=["same", "changed"]
)
def test_page_creation_after_a_lost_answer_changes_no_object(
    page: Page, stack: Stack, user: Client, network: str, again: str
) -> None:
    """A subnet whose creation was not answered is created once when it is saved again, but twice with other values."""
    elsewhere = user.subnet(network)
    page.add_init_script(LOSE_ANSWERS)
    page.goto(f"{stack.url}/app/subnets/new")
    page.get_by_label("Network").fill(network)
    first, second = (network.replace(".0/24", end) for end in (".7", again))
    page.get_by_label("Exclude").fill(first)
    page.evaluate("window.lost.push('POST /api/v1/subnet')")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("alert").filter(has_text="Scanfleet cannot be reached.")).to_be_visible()
    page.get_by_label("Exclude").fill(second)
    page.get_by_role("button", name="Save").click()
    made = list(dict.fromkeys((first, second)))
    expect(page.get_by_role("row", name=network)).to_have_count(1 + len(made))
    *new, old = [each for each in subnets(user) if each["cidr"] == network]
    assert (old["id"], old["exclude"]) == (elsewhere, [])
    assert [each["exclude"] for each in reversed(new)] == [[f"{each}/32"] for each in made]


def test_page_scan_after_a_lost_subnet_answer_keeps_its_objects(page: Page, stack: Stack, user: Client) -> None:
    """A scan whose subnet and policy were not answered creates them once, and a later scan of another network its own."""
    page.add_init_script(LOSE_ANSWERS)

    def start(network: str, *lost: str) -> None:
        page.get_by_label("Another network").fill(network)
        page.get_by_label("Preset").select_option("quick")
        page.get_by_label("Ports").fill("8021, 8024")
        for each in lost:
            page.evaluate("each => window.lost.push(each)", each)
            page.get_by_role("button", name="Start").click()
            expect(page.get_by_role("alert").filter(has_text="Scanfleet cannot be reached.")).to_be_visible()
            expect(page.get_by_role("button", name="Start")).to_be_enabled()
            assert page.evaluate("window.lost") == []
        page.get_by_role("button", name="Start").click()
        expect(page.get_by_role("heading", name=re.compile(r"Job \d+"))).to_be_visible()

    page.goto(f"{stack.url}/app/new")
    start("127.44.12.5", "POST /api/v1/subnet", "POST /api/v1/policy")
    first = subnets(user)[0]
    page.evaluate(VISIT, "/app/new")
    start("127.44.12.6")
    second, *others = subnets(user)
    assert (second["cidr"], first["cidr"], others[0]) == ("127.44.12.6/32", "127.44.12.5/32", first)
    assert [each["name"] for each in others].count("127.44.12.5") == 1
    policies = user.http.get("/api/v1/policy", params={"page_size": 100}).json()["policies"]
    assert [each["name"] for each in policies].count("quick: 8021, 8024") == 1


def test_page_text_typed_during_a_failing_save_stays(page: Page, stack: Stack, user: Client) -> None:
    """Input that is typed while a save fails stays in the form, and the next save sends it."""
    policy_id = user.policy(name="typed meanwhile", preset="quick")
    saves: list[Route] = []
    page.goto(f"{stack.url}/app/policies/{policy_id}")
    page.get_by_label("Ports").fill("8022")
    page.route(f"**/api/v1/policy/{policy_id}", lambda route: saves.append(route))  # noqa: PLW0108 # Playwright sets an attribute of the handler
    with page.expect_request(f"**/api/v1/policy/{policy_id}"):
        page.get_by_role("button", name="Save").click()
    page.get_by_label("Ports").fill("8023")
    refuse(saves.pop())
    expect(page.get_by_role("alert")).to_contain_text("the service is unavailable")
    expect(page.get_by_label("Ports")).to_have_value("8023")
    page.unroute(f"**/api/v1/policy/{policy_id}")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("row", name="typed meanwhile")).to_contain_text("8023")


def test_page_replacement_after_a_lost_answer_is_no_conflict(page: Page, stack: Stack, user: Client) -> None:
    """A policy whose replacement was not answered can be changed further and saved: its later version is the page's own."""
    policy_id = user.policy(name="answered late", preset="quick")
    page.add_init_script(LOSE_ANSWERS)
    page.goto(f"{stack.url}/app/policies/{policy_id}")
    page.get_by_label("Ports").fill("8022")
    page.evaluate("path => window.lost.push(`PUT ${path}`)", f"/api/v1/policy/{policy_id}")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("alert").filter(has_text="Scanfleet cannot be reached.")).to_be_visible()
    page.get_by_label("Ports").fill("8023")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("row", name="answered late")).to_contain_text("8023")


def test_page_scan_after_a_lost_answer_is_started_once(page: Page, stack: Stack, user: Client) -> None:
    """A scan form that is sent again starts no second job; changed, it starts further jobs only after a notice."""
    refusal = "was sent before with other values, and has created jobs"
    page.add_init_script(LOSE_ANSWERS)
    subnet_id = user.subnet("127.44.12.3")

    def start(ports: str, *, lost: bool = False) -> None:
        page.get_by_label("Ports").fill(ports)
        if lost:
            page.evaluate("window.lost.push('POST /api/v1/task')")
        page.get_by_role("button", name="Start").click()

    def jobs() -> int:
        total: int = user.http.get("/api/v1/task", params={"subnet_id": subnet_id}).json()["total"]
        return total

    page.goto(f"{stack.url}/app/new?subnet={subnet_id}")
    start("8021", lost=True)
    expect(page.get_by_role("alert").filter(has_text="Scanfleet cannot be reached.")).to_be_visible()
    start("8022")
    expect(page.get_by_role("alert").filter(has_text=refusal)).to_be_visible()
    start("8021")
    expect(page.get_by_role("heading", name=re.compile(r"Job \d+"))).to_be_visible()
    assert jobs() == 1

    page.goto(f"{stack.url}/app/new?subnet={subnet_id}")
    start("8021", lost=True)
    expect(page.get_by_role("alert").filter(has_text="Scanfleet cannot be reached.")).to_be_visible()
    start("8022")
    expect(page.get_by_role("alert").filter(has_text=refusal)).to_be_visible()
    assert jobs() == 2
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("heading", name=re.compile(r"Job \d+"))).to_be_visible()
    assert jobs() == 3
