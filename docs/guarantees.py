"""Generate docs/guarantees.md: the promises, faults and abuse cases of Scanfleet, linked to the tests that prove them.

The texts are defined here only. The proofs are the tests marked with `@pytest.mark.proves("G1", ...)`. Run
`python docs/guarantees.py` after changing either.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = ROOT / "docs" / "guarantees.md"

PROMISES: Final[Mapping[str, str]] = {
    "G1": "An accepted job (201) is never lost: it reaches a terminal state once its dependencies recover",
    "G2": "Job creation is idempotent: at most one job per user, idempotency key and subnet",
    "G3": "At-least-once execution, exactly-once results: one record per job, address, protocol and port",
    "G4": "The work of a dead or frozen worker is requeued within one lease timeout plus one sweep interval",
    "G5": "A worker whose lease has expired changes no state: result-store accepts a host from it only if no other attempt has reported that host and the chunk is not closed",
    "G6": "States change only along the published state machine, and terminal states never change",
    "G7": "A job's life-cycle events first appear in the order of `seq` without gaps; a duplicate has the same id",
    "G8": "A cancellation stops all packets (within 2 s locally, 10 s guaranteed) unless the job completes first; it has limits of its own, so no limit of other requests delays it",
    "G9": "A malformed message never blocks a partition",
    "G10": "Deployments and scale-downs lose no work and do not rescan finished hosts",
    "G11": "Under overload the API refuses requests with 429 or 503 and Retry-After; memory and queues stay bounded and reads keep working",
    "G12": "nmap, NSE scripts included, sends packets only to addresses that the target rules allow",
    "G13": "Callers read and change only their own objects, on every route; administrators' access to others' objects is audited",
    "G14": "Only tokens with the configured issuer, audience, type and algorithms are accepted; key rotation and token revocation need no restart",
    "G15": "Every change is in a tamper-evident audit log with subject, source, target, rule and request id; so is every refusal; repeated refusals are aggregated into one entry with a count",
    "G16": "`completed` means that the ledger has an outcome for every requested probe and that every result is readable",
    "G17": "A faulty worker, host, document or job affects only itself",
    "G18": "A job's probes in discovery and port scan are never ahead of a schedule of its `max_rate`, whatever the number of workers; service detection and scripts are not limited",
    "G19": "A job's results and ledger come only from chunks that the orchestrator dispatched",
    "G20": "The cost of a step is independent of the size of the job and the backlog; no user can exhaust the platform",
    "G24": "Once the deletion of a job is acknowledged, the job cannot be read; its results and its ledger are removed from the databases, and no redelivery or replay within 30 days restores them",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """An injected fault or attack, and the required outcome."""

    what: str
    outcome: str


FAULTS: Final[Mapping[str, Trial]] = {
    "F1": Trial(
        "a gateway is killed between publishing a command and answering",
        "a retry with the same key returns the one job that exists",
    ),
    "F2": Trial(
        "a worker and its nmap are killed during a scan",
        "another attempt scans the remaining addresses; no nmap is left running and no record is duplicated",
    ),
    "F3": Trial(
        "an orchestrator is killed between a state change and its event", "the event is published later from the outbox"
    ),
    "F4": Trial(
        "an orchestrator is killed between publishing an event and removing it from the outbox",
        "a duplicate with the same id, which readers ignore",
    ),
    "F5": Trial(
        "result-store is killed between write and commit", "it reads the records again, and the database is unchanged"
    ),
    "F6": Trial(
        "mongod is killed under load or is unavailable", "no acknowledged write is lost; `/readyz` fails meanwhile"
    ),
    "F7": Trial("the connection of a write is cut, a primary steps down", "the write is applied once"),
    "F8": Trial(
        "a worker is frozen past its lease, then resumed",
        "its late reports are ignored and counted, and its nmap is killed at once",
    ),
    "F9": Trial("every message is redelivered three times, interleaved across jobs", "the database is unchanged"),
    "F10": Trial("a worker joins and leaves repeatedly", "each chunk runs once per dispatch"),
    "F11": Trial(
        "a cancel and a completion arrive within 5 ms of each other, 500 times",
        "one terminal state, and events agree with GET",
    ),
    "F12": Trial(
        "random bytes, a wrong schema, a value above the limit, an unknown type, no headers, no value, in every topic that is read; batches that are compressed, or that the client cannot parse",
        "a dead letter that names its origin; readers without a consumer group skip it, and count it if its key is theirs; the next record is handled",
    ),
    "F13": Trial(
        "50 concurrent POSTs with one key; then another body; then another user", "one job; a 400; a separate job"
    ),
    "F14": Trial(
        "a worker with three running chunks receives SIGTERM, with and without a grace period",
        "the chunks are finished or requeued at once without waiting for a lease timeout, and it exits with 0",
    ),
    "F15": Trial(
        "the broker refuses connections, then hangs, for a minute in total",
        "a POST is answered 503 within its timeout, reads work, memory is bounded, and the platform recovers by itself",
    ),
    "F16": Trial(
        "MongoDB is 500 ms slower; clients do not read their responses",
        "latency and memory are bounded, and other requests are unaffected",
    ),
    "F17": Trial(
        "orchestrators lose their connection to the broker only", "leases do not expire, and no job ends twice"
    ),
    "F18": Trial("the broker restarts without its data", "every unfinished job finishes"),
    "F19": Trial("a worker's and a gateway's clocks are two hours off", "leases and timestamps are unaffected"),
    "F20": Trial(
        "nmap hangs, exits with 1, writes a truncated or an endless document, ignores SIGTERM, forks",
        "it is stopped, complete hosts count, `error` names the cause, no process is left running",
    ),
    "F21": Trial(
        "a worker has no disk space for temporary files",
        "its chunks are released; it stays up and scans when there is space",
    ),
    "F22": Trial("two replicas of every service", "no chunk is claimed twice, order is preserved"),
    "F23": Trial(
        "the JWKS endpoint is unavailable, a key is rotated",
        "known keys work, unknown ones are answered 401, a new key is accepted within the cooldown",
    ),
    "F24": Trial(
        "mixed load while a random process is killed every 10 s: `make soak MINUTES=10`, and a minute in `make test-long`",
        "every promise holds; memory and the number of open descriptors do not grow",
    ),
    "F25": Trial(
        "a worker whose nmap cannot start, whose temporary folder is full or whose fork fails, beside healthy ones",
        "the same results as without it; the worker excludes itself; no work is lost",
    ),
    "F26": Trial(
        "among other hosts, one that crashes nmap, floods its output or breaks its XML",
        "that one address is lost or timed out; all others complete",
    ),
    "F27": Trial(
        "one unreadable job or chunk, or a job whose handling raises",
        "other jobs are unaffected; a counter and a log line name it",
    ),
    "F28": Trial(
        "a rolling upgrade between two releases in both orders, with unknown fields everywhere; the only worker with raw packets "
        "drains beside a plain one",
        "each reads the other's messages and documents; jobs finish, or wait with the reason; nothing is refused or "
        "dead-lettered, except requests for which operations.md states an order",
    ),
    "F29": Trial(
        "rebalances more often than a lease while a worker is dead; scan-progress unread for two leases",
        "its work is reassigned within the bound; no chunk is dispatched twice",
    ),
    "F30": Trial(
        "`max_rate` and timings 0 to 2 with many free slots",
        "packets counted in a namespace, and nmaps in the process table: the rate limit and one chunk per address hold",
    ),
    "F31": Trial(
        "networks that drop 75 % of packets, all packets, or a random 2 %; hosts that answer ping only; rate-limited ICMP",
        "jobs complete; recall ≥ 99 %",
    ),
    "F32": Trial("a worker is stopped with SIGSTOP while nmap runs", "no packet after two thirds of a lease plus 1 s"),
    "F33": Trial(
        "every error code of MongoDB; Kafka or MongoDB missing for minutes at start; a partition without a leader",
        "nothing is dead-lettered; services are unready, then become ready by themselves",
    ),
    "F34": Trial(
        "a job of 65,536 chunks beside small ones; 500 jobs of 32,768 addresses and all ports while the ledger of one is polled",
        "only a window of its chunks exists at any time; each is created, scanned and counted once; probes succeed, no step of a "
        "sweep takes 100 ms of the event loop's CPU time, and a cancel is carried out within its bound",
    ),
    "F38": Trial(
        "orchestrators and result-stores are killed during a deletion, or restored beside one",
        "the deletion is completed after their restart; the job stays deleted, and other jobs are unchanged",
    ),
}

ABUSE: Final[Mapping[str, Trial]] = {
    "A1": Trial("nmap options, shell metacharacters and control characters in any field", "400; no process is started"),
    "A2": Trial("the same in ports, timing, scripts and rates; 100,000 items", "400 or 413"),
    "A3": Trial(
        "metadata services and the platform's own infrastructure as targets, also embedded in IPv6",
        "400 and an audit entry",
    ),
    "A4": Trial("addresses in notations that programs parse differently", "400"),
    "A5": Trial("targets that are too large or completely excluded", "400"),
    "A7": Trial("forged, expired, confused and malformed tokens of every kind", "401, never 500"),
    "A8": Trial(
        "a thousand unknown key ids per second", "one fetch of the keys per cooldown; other callers are unaffected"
    ),
    "A9": Trial("key rotation during traffic", "old keys are refused and new ones accepted without a restart"),
    "A10": Trial("ids of another user's objects, on every route", "404 (403 for results), and no effect"),
    "A11": Trial("fields in a body that the caller may not set", "400"),
    "A12": Trial("database operators in bodies and queries", "400"),
    "A13": Trial(
        "forged messages on the bus: wrong owner, stale attempt, unknown worker, denied target",
        "refused or dropped, and counted; nmap is not started",
    ),
    "A14": Trial(
        "XML with entity bombs, external entities, endless attributes, foreign document types",
        "the chunk fails with a reason; memory is bounded",
    ),
    "A15": Trial("banners with markup, terminal escapes and bidirectional characters", "plain text everywhere"),
    "A16": Trial("slow bodies, hundreds of idle connections", "bounded per user; other callers are served"),
    "A17": Trial("line breaks in headers, tokens in requests", "one JSON line in the log, without the token"),
    "A18": Trial("rate limits evaded by X-Forwarded-For or by many tokens of one user", "429 regardless"),
    "A19": Trial(
        "endless or slow headers, 64 kB paths, idle connections and unread answers, without a token",
        "414, 431 or closed in time; CPU time, memory and descriptors are bounded; other callers are served",
    ),
    "A20": Trial(
        "1 MB of unknown keys, deep or wide JSON, many at once",
        "400 or 413 in bounded CPU time and memory; other users are served",
    ),
    "A21": Trial(
        "valid JSON with hostile values (long strings, infinity, 64-bit overflow) in every field of every message",
        "dead-lettered or accepted in bounded time; the next record is handled",
    ),
    "A22": Trial(
        "one user who continuously submits large requests, also at timing 0, repeats them, and opens every allowed stream",
        "requests above the quota are refused without being planned; cancels are carried out first, and others' requests pass",
    ),
    "A23": Trial(
        "every allowed script and preset against pages full of links, redirects and names",
        "no packet to any other address, no DNS query",
    ),
    "A24": Trial(
        "administrators acting on others' jobs; users attempting the same",
        "allowed with an audit entry; 404, or 403 for lists",
    ),
    "A25": Trial(
        "forged or replayed HostScanned, ChunkScanned; `slot_seconds` of 1e999",
        "no effect on any job, result, ledger or account",
    ),
    "A26": Trial(
        "an audit entry changed, removed or added in the database, or sent by a service in the name of another",
        "`verify` names it; over the bus each service can add only refusals of its own, and result-store its restores",
    ),
    "A27": Trial(
        "a forged dead letter replayed by an administrator", "refused, unless the administrator names it as unverified"
    ),
    "A28": Trial(
        "a withdrawn key while the JWKS cannot be fetched; another `typ`; `cnf`; a JWKS over http; a revoked token",
        "refused within the documented time",
    ),
    "A29": Trial(
        "terminal escapes, C1 and bidirectional characters in paths, names and errors",
        "JSON and logs are printable ASCII",
    ),
    "A30": Trial(
        "X-Forwarded-For invented by a caller, through no, one and two trusted proxies",
        "the true source in the audit log",
    ),
    "A31": Trial(
        "the session cookie sent by another site or frame, stolen, changed, of another key or 9 kB large; markup in "
        "scan results",
        "401, and the page executes none of it",
    ),
}

KNOWN: Final = PROMISES.keys() | FAULTS.keys() | ABUSE.keys()


@dataclass(frozen=True, slots=True, order=True)
class Proof:
    """A test and its file, relative to the root of the project."""

    file: str
    name: str


def proofs() -> dict[str, list[Proof]]:
    """Return the tests marked with each id, whether or not the id is defined."""
    found: dict[str, list[Proof]] = defaultdict(list)
    for path in sorted(ROOT.glob("*/**/test_*.py")):
        if any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            continue  # installed tools have tests of their own
        for name, ids in _marked(ast.parse(path.read_text(encoding="utf-8"))):
            for id_ in ids:
                found[id_].append(Proof(path.relative_to(ROOT).as_posix(), name))
    return found


def _marked(module: ast.Module) -> Iterator[tuple[str, list[str]]]:
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node.name, [id_ for decorator in node.decorator_list for id_ in _ids(decorator)]


def _ids(decorator: ast.expr) -> list[str]:
    if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func) != "pytest.mark.proves":
        return []
    return [str(ast.literal_eval(argument)) for argument in decorator.args]


def page() -> str:
    """Return the page that links each promise, fault and abuse case to its proofs."""
    proved = proofs()
    lines = [
        "<!-- Generated by `python docs/guarantees.py`; change the code, not this page. -->",
        "# Guarantees",
        "",
        "The promises of Scanfleet and the tests that prove them. Tests in `tests/` inject real faults into real processes, wait for",
        "a condition, and check every invariant in the public API, the topics and the database; those in `tests/networks` need root",
        "and `make networks`, and those marked `long` run in `make test-long`. Tests in a service's `unit` play the same sequences",
        "through its real handlers in memory, where a sequence cannot be forced on processes.",
        "",
        "## Promises",
        "",
        "| | promise | proved by |",
        "|---|---|---|",
        *(f"| {id_} | {text} | {_links(proved[id_])} |" for id_, text in PROMISES.items()),
    ]
    for title, trials in (("Faults", FAULTS), ("Abuse", ABUSE)):
        lines += ["", f"## {title}", "", "| | fault or attack | outcome | proved by |", "|---|---|---|---|"]
        lines += [f"| {id_} | {each.what} | {each.outcome} | {_links(proved[id_])} |" for id_, each in trials.items()]
    return "\n".join(lines) + "\n"


def _links(found: list[Proof]) -> str:
    return "<br>".join(
        f"[{re.sub('^test ', '', each.name.replace('_', ' '))}](../{each.file})" for each in sorted(set(found))
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
