"""Scripts and routes that tests of the page share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from playwright.sync_api import Route

# In place of the server's answer: to stream so much through the driver would take longer than the test. RESULTS are in all, and
# PORTION at once; each further portion waits for PAUSE ms. The requests are counted.
MANY_RESULTS = """
const real = window.fetch;
const result = (n) => JSON.stringify({
    id: n + 1, ip_address: `10.${20 + (n >> 16)}.${(n >> 8) & 255}.${n & 255}`, port: [22, 80, 443, 8080][n % 4], protocol: "tcp",
    service: ["ssh", "http", "https", "http-proxy"][n % 4], version: "nginx 1.22.1", os_info: "", banner: "", status: "open" }) + "\\n";
window.streams = 0;
window.fetch = (path, options) => {
    if (!String(path).includes("/results?fields=id,")) return real(path, options);
    window.streams++;
    let sent = 0;
    return Promise.resolve(new Response(new ReadableStream({
        async pull(controller) {
            if (sent && PAUSE) await new Promise((resolve) => setTimeout(resolve, PAUSE));
            while (sent && window.held) await new Promise((resolve) => setTimeout(resolve, 20));
            if (sent >= RESULTS) return controller.close();
            let lines = "";
            for (const end = sent + PORTION; sent < end; sent++) lines += result(sent);
            controller.enqueue(new TextEncoder().encode(lines));
        },
    })));
};
"""
# Ends when the loads of the page, which begin after its first frame, are counted in `data-busy`.
VISIT = """async (to) => {
    history.pushState(null, "", to);
    dispatchEvent(new PopStateEvent("popstate"));
    await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 60)));
}"""
# In place of the server's stream: the state TASK twice a second.
BUSY_STREAM = """
window.EventSource = class extends EventTarget {
    constructor() {
        super();
        window.stream = this;
        this.timer = setInterval(() => this.dispatchEvent(new MessageEvent("running", { data: TASK })), 500);
    }
    close() {
        clearInterval(this.timer);
    }
};
"""


def many_results(results: int, *, portion: int = 500, pause: int = 0) -> str:
    """Return the script that answers with so many results, in portions with pauses of so many ms."""
    given = {"RESULTS": results, "PORTION": portion, "PAUSE": pause}
    return re.sub("RESULTS|PORTION|PAUSE", lambda found: str(given[found[0]]), MANY_RESULTS)


def busy_stream(task: Mapping[str, object]) -> str:
    """Return the script that replaces streams by one that repeats the state of this task."""
    return BUSY_STREAM.replace("TASK", json.dumps(json.dumps(task)))


def refuse(route: Route) -> None:
    route.fulfill(status=503, json={"error": "the service is unavailable; try again"})
