"""What Scanfleet promises, which faults and which abuse it withstands, and where that is proved.

The texts stand here alone. The proofs are the tests that wear `@pytest.mark.proves("G1", ...)`; after changing either,
`python docs/guarantees.py` writes the page anew.
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
    "G1": "A job that got its 201 is never lost: it ends once the parts are back",
    "G2": "One job at most for a user, an idempotency key and a subnet",
    "G3": "Work is done at least once, and its results count once: one record for a job, address, protocol and port",
    "G4": "The work of a dead or frozen worker goes to another, within a lease and a sweep",
    "G5": "A superseded worker changes no state: it may be the first to tell of a host, never the second, and never after its chunk is stored",
    "G6": "States move along the published graph alone, and final ones never change",
    "G7": "A job's life-cycle events first appear in the order of `seq`, none missing; a duplicate has the same id",
    "G8": "Cancel stops packets (≤ 2 s local, ≤ 10 s guaranteed), or the job completed first; never both. No limit delays a cancel",
    "G9": "A bad message never stops a partition",
    "G10": "A deploy or a scale-down loses no work and repeats no finished host",
    "G11": "Overload is answered by 429 or 503 with Retry-After, memory and queues are bounded, reads go on",
    "G12": "nmap sends packets only to addresses that policy allows, scripts included",
    "G13": "Callers see and change only their own objects, on every route; administrators act under audit",
    "G14": "Only tokens of the configured issuer, audience, type and algorithms are accepted; keys rotate and tokens are revoked without restart",
    "G15": "Every change and refusal is in a tamper-evident audit log: who, from where, what, which rule, which request",
    "G16": "`completed` means that every probe of the request has its outcome in the ledger and every result can be read",
    "G17": "A faulty worker, host, document or job affects nothing but itself",
    "G18": "A job's probe rate in discovery and port scan never exceeds its `max_rate`, whatever the number of workers; service detection and scripts are not limited",
    "G19": "Results and ledger of a job come only from chunks that the orchestrator dispatched",
    "G20": "The cost of a step does not grow with the size of a job or backlog; no user can exhaust the platform",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """What is done to the platform, and what is to come of it."""

    what: str
    outcome: str


FAULTS: Final[Mapping[str, Trial]] = {
    "F1": Trial(
        "a gateway is killed between publish and answer", "a retry with the same key gets the one job there is"
    ),
    "F2": Trial(
        "a worker is killed in mid-scan, with its nmap",
        "another attempt scans what was not done; no nmap is left, no record is there twice",
    ),
    "F3": Trial("an orchestrator is killed between a change of state and its event", "the event is published later"),
    "F4": Trial(
        "an orchestrator is killed between an event and its removal from the outbox",
        "a duplicate under the same id, which readers pass over",
    ),
    "F5": Trial("result-store is killed between write and commit", "it reads again, and the database is the same"),
    "F6": Trial("mongod is killed under load, or away", "nothing acknowledged is lost; `/readyz` is red meanwhile"),
    "F7": Trial("a write's connection is cut, a primary steps down", "the write is applied once"),
    "F8": Trial(
        "a worker is frozen past its lease, then thawed",
        "what it says late changes nothing and is counted, and its nmap ends at once",
    ),
    "F9": Trial("all that was said is said three times more, shuffled between jobs", "the same database"),
    "F10": Trial("a worker joins and leaves again and again", "each chunk runs once for each time it was given"),
    "F11": Trial("a cancel meets a completion within 5 ms, 500 times", "one final state, and events agree with GET"),
    "F12": Trial(
        "random bytes, a wrong schema, 2 MB, an unknown type, no headers, no value, in every topic that is read",
        "a dead letter that names its origin, or a counter where every process reads all; the next record is handled",
    ),
    "F13": Trial(
        "50 POSTs at once under one key; then another body; then another user", "one job; a 400; a job of its own"
    ),
    "F14": Trial(
        "a worker is told to stop with three chunks running, with time and without",
        "they are finished or given back at once, no lease is waited for, it exits with 0",
    ),
    "F15": Trial(
        "the broker refuses, then hangs, for a minute in all",
        "a POST is a 503 within its bound, reads work, memory stays, all goes on by itself",
    ),
    "F16": Trial("MongoDB is 500 ms slower; clients read nothing", "bounded, and others are unharmed"),
    "F17": Trial("orchestrators are cut off from the broker alone", "leases survive, and no job ends twice"),
    "F18": Trial("the broker comes back without any data", "every unfinished job finishes"),
    "F19": Trial("a worker's and a gateway's clocks are two hours off", "leases and times are unaffected"),
    "F20": Trial(
        "nmap hangs, exits with 1, writes half a document or without end, ignores SIGTERM, forks",
        "it is stopped, whole hosts count, `error` says why, nothing is left running",
    ),
    "F21": Trial(
        "a worker has no disk for temporary files",
        "its chunks are released, and it stays up and scans when there is room",
    ),
    "F22": Trial("two of every service", "no chunk is claimed twice, order is kept"),
    "F23": Trial(
        "the JWKS endpoint is away, a key is rotated",
        "known keys work, unknown ones are 401, a new one is accepted within the cooldown",
    ),
    "F24": Trial(
        "mixed load with a random process killed every 10 s: `make soak MINUTES=10`, and a minute in `make test`",
        "every promise; memory and descriptors stay flat",
    ),
    "F25": Trial(
        "a worker whose nmap cannot start, whose temporary folder is full, whose fork fails, beside healthy ones",
        "results as without it; the worker excludes itself; nothing is lost",
    ),
    "F26": Trial(
        "a host that crashes nmap, floods its output or breaks its XML, among others",
        "that one address is lost or timed out; all others complete",
    ),
    "F27": Trial(
        "one unreadable job or chunk, or a job that raises a fault",
        "other jobs are unaffected; a counter and a line in the log name it",
    ),
    "F28": Trial(
        "a rolling upgrade between two releases in both orders; fields that the other release does not know, everywhere",
        "each reads what the other writes; jobs finish; nothing is refused or dead-lettered",
    ),
    "F29": Trial(
        "rebalances in quick succession while a worker is dead; scan-progress unread for a minute",
        "its work is reassigned within the bound; nothing is dispatched twice",
    ),
    "F30": Trial(
        "`max_rate` and timings 0 to 2 with many free slots",
        "packets counted in a namespace: rate and one-chunk-per-address hold",
    ),
    "F31": Trial(
        "networks that drop 75 %, everything, or lose 2 % at random; hosts that answer ping only; rate-limited ICMP",
        "jobs complete; recall ≥ 99 %",
    ),
    "F32": Trial("a worker is stopped with SIGSTOP while nmap runs", "no packet after two thirds of a lease plus 1 s"),
    "F33": Trial(
        "every error code of MongoDB; Kafka or MongoDB missing for minutes at start; a partition without a leader",
        "nothing is dead-lettered; services are unready, then ready by themselves",
    ),
    "F34": Trial(
        "a job of 65,536 chunks beside small ones",
        "a window of its chunks exists at a time; each is made, scanned and counted once",
    ),
}

ABUSE: Final[Mapping[str, Trial]] = {
    "A1": Trial("options of nmap, shell and control characters smuggled in through any field", "400, nothing is run"),
    "A2": Trial("the same through ports, timing, scripts and rates; 100,000 items", "400 or 413"),
    "A3": Trial(
        "metadata services and our own infrastructure as targets, in IPv6 disguise too", "400, and in the audit log"
    ),
    "A4": Trial("addresses in spellings that programs read differently", "400"),
    "A5": Trial("targets that are too large or excluded altogether", "400"),
    "A7": Trial("forged, expired, confused and malformed tokens of every kind", "401, never 500"),
    "A8": Trial("a thousand unknown key ids a second", "one fetch of the keys for each cooldown; others are unharmed"),
    "A9": Trial("keys rotated during traffic", "old ones refused, new ones accepted, no restart"),
    "A10": Trial("one user's ids in another's hands, on every route", "404 (403 for results), and no effect"),
    "A11": Trial("fields in a body that are not the caller's to set", "400"),
    "A12": Trial("database operators in bodies and queries", "400"),
    "A13": Trial(
        "forged messages on the bus: wrong owner, stale attempt, unknown worker, denied target",
        "refused or dropped, counted; nmap is not started",
    ),
    "A14": Trial(
        "XML with entity bombs, external entities, endless attributes, foreign document types",
        "the chunk fails with a reason, memory is bounded",
    ),
    "A15": Trial("banners with markup, terminal escapes and direction marks", "text everywhere"),
    "A16": Trial("slow bodies, hundreds of idle connections", "bounded for each user, others are served"),
    "A17": Trial("line breaks in headers, tokens in requests", "one JSON line in the log, and no token in it"),
    "A18": Trial("rate limits dodged by X-Forwarded-For and by many tokens of one user", "429 all the same"),
    "A19": Trial(
        "endless or dripped headers, 64 kB paths, idle connections, without a token",
        "414, 431 or closed in time; CPU time, memory and descriptors are bounded, others are served",
    ),
    "A20": Trial(
        "1 MB of unknown keys, deep or wide JSON, many at once",
        "400 or 413 in bounded CPU time and memory; other users are served",
    ),
    "A21": Trial(
        "valid JSON with hostile values (long strings, infinity, 64-bit overflow) in every field of every message",
        "dead-lettered, or accepted, in bounded time; the next record is handled",
    ),
    "A23": Trial(
        "every allowed script and preset against pages full of links, redirects and names",
        "no packet to any other address, no DNS",
    ),
    "A24": Trial(
        "administrators acting on others' jobs; users trying the same",
        "allowed with an audit entry; 404, or 403 for lists",
    ),
    "A25": Trial(
        "forged or replayed HostScanned, ChunkScanned; `slot_seconds` of 1e999",
        "no effect on any job, result, ledger or clock",
    ),
    "A26": Trial(
        "an audit entry changed, removed or added in the database, or sent by a service in the name of another",
        "`verify` names it; over the bus each service adds refusals of its own only",
    ),
    "A27": Trial(
        "a forged dead letter replayed by an administrator", "refused, unless the administrator names it as unverified"
    ),
    "A28": Trial(
        "a withdrawn key while the JWKS cannot be fetched; another `typ`; `cnf`; a JWKS by http; a revoked token",
        "refused, within the stated time",
    ),
    "A29": Trial(
        "terminal escapes, C1 and bidirectional characters in paths, names and errors",
        "JSON and logs are printable ASCII",
    ),
    "A30": Trial(
        "X-Forwarded-For made up by a caller, through no, one and two trusted proxies",
        "the true source in the audit log",
    ),
}

KNOWN: Final = PROMISES.keys() | FAULTS.keys() | ABUSE.keys()


@dataclass(frozen=True, slots=True, order=True)
class Proof:
    """A test, by its file from the root of the project."""

    file: str
    name: str


def proofs() -> dict[str, list[Proof]]:
    """The tests that wear each id, known or not."""
    found: dict[str, list[Proof]] = defaultdict(list)
    for path in sorted(ROOT.glob("*/**/test_*.py")):
        if any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            continue  # tools that are installed here have tests of their own
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
    """The page that links each promise, fault and abuse to its proofs."""
    proved = proofs()
    lines = [
        "<!-- Written by `python docs/guarantees.py`; change the code, not this page. -->",
        "# Guarantees",
        "",
        "What Scanfleet promises, and the tests that prove it. Each injects the real fault into real parts, waits for a",
        "condition, and finds every invariant kept: in the public API, in the topics and in the database.",
        "",
        "## Promises",
        "",
        "| | promise | proved by |",
        "|---|---|---|",
        *(f"| {id_} | {text} | {_links(proved[id_])} |" for id_, text in PROMISES.items()),
    ]
    for title, trials in (("Faults", FAULTS), ("Abuse", ABUSE)):
        lines += ["", f"## {title}", "", "| | what happens | what comes of it | proved by |", "|---|---|---|---|"]
        lines += [f"| {id_} | {each.what} | {each.outcome} | {_links(proved[id_])} |" for id_, each in trials.items()]
    return "\n".join(lines) + "\n"


def _links(found: list[Proof]) -> str:
    return "<br>".join(
        f"[{re.sub('^test ', '', each.name.replace('_', ' '))}](../{each.file})" for each in sorted(set(found))
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
