"""Hostile requests to a running platform are rejected without effect, and recorded in the audit log."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest

from local import nmap, ports
from local.stack import Stack
from local.tokens import AUDIENCE, ISSUER
from local.wait import until
from tests.client import Client

pytestmark = [pytest.mark.e2e, pytest.mark.proves("G15")]

Callers = Callable[[int], Client]
Audited = Callable[[str], dict[str, Any]]
Calls = Callable[[], list[list[str]]]

INJECTIONS = (
    "-oN /tmp/scanfleet-injected",
    "127.0.0.1 -oN /tmp/scanfleet-injected",
    "127.0.0.1,--script,x",
    "$(touch /tmp/scanfleet-injected)",
    "`touch /tmp/scanfleet-injected`",
    "127.0.0.1\n-oN /tmp/scanfleet-injected",
    "127.0.0.1\u0000",
    "127.0.0.1;id",
    "--",
    "-iL/etc/passwd",
    "\u0661\u0662\u0667.0.0.1",
    "\uff11\uff12\uff17.0.0.1",
)
INJECTED = Path("/tmp/scanfleet-injected")  # noqa: S108 # the file that the injections try to create

_OPTION = re.compile(
    r"-(v|n|oX|6|Pn|sT|sS|sU|p|sV|O|T[0-5])|--(datadir|stats-every|privileged|unprivileged|top-ports|version-intensity|script"
    r"|min-rate|max-rate|max-rtt-timeout|max-retries|host-timeout|min-hostgroup|max-hostgroup)",
)
"""Every option that may be passed to nmap."""

# A trial run sends no packet: it lists a target, and then the scripts. Any other call names its targets after `--`.
TRIAL = ["-n", "-sL", "-oX", "-", "127.0.0.1"]
LIST_OF_SCRIPTS = ["-oX", "-", "--script-help"]


def refused(answer: httpx2.Response, status: int, what: str = "") -> str:
    """Check that the response is a rejection of `what` in the common format; return the request id."""
    assert answer.status_code == status, (what, answer.request.url, answer.text)
    assert set(answer.json()) == {"error"}
    return answer.headers["X-Request-ID"]


def subnet(**changed: Any) -> dict[str, Any]:
    return {"name": "abuse", "cidr": "127.9.8.0/30"} | changed


def policy(**changed: Any) -> dict[str, Any]:
    return {"name": "abuse", "preset": "quick", "ports": "8022"} | changed


@pytest.mark.proves("A1", "G12")
def test_network_injection_is_rejected(caller: Callers, audited: Audited) -> None:
    """An invalid network or exclusion is a 400 by the target rules, and creates no file."""
    http = caller(11).http
    bodies = [body for text in INJECTIONS for body in (subnet(cidr=text), subnet(exclude=[text]))]
    for id_ in [refused(http.post("/api/v1/subnet", json=body), 400) for body in bodies]:
        entry = audited(id_)
        assert (entry["subject"], entry["action"], entry["decision"]) == ("11", "create_subnet", "refused")
        assert (entry["rule"], entry["request_id"]) == ("targets", id_)
    assert not INJECTED.exists()


POLICIES: dict[str, Any] = {
    **{f"ports {text!a}": policy(ports=text) for text in INJECTIONS},
    **{f"scripts {text!a}": policy(scripts=[text]) for text in INJECTIONS},
    "scripts with arguments": policy(scripts=["banner --script-args x=y"]),
    "a script's path": policy(scripts=["./x.nse"]),
    "an expression of scripts": policy(scripts=["not intrusive"]),
    "timing": policy(timing="4 -oN x"),
    "timing beyond": policy(timing=6),
    "rate": policy(max_rate="1 -oN x"),
    "rate of nothing": policy(max_rate=0),
    "retries": policy(max_retries=11),
    "host timeout": policy(host_timeout="1s -oN x"),
    "technique": policy(technique="-sS"),
    "a thousand scripts": policy(scripts=["banner"] * 1_000),
    "seven thousand ports": policy(ports=",".join(["1"] * 7_000)),
    "a port beyond": policy(ports="65536"),
    "ports by name": policy(ports="http*"),
    "arguments": policy(arguments="-oN x"),
}


LARGE_POLICIES: dict[str, Any] = {
    "a hundred thousand scripts": policy(scripts=["banner"] * 100_000),
    "a hundred thousand ports": policy(ports=",".join(["1"] * 100_000)),
}


@pytest.mark.proves("A2", "G12")
def test_policy_injection_is_rejected(caller: Callers, audited: Audited) -> None:
    """A policy with an unknown word or too many words is a 400; one that is too large is a 413."""
    http = caller(12).http
    asked = [refused(http.post("/api/v1/policy", json=body), 400, what) for what, body in POLICIES.items()]
    asked += [refused(http.post("/api/v1/policy", json=body), 413, what) for what, body in LARGE_POLICIES.items()]
    for id_ in asked:
        entry = audited(id_)
        assert (entry["action"], entry["rule"]) == ("create_policy", "request")
    assert not INJECTED.exists()


@pytest.mark.proves("A1", "A2", "G12")
def test_nmap_arguments_are_on_the_allow_list(caller: Callers, nmap_calls: Calls) -> None:
    """For all requests nmap gets only options of the allow-list, and canonical addresses after `--`."""
    user = caller(13)
    before = len(nmap_calls())
    job = user.scan(
        "127.9.8.0/30",
        preset="quick",
        ports="T:8022,8080-8081",
        scripts=["banner"],
        service_detection=True,
        version_intensity=1,
        timing=4,
        max_rate=1000,
        max_retries=1,
        host_timeout=60,
    )
    assert user.finished(job)["status"]["status"] == "completed"
    calls = nmap_calls()[before:]
    assert {call[0] for call in calls} == {"--datadir"}
    made = [call for call in calls if call[2:] != TRIAL and call[2:-1] != LIST_OF_SCRIPTS]
    assert made
    for call in made:
        split = call.index("--")
        for target in call[split + 1 :]:
            assert str(ipaddress.ip_network(target)) in (target, f"{target}/32")
        assert call[call.index("-oX") + 1] == "-"
        for word in set(call[:split]) - {"-"}:
            assert not word.startswith("-") or _OPTION.fullmatch(word), word


INFRASTRUCTURE = (
    "169.254.169.254",
    "169.254.0.0/16",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::/48",
    "fd00:ec2::254",
    "fe80::1",
    "224.0.0.1",
    "0.0.0.0",
    "255.255.255.255",
    "10.0.0.1",
    "::ffff:10.0.0.1",
    "100.100.100.200",
)


@pytest.mark.proves("A3", "G12")
def test_infrastructure_targets_are_rejected(caller: Callers, audited: Audited) -> None:
    """Metadata services and networks that are not allowed are a 400 in every notation, with the input in the audit log."""
    http = caller(14).http
    asked = {cidr: refused(http.post("/api/v1/subnet", json=subnet(cidr=cidr)), 400, cidr) for cidr in INFRASTRUCTURE}
    for cidr, id_ in asked.items():
        entry = audited(id_)
        assert (entry["rule"], entry["target"], entry["source"]) == ("targets", cidr, "127.0.0.1")


SPELLINGS = (
    *("127.1", "0x7f000001", "2130706433", "010.0.0.1", "127.0.0.1/33", "127.9.8.0/24-5", "127.9.8.1-5"),
    *("localhost", "", "127.9.8.1/255.255.255.252", "127.9.8.1/30", " 127.9.8.1"),
)


@pytest.mark.proves("A4")
def test_ambiguous_addresses_are_rejected(caller: Callers, audited: Audited) -> None:
    """An ambiguous notation of an address is a 400."""
    http = caller(15).http
    for id_ in [refused(http.post("/api/v1/subnet", json=subnet(cidr=cidr)), 400, cidr) for cidr in SPELLINGS]:
        assert audited(id_)["rule"] == "targets"


SENSELESS = {
    "too large": subnet(cidr="127.0.0.0/8"),
    "all excluded": subnet(exclude=["127.9.8.0/30"]),
    "all excluded in parts": subnet(exclude=["127.9.8.0/31", "127.9.8.2/31"]),
    "all excluded by a larger one": subnet(exclude=["127.9.0.0/16"]),
}


@pytest.mark.proves("A5")
def test_empty_or_oversized_targets_are_rejected(caller: Callers, audited: Audited) -> None:
    """A network that is too large or completely excluded is a 400."""
    http = caller(16).http
    for id_ in [refused(http.post("/api/v1/subnet", json=body), 400, what) for what, body in SENSELESS.items()]:
        assert audited(id_)["rule"] == "targets"


def forged(stack: Stack) -> Iterator[tuple[str, str]]:
    """Yield almost valid tokens, with their defect."""
    private = (stack.folder / "jwt" / "private.pem").read_bytes()
    public = (stack.folder / "jwt" / "public.pem").read_bytes()
    now = int(time.time())
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "17", "iat": now, "exp": now + 300}

    def signed(changed: dict[str, Any], headers: dict[str, Any] | None = None) -> str:
        claims = {name: value for name, value in (good | changed).items() if value is not None}
        return jwt.encode(claims, private, algorithm="ES256", headers=headers)

    yield "expired", signed({"iat": now - 400, "exp": now - 100})
    yield "not yet", signed({"nbf": now + 300})
    yield "without expiry", signed({"exp": 10**30})
    yield "another issuer", signed({"iss": "elsewhere"})
    yield "another audience", signed({"aud": "elsewhere"})
    yield "other audiences", signed({"aud": ["elsewhere", "and there"]})
    for claim in ("exp", "iat", "iss", "aud", "sub"):
        yield f"no {claim}", signed({claim: None})
    yield "a user that is none", signed({"sub": "17; drop"})
    yield "fourteen kilobytes", signed({"x": "x" * 10_500})
    yield "bound to a key", signed({"cnf": {"jkt": "x"}})
    yield "a logout token", signed({}, {"typ": "logout+jwt"})
    yield "an event", signed({"events": {"http://schemas.openid.net/event/backchannel-logout": {}}})
    for header, value in (
        ("jku", "http://127.0.0.1/"),
        ("crit", ["x"]),
        ("x5u", "http://127.0.0.1/"),
        ("jwk", {"kty": "oct"}),
    ):
        yield header, signed({}, {header: value})
    yield "none", jwt.encode(good, None, algorithm="none")  # type: ignore[arg-type] # no key is the point
    yield "another key", jwt.encode(good, "x" * 32, algorithm="HS256")
    encoded = signed({}).split(".")
    hs256 = jwt.utils.base64url_encode(b'{"alg":"HS256","typ":"JWT"}').decode()
    yield (
        "its public key as a secret",
        jwt.api_jws.PyJWS(algorithms=["HS256"]).encode(json.dumps(good).encode(), public[26:90], "HS256"),
    )
    yield "another header", f"{hs256}.{encoded[1]}.{encoded[2]}"
    yield "deep", f"{jwt.utils.base64url_encode(b'[' * 3_000).decode()}.e30.x"
    yield "junk", "a.b.c"
    yield "no dots", "junk"


@pytest.mark.proves("A7", "A28", "G14")
def test_forged_tokens_return_401(stack: Stack, audited: Audited) -> None:
    """Every token that the issuer did not sign for this audience is a 401, never a 500, and is in no audit entry."""
    tokens = dict(forged(stack))
    with httpx2.Client(base_url=stack.url) as http:
        answers = {
            flaw: http.get("/api/v1/task", headers={"Authorization": f"Bearer {token}"})
            for flaw, token in tokens.items()
        }
    for flaw, answer in answers.items():
        entry = audited(refused(answer, 401, flaw))
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert (entry["subject"], entry["rule"], entry["action"]) == ("", "token", "list_tasks")
        assert entry["reason"]
        assert tokens[flaw] not in json.dumps(entry)


@pytest.mark.proves("A28", "G14")
def test_revoked_token_returns_401_within_seconds(stack: Stack, caller: Callers, audited: Audited) -> None:
    """A revoked token is a 401 within five seconds, another user's token is accepted, and no user may revoke."""
    bearer = {"Authorization": f"Bearer {stack.token(34)}"}
    admin = {"Authorization": f"Bearer {stack.token(99, admin=True)}"}
    with httpx2.Client(base_url=stack.url) as http:
        assert http.get("/api/v1/task", headers=bearer).status_code == 200
        refused(http.post("/api/v1/revocation", json={"user_id": 34}, headers=bearer), 403)
        made = http.post("/api/v1/revocation", json={"user_id": 34}, headers=admin)
        assert made.status_code == 201
        assert audited(made.headers["X-Request-ID"])["decision"] == "allowed"
        until(lambda: http.get("/api/v1/task", headers=bearer).status_code == 401, 5, "the token to be refused")
        assert audited(refused(http.get("/api/v1/task", headers=bearer), 401))["reason"] == "token is revoked"
        assert caller(35).http.get("/api/v1/task").status_code == 200


@pytest.mark.proves("A7", "G14")
@pytest.mark.parametrize(
    ("service", "path"),
    [
        ("job-orchestrator", "/api/v1/task"),
        ("job-orchestrator", "/api/v1/audit"),
        ("job-orchestrator", "/internal/revocations"),
        ("result-store", "/api/v1/task/1/results"),
        ("result-store", "/api/v1/task/1/hosts"),
        ("result-store", "/internal/ready"),
    ],
)
def test_internal_services_reject_user_tokens(stack: Stack, service: str, path: str) -> None:
    """A valid user or administrator token is a 401 at the services behind the gateway."""
    headers = {"Authorization": f"Bearer {stack.token(99, admin=True)}"}
    refused(httpx2.get(f"http://{stack.ports.address(service)}{path}", headers=headers), 401)


@pytest.mark.proves("G15")
def test_first_use_of_each_key_is_in_the_audit_log(stack: Stack) -> None:
    """The oldest entries name the keys that sign the audit log and chunks, and the keys that verify tokens."""
    headers = {"Authorization": f"Bearer {stack.token(99, admin=True)}"}
    address = f"{stack.url}/api/v1/audit"
    total = httpx2.get(address, headers=headers).json()["total"]
    oldest = {"page": max(1, total // 100), "page_size": 100}  # and the page after it, if there is one
    pages = [
        httpx2.get(address, headers=headers, params=oldest | {"page": oldest["page"] + more}).json() for more in (0, 1)
    ]
    used = [
        each["target"].partition(": key ")[0]
        for page in pages
        for each in page["entries"]
        if each["action"] == "use_key"
    ]
    assert sorted(used) == [
        "signs chunks",
        "signs the audit log",
        "verifies the gateway's tokens",
        "verifies tokens of scanfleet-local",
    ]


def operations(stack: Stack) -> Iterator[tuple[str, str, dict[str, Any]]]:
    document = httpx2.get(f"{stack.url}/openapi.json").json()
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            yield verb.upper(), path, operation


OF_RESULTS = ("/results", "/hosts", "/nmap.xml")
"""Ends of the paths on which another user's job is a 403 instead of a 404."""

FOR_ADMINISTRATORS = ("/api/v1/audit", "/api/v1/revocation")
RESOURCES = {"subnet": subnet(name="taken"), "policy": policy(name="taken")}
"""The body of each resource."""

BODIES = {f"replace_{name}": body for name, body in RESOURCES.items()} | {
    "replace_subnet_retention": {"keep_results_days": 1},
}
"""Bodies of the requests with an id, by operation."""


@pytest.mark.proves("A10", "G13")
def test_other_users_resources_return_404(stack: Stack, caller: Callers, audited: Audited) -> None:
    """On every route with an id, user B gets 404 for user A's object, and nothing changes."""
    mine, theirs = caller(20), caller(21)
    subnet_id, policy_id = mine.subnet("127.9.8.0/30"), mine.policy(ports="8022", service_detection=False)
    (job,) = mine.submit([subnet_id], policy_id, key="mine")
    mine.finished(job["id"])
    ids = {"subnet_id": subnet_id, "policy_id": policy_id, "job_id": job["id"]}

    def seen() -> list[Any]:
        paths = (
            f"subnet/{subnet_id}",
            f"subnet/{subnet_id}/retention",
            f"policy/{policy_id}",
            f"task/{job['id']}",
            f"task/{job['id']}/results",
            f"task/{job['id']}/hosts",
            "subnet",
            "policy",
            "task",
        )
        return [mine.http.get(f"/api/v1/{path}").json() for path in paths]

    before = seen()
    tried = {}
    for method, path, operation in operations(stack):
        if "{" in path and not path.startswith(FOR_ADMINISTRATORS):
            answer = theirs.http.request(method, path.format(**ids), json=BODIES.get(operation["operationId"]))
            id_ = refused(answer, 403 if path.endswith(OF_RESULTS) else 404, f"{method} {path}")
            tried[operation["operationId"]] = id_, path.format(**ids).removesuffix("/cancel")
    assert len(tried) >= 10
    for action, (id_, target) in tried.items():
        entry = audited(id_)
        assert (entry["subject"], entry["action"], entry["rule"], entry["target"]) == ("21", action, "owner", target)
    for name, of in (("subnet", subnet_id), ("policy", policy_id)):
        body = {
            "subnet_ids": [of if name == "subnet" else theirs.subnet("127.9.8.0/30")],
            "policy_id": of if name == "policy" else theirs.policy(),
        }
        assert audited(refused(theirs.http.post("/api/v1/task", json=body), 400))["rule"] == "owner"
    for kind in ("subnets", "policies", "jobs"):
        path = {"subnets": "subnet", "policies": "policy", "jobs": "task"}[kind]
        assert {each["user_id"] for each in theirs.http.get(f"/api/v1/{path}").json()[kind]} <= {21}
    assert audited(refused(theirs.http.get("/api/v1/audit"), 403))["rule"] == "role"
    assert seen() == before


@pytest.mark.proves("A7", "A10", "G13")
def test_routes_without_token_return_401(stack: Stack, audited: Audited) -> None:
    """Every operation except the sign-in one answers 401 without a token, even with a malformed body."""
    asked = {}
    with httpx2.Client(base_url=stack.url, headers={"Content-Type": "application/json"}) as http:
        for method, path, operation in operations(stack):
            if path == "/api/v1/info":
                assert http.get(path).status_code == 200
                continue
            answer = http.request(method, re.sub(r"{\w+}", "1", path), content=b"{")
            asked[operation["operationId"]] = refused(answer, 401, f"{method} {path}")
    for action, id_ in asked.items():
        entry = audited(id_)
        assert (entry["action"], entry["rule"], entry["subject"]) == (action, "token", "")


EXTRA = ({"user_id": 1}, {"status": "completed"}, {"attempt": 9}, {"_id": 1}, {"$set": {"user_id": 1}}, {"id": 1})


@pytest.mark.proves("A11", "A12")
def test_unknown_body_fields_return_400(stack: Stack, caller: Callers, audited: Audited) -> None:
    """An unknown field is a 400 on every route that reads a body."""
    http = caller(22).http
    bodies = RESOURCES | {"task": {"subnet_ids": [1], "policy_id": 1}}
    asked = [
        refused(http.request(method, re.sub(r"{\w+}", "1", path), json=bodies[path.split("/")[3]] | extra), 400, path)
        for method, path, operation in operations(stack)
        if "requestBody" in operation and not path.startswith(FOR_ADMINISTRATORS)
        for extra in EXTRA
    ]
    assert len(asked) >= 5 * len(EXTRA)
    for id_ in asked:
        assert audited(id_)["rule"] == "request"


NOT_A_VALUE: dict[str, list[dict[str, Any]]] = {
    "subnet": [subnet(name={"$ne": ""}), subnet(cidr={"$gt": ""}), subnet(exclude={"$ne": 1})],
    "policy": [policy(name={"$ne": ""}), policy(ports={"$ne": ""}), policy(scripts={"$in": []})],
    "task": [
        {"subnet_ids": {"$ne": 0}, "policy_id": 1},
        {"subnet_ids": [{"$ne": 0}], "policy_id": 1},
        {"subnet_ids": [1], "policy_id": {"$ne": 0}},
    ],
}
NOT_A_QUERY = (
    *("status[$ne]=x", "status[$in][]=running", "status={$ne:1}", "page[$gt]=0", "page=$where", "page_size[]=1"),
    "$where=1",
)


@pytest.mark.proves("A12")
def test_mongodb_operators_are_rejected(caller: Callers, audited: Audited) -> None:
    """A MongoDB operator in a body, a query or a path is a 400 or a 404, and matches nothing."""
    http = caller(23).http
    asked = [
        refused(http.post(f"/api/v1/{kind}", json=body), 400, str(body))
        for kind, bodies in NOT_A_VALUE.items()
        for body in bodies
    ]
    asked += [refused(http.get(f"/api/v1/task?{query}"), 400, query) for query in NOT_A_QUERY]
    for id_ in asked:
        assert audited(id_)["rule"] == "request"
    assert http.get("/api/v1/task/$ne").status_code == 404


@pytest.mark.proves("A16", "G11")
def test_slow_and_idle_connections_do_not_affect_others(stack: Stack, caller: Callers) -> None:
    """Hundreds of idle or endless requests of one user are bounded and do not affect other users."""
    host, port = stack.ports.address("api-gateway").split(":")
    slow = (
        f"POST /api/v1/subnet HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {stack.token(24)}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    ).encode()
    with ExitStack() as opened:
        for _ in range(200):
            opened.enter_context(socket.create_connection((host, int(port))))
        senders = [opened.enter_context(socket.create_connection((host, int(port)))) for _ in range(200)]
        for sender in senders:
            sender.settimeout(60)
            sender.sendall(slow)
        until(lambda: caller(24).http.get("/api/v1/task").status_code == 429, 30, "the slow user's places to be taken")
        other = caller(25)
        job = other.scan("127.9.8.0/30", ports="8022", service_detection=False)
        assert other.finished(job)["status"]["status"] == "completed"
        answers = [sender.recv(65_536).split(b" ", 2)[1] for sender in senders]
    assert set(answers) == {b"408", b"429"}
    assert answers.count(b"408") == 64
    until(lambda: caller(24).http.get("/api/v1/task").status_code == 200, 30, "the slow user's places to be free")


@pytest.mark.proves("A17")
def test_logs_are_json_lines_without_tokens(stack: Stack, caller: Callers) -> None:
    """For any header and path, every log line is one JSON object, and no log contains a token."""
    token = stack.token(26)
    host, port = stack.ports.address("api-gateway").split(":")
    for header in (
        b'X-Request-ID: a\n{"forged": 1}',
        b'traceparent: 00-x\r\n {"forged": 1}',
        b"User-Agent: \x1b[2J\x00",
    ):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(
                b"GET /api/v1/task/%0a%7b%22forged%22%3a1%7d HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer "
                + token.encode()
                + b"\r\n"
                + header
                + b"\r\n\r\n"
            )
            while raw.recv(65_536):
                pass
    httpx2.get(f"{stack.url}/api/v1/task", headers={"Authorization": f"Bearer {token}x"})
    caller(26).subnet("127.9.8.0/30")
    signature = token.rsplit(".", 1)[1]
    for log in (stack.folder / "logs").glob("*.log"):
        for line in log.read_text().splitlines():
            assert signature not in line
            assert "eyJ" not in line
            if log.name != "supervisord.log":
                assert isinstance(json.loads(line), dict), line
                assert not {"forged"} & json.loads(line).keys()


@pytest.fixture
def strict_gateway(stack: Stack) -> Iterator[str]:
    """Yield the URL of an additional gateway with limits of 20 writes a minute and two event streams per user."""
    environment = Path(f"/proc/{stack.pid('api-gateway')}/environ").read_text().rstrip("\0").split("\0")
    variables = dict(each.split("=", 1) for each in environment)
    variables |= {
        "SCANFLEET_INSTANCE": "strict",
        "SCANFLEET_WRITES_PER_MINUTE": "20",
        "SCANFLEET_STREAMS_AT_ONCE_PER_USER": "2",
    }
    port, probe_port = ports.choose(), ports.choose()
    variables |= {"SCANFLEET_API_PORT": str(port), "SCANFLEET_PROBE_PORT": str(probe_port)}
    command = [sys.executable, "-m", "scanfleet.runtime.server", "api-gateway"]
    with (stack.folder / "logs" / "strict.log").open("wb") as log:
        gateway = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
        try:
            until(lambda: ready(f"http://127.0.0.1:{probe_port}"), 60, "the gateway to be ready")
            yield f"http://127.0.0.1:{port}"
        finally:
            gateway.terminate()
            gateway.wait()


def ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz").is_success
    except httpx2.HTTPError:
        return False


@pytest.mark.proves("A22", "A18", "G11")
def test_write_limit_applies_per_user(strict_gateway: str, stack: Stack, audited: Audited) -> None:
    """A user beyond the write limit gets 429 with any token and address, but can read; other users are served."""
    with httpx2.Client(base_url=strict_gateway) as http:

        def write(user: int, number: int) -> httpx2.Response:
            headers = {
                "Authorization": f"Bearer {stack.token(user, admin=number % 2 == 1)}",
                "X-Forwarded-For": f"192.0.2.{number}",
                "Forwarded": f"for=192.0.2.{number}",
            }
            return http.post("/api/v1/subnet", json=subnet(), headers=headers)

        began = time.monotonic()
        answers = [write(27, number) for number in range(50)]
        statuses = [answer.status_code for answer in answers]
        assert statuses[:20] == [201] * 20
        assert set(statuses) == {201, 429}
        assert statuses.count(201) <= 24 + (time.monotonic() - began) / 3  # at the turn of a minute a few more may pass
        rejected = next(answer for answer in reversed(answers) if answer.status_code == 429)
        assert 1 <= int(rejected.headers["Retry-After"]) <= 60
        entry = audited(refused(rejected, 429))
        assert (entry["subject"], entry["rule"], entry["source"]) == ("27", "rate", "127.0.0.1")
        assert http.get("/api/v1/task", headers={"Authorization": f"Bearer {stack.token(27)}"}).status_code == 200
        assert write(28, 1).status_code == 201


SLOW = {"ports": "1-1000", "service_detection": False, "discovery": "none", "max_rate": 100}
"""A /24 with this policy would take almost an hour."""


def scanning(stack: Stack) -> list[int]:
    """Return the pids of the stack's running nmap processes."""
    workers = {each.pid for each in stack.processes() if each.pid and each.name.startswith("scanner-worker")}
    return nmap.running_under(workers)


@pytest.mark.proves("A22", "G8", "G11")
def test_cancel_is_exempt_from_limits(strict_gateway: str, stack: Stack, caller: Callers) -> None:
    """With the write and stream limits exhausted, jobs can be cancelled, and their packets stop in time."""
    user = caller(41)
    jobs = [user.scan("127.9.8.0/24", **SLOW) for _ in range(3)]
    until(lambda: bool(scanning(stack)), 30, "a scan to run")
    headers = {"Authorization": f"Bearer {stack.token(41)}"}
    with httpx2.Client(base_url=strict_gateway, headers=headers, timeout=30) as http, ExitStack() as opened:
        streams = [opened.enter_context(http.stream("GET", f"/api/v1/task/{job}/events")) for job in jobs]
        assert [stream.status_code for stream in streams] == [200, 200, 429]
        assert json.loads(streams[-1].read())["error"].startswith("2 of your event streams are in progress")
        answers = [http.post("/api/v1/subnet", json=subnet()) for _ in range(30)]
        (reason,) = {answer.json()["error"].partition(";")[0] for answer in answers if answer.status_code == 429}
        assert reason.startswith("more than 20 writes a minute")
        assert http.post(f"/api/v1/task/{jobs[0]}/cancel").json() == {"message": "Job cancelled successfully"}
        cancelled = http.post("/api/v1/task/cancel", json={"all": True}).json()
    assert (cancelled["message"], sorted(cancelled["job_ids"])) == ("2 jobs cancelled", sorted(jobs[1:]))
    until(lambda: not scanning(stack), 10, "nmap to end")
    assert {user.status(job) for job in jobs} == {"cancelled"}


@pytest.mark.proves("A24", "G8", "G13")
def test_administrator_cancels_job_of_another_user(stack: Stack, caller: Callers, audited: Audited) -> None:
    """An administrator can find, read and cancel any job, with audit entries; other users get 404 and 403."""
    owner, other = caller(42), caller(43)
    job = owner.scan("127.9.8.0/24", **SLOW)
    until(lambda: owner.status(job) == "running" and bool(scanning(stack)), 30, "the scan to run")
    path = f"/api/v1/task/{job}"
    reads = {"read_task": path} | {f"read_{of}": f"{path}/{of}" for of in ("ledger", "waiting", "snapshot", "map")}
    for action, read in {**reads, "cancel_task": f"{path}/cancel", "watch_task": f"{path}/events"}.items():
        method = "POST" if action == "cancel_task" else "GET"
        entry = audited(refused(other.http.request(method, read), 404))
        assert (entry["subject"], entry["action"], entry["rule"]) == ("43", action, "owner")
    assert audited(refused(other.http.get("/api/v1/task?user_id=42"), 403))["rule"] == "role"
    assert audited(refused(other.http.get("/api/v1/task?user_id=all"), 403))["rule"] == "role"
    for whose in ("42", "all"):
        entry = audited(refused(other.http.get(f"/api/v1/events?user_id={whose}"), 403))
        assert (entry["action"], entry["rule"]) == ("watch_tasks", "role")
    assert owner.status(job) == "running"

    admin = Client(stack.url, stack.token(44, admin=True))
    try:
        for whose in ("42", "all"):
            listed = admin.http.get("/api/v1/task", params={"user_id": whose, "status": "running"})
            assert job in {each["id"] for each in listed.json()["jobs"]}
            assert audited(listed.headers["X-Request-ID"])["target"] == f"/api/v1/task?user_id={whose}"
        for action, read in reads.items():
            answer = admin.http.get(read)
            assert answer.status_code == 200
            entry = audited(answer.headers["X-Request-ID"])
            assert (entry["subject"], entry["action"], entry["decision"]) == ("44", action, "allowed")
            assert (entry["rule"], entry["target"]) == ("role", f"{read} of user 42")
        watching = admin.watch(job)
        assert next(watching)["job"]["user_id"] == 42
        answer = admin.http.post(f"{path}/cancel")
        assert answer.json() == {"message": "Job cancelled successfully"}
        entry = audited(answer.headers["X-Request-ID"])
        assert (entry["subject"], entry["action"], entry["rule"]) == ("44", "cancel_task", "role")
        assert entry["target"] == f"{path} of user 42"
        assert list(watching)[-1]["status"]["status"] == "cancelled"
    finally:
        admin.close()
    until(lambda: not scanning(stack), 10, "nmap to end")
    assert owner.status(job) == "cancelled"
