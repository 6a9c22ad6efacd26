"""`scanfleet job`: jobs from submission to results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from ipaddress import ip_address, ip_network
from typing import Any, Final, Literal, TypeVar

import click

from scanfleet.contracts import rest
from scanfleet.contracts.messages import Job, JobStatus
from scanfleet_cli import calls, changes, chart, coverage, findings, follow, joblist, resolve, views
from scanfleet_cli.completion import complete_job, complete_policy, complete_subnet
from scanfleet_cli.errors import ApiError, CommandError, Exit
from scanfleet_cli.output import Format, Row, ago, column, count, duration, printable
from scanfleet_cli.session import Session, formats, lists, long_lists, supported, with_session, yes

job_id = click.argument("job_id", type=click.IntRange(min=1), metavar="ID", shell_complete=complete_job)
job_ids = click.argument(
    "job_ids", type=click.IntRange(min=1), nargs=-1, required=True, metavar="ID…", shell_complete=complete_job
)
T = TypeVar("T")

_LEDGER_NAMES: Final = tuple(rest.LedgerCounts.model_fields)
_NETWORK: Final = ("network", "outcome", "reason")
_LEDGERS: Final = (rest.Ledger, rest.LedgerEntry, _NETWORK)
_SHARE_BAR: Final = 20  # cells
_TOO_LARGE: Final = 413


@click.group()
def job() -> None:
    """Scan jobs: submit, watch, cancel and read them."""


@job.command()
@click.option(
    "--subnet",
    "subnets",
    multiple=True,
    required=True,
    metavar="NAME|ID",
    shell_complete=complete_subnet,
    help="Repeat for several; each has its own job.",
)
@click.option("--policy", required=True, metavar="NAME|ID", shell_complete=complete_policy)
@click.option("--key", help="Idempotency key: the same command with the same key creates no other jobs, for 7 days.")
@click.option("--watch", is_flag=True, help="Watch the jobs to their final states.")
@formats(Job, rest.TaskStatus)
@with_session
def submit(session: Session, /, *, subnets: Sequence[str], policy: str, key: str | None, watch: bool) -> int | None:
    """Create a job for each subnet."""
    states = watch and session.output.format is Format.JSONL
    session.output.check_fields(rest.TaskStatus if states else Job)
    chosen = [resolve.subnet_named(session, each) for each in subnets]
    policy_id = resolve.policy_id(session, policy)
    networks = {each.id: each.cidr for each in chosen}
    with changes.submitted(session, [each.id for each in chosen], policy_id, key) as reply:
        made = reply.json
        if not states:
            session.output.many(made["jobs"], changes.submitted_columns(networks))
        if not watch:
            return None
        ids, owner = [each["id"] for each in made["jobs"]], made["jobs"][0]["user_id"]
    return follow.code_of(_watch(session, ids, None, owner=owner))


@job.command("list")
@click.option(
    "--status", "statuses", multiple=True, metavar="STATUS", help=f"{', '.join(JobStatus)}; repeat for several."
)
@click.option("--subnet", metavar="NAME|ID", shell_complete=complete_subnet, help="Only jobs of this subnet.")
@click.option("--policy", metavar="NAME|ID", shell_complete=complete_policy, help="Only jobs of this policy.")
@click.option("--since", metavar="TIME", help="Only jobs created since this time (RFC 3339).")
@click.option("--user", metavar="ID|all", help="Administrators only: jobs of this user, or of all users.")
@click.option("--watch", is_flag=True, help="Update the list until Ctrl-C.")
@lists(Job)
@with_session
def list_(
    session: Session,
    /,
    *,
    statuses: Sequence[str],
    subnet: str | None,
    policy: str | None,
    since: str | None,
    user: str | None,
    watch: bool,
) -> None:
    """List jobs: pending ones first, then the latest start first."""
    wanted = [each for text in statuses for each in text.split(",")]
    if unknown := [each for each in wanted if each not in list(JobStatus)]:
        raise CommandError(f"unknown status {unknown[0]}", hint=f"one of {', '.join(JobStatus)}")
    call = calls.list_tasks(
        status=[JobStatus(each) for each in wanted],
        user_id=user,
        subnet_id=resolve.subnet_id(session, subnet) if subnet else None,
        policy_id=resolve.policy_id(session, policy) if policy else None,
        since=since,
    )
    output = session.output
    columns, details = joblist.columns(output, users=user is not None), joblist.Details(session)
    if watch:
        joblist.watch(session, call, columns, details)
    rows: Iterator[Row] = session.rows(call)
    if output.format in {Format.TABLE, Format.WIDE} and output.fields is None:
        rows = map(details.read, rows)
    session.show_list(
        rows, columns, "no jobs match" if wanted or subnet or policy else "no jobs: scanfleet scan 192.0.2.0/24"
    )


@job.command()
@job_id
@click.option("--open", "browse", is_flag=True, help="Open the page of the job in a browser too.")
@formats(rest.TaskStatus)
@with_session
def show(session: Session, /, *, job_id: int, browse: bool) -> None:
    """Show the status, progress, request and outcome of a job."""
    reply = session.client.ask(call := calls.read_task(job_id))
    session.output.one(reply.json, lambda: _block(session, reply.read(call)), "job_id")
    if browse:
        session.effects.browse(_page(session, job_id))


def _block(session: Session, task: rest.TaskStatus) -> Iterator[str]:
    output, job, status = session.output, task.job, task.status
    yield f"job {job.id}  {output.paint(status.status)} {status.progress} %"
    yield f"  machines   {status.machines_found}"
    yield from _asked_for(session, job)
    yield f"  created    {ago(job.model_dump(mode='json')['created_at'], output)}"
    yield f"  took       {joblist.took(job.model_dump(mode='json'), output)}"
    if status.error:
        yield f"  error      {printable(status.error)}"
    ledger = session.find(calls.read_ledger(job.id, page_size=1, after=0))
    if ledger is not None:
        yield f"  addresses  {coverage.outcomes(ledger, output.paint)}"
        if status.status.final:
            yield f"  proof      {coverage.proof(ledger)}"


def _asked_for(session: Session, job: Any) -> Iterator[str]:
    asked = session.find(calls.read_snapshot(job.id))
    if asked is None:
        yield f"  subnet     {job.subnet_id}"
        yield f"  policy     {job.policy_id}"
        return
    excluded = f", {asked.excluded:,} excluded" if asked.excluded else ""
    addresses = count(asked.addresses, "address", "addresses")
    yield f"  network    {asked.cidr} ({addresses}{excluded}; subnet {job.subnet_id})"
    ports = f"ports {printable(asked.policy.ports)} ({count(asked.ports, 'port')}; policy {job.policy_id})"
    yield f"  policy     {asked.policy.preset}, {ports}"


@job.command()
@job_ids
@follow.timeout_option
@follow.found_option
@click.option("--no-exit-status", is_flag=True, help="Exit 0 for failed and cancelled jobs too.")
@follow.cancel_option
@formats(rest.TaskStatus)
@with_session
def watch(
    session: Session,
    /,
    *,
    job_ids: Sequence[int],
    timeout: str | None,
    found: bool,
    no_exit_status: bool,
    cancel_on_interrupt: bool,
) -> int:
    """Watch jobs to their final states.

    The exit code is that of the worst one. With -o jsonl each state is printed, in the other formats the final states.
    """
    if found and session.output.fields is not None:
        raise CommandError("--json selects fields of jobs and cannot be combined with --found")
    printer = findings.Printer(session.output) if found else None
    limit_seconds, ids = follow.seconds(timeout), list(dict.fromkeys(job_ids))
    jobs = _watch(session, ids, limit_seconds, cancel=cancel_on_interrupt, found=printer.print if printer else None)
    if printer is not None:
        for each in ids:
            printer.print_all(findings.rows(session, each, **findings.query(session.output)))
    tasks = [job.task.model_dump(mode="json") for job in jobs if job.task is not None]
    match session.output.format:
        case Format.JSONL:
            pass
        case Format.TABLE | Format.WIDE if session.output.fields is None:
            pass
        case _:
            session.output.many(tasks, [], "job_id")
    code = follow.code_of(jobs)
    return Exit.DONE if no_exit_status and code in {Exit.JOB_FAILED, Exit.JOB_CANCELLED} else code


def _watch(
    session: Session,
    job_ids: Sequence[int],
    limit_seconds: float | None,
    *,
    cancel: bool = False,
    found: Callable[[Row], None] | None = None,
    owner: int | None = None,
) -> list[views.Followed]:
    view = views.view_for(session.output)
    ended = (lambda job: follow.print_end(session, job)) if view.wants_ledger else None
    return follow.to_the_end(
        session,
        job_ids,
        view,
        limit_seconds,
        cancel=cancel,
        ended=ended,
        found=found,
        query=findings.query(session.output),
        owner=owner,
    )


@job.command()
@click.argument("job_ids", type=click.IntRange(min=1), nargs=-1, metavar="ID…", shell_complete=complete_job)
@click.option("--all", "every", is_flag=True, help="All your unfinished jobs.")
@click.option("--for", "state", type=click.Choice(["running", "final"]), default="final", show_default=True)
@follow.timeout_option
@with_session
def wait(session: Session, /, *, job_ids: Sequence[int], every: bool, state: str, timeout: str | None) -> int:
    """Wait for jobs, and print only their final states, on stderr."""
    own = _unfinished(session) if every and not job_ids else {}
    ids = list(dict.fromkeys(job_ids)) or list(own)
    if not ids:
        if every:
            session.output.note("no unfinished jobs")
            return Exit.DONE
        raise CommandError("specify jobs or --all", hint="scanfleet job wait --help")

    def enough(status: JobStatus) -> bool:
        return status.final or (state == "running" and status is JobStatus.RUNNING)

    view, owner = views.Silent(session.output), next(iter(own.values()), None)
    jobs = follow.to_the_end(session, ids, view, follow.seconds(timeout), enough=enough, owner=owner)
    for each in jobs:
        if each.task is not None:
            session.output.note(f"job {each.job_id} {each.task.status.status}")
    return follow.code_of(jobs)


def _unfinished(session: Session) -> dict[int, int]:
    """Return the ids of the caller's unfinished jobs, each with the user id of the caller.

    A job that ends while the pages are read moves the others forward, some of them to a page that was read already. So the
    list is read until it contains no further job, except those that were created in the meantime.
    """
    call = calls.list_tasks(status=[status for status in JobStatus if not status.final])

    def created(row: Row) -> datetime:
        return datetime.fromisoformat(row["created_at"])

    def read() -> dict[int, Row]:
        return {row["id"]: row for row in session.rows(call, limit=0)}

    found, before = read(), 0
    if len(found) >= calls.PAGE_SIZE:  # fewer are one page, read at once
        newest = max(map(created, found.values()))  # by time: ids of several replicas are not in order
        while before < len(found):
            before = len(found)
            found |= {id_: row for id_, row in read().items() if created(row) <= newest}
    return {id_: row["user_id"] for id_, row in found.items()}


@job.command()
@click.argument("job_ids", type=click.IntRange(min=1), nargs=-1, metavar="ID…", shell_complete=complete_job)
@click.option("--all-mine", is_flag=True, help="All your unfinished jobs.")
@click.option("--wait", "waits", is_flag=True, help="Wait for the final states, and print them.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation of --all-mine.")
@with_session
def cancel(session: Session, /, *, job_ids: Sequence[int], all_mine: bool, waits: bool, yes: bool) -> int:
    """Cancel pending or running jobs; their results so far are kept.

    Jobs that are specified stop at once, without a question; `--all-mine` asks for confirmation.
    """
    if all_mine == bool(job_ids):
        raise CommandError("specify jobs or --all-mine", hint="scanfleet job cancel --help")
    if all_mine:
        session.confirm("cancel all of your unfinished jobs?", yes=yes)
        answer = session.client.send(calls.cancel_tasks(rest.CancelJobs(all=True)))
        session.output.note(f"✓ {answer.message}")
        cancelled, errors = answer.job_ids, list[CommandError]()
    else:
        cancelled, errors = changes.cancel_each(session, job_ids)
    for error in errors:  # before the wait, which may end with another error
        session.output.error(error)
    code = follow.code_of(_watch(session, cancelled, None)) if waits and cancelled else Exit.DONE
    if errors:
        return errors[0].code
    return Exit.DONE if code is Exit.JOB_CANCELLED else code


@job.command()
@job_ids
@yes
@with_session
def delete(session: Session, /, *, job_ids: Sequence[int], yes: bool) -> None:
    """Delete ended jobs with their results and ledgers."""
    ids = list(dict.fromkeys(job_ids))
    session.confirm(f"delete {count(len(ids), 'job')} ({', '.join(map(str, ids))}) with all results?", yes=yes)
    changes.delete_each(
        session,
        "job",
        [(each, calls.delete_task(each)) for each in ids],
        conflict="cancel it with `scanfleet job cancel {id}`, and repeat the command after its last chunks have stopped",
    )


@job.command()
@job_id
@with_session
def events(session: Session, /, *, job_id: int) -> None:
    """Print each state of a job as a JSON line, up to the final one."""
    for task in session.client.watch(job_id, session.notice):
        session.output.line(task.model_dump(mode="json"))


@job.command()
@job_id
@formats(rest.JobSnapshot)
@with_session
def snapshot(session: Session, /, *, job_id: int) -> None:
    """Show the request of a job as submitted.

    Later changes to its subnet and policy do not appear in it.
    """
    found = _added(session, calls.read_snapshot(job_id), "snapshots of jobs")
    session.output.one(found, lambda: [json.dumps(found, indent=2)], "job_id")


@job.command("map")
@job_id
@click.option(
    "--ports", metavar="SPEC", help="Only the block of these ports; by default the worst outcome of all blocks."
)
@click.option("--from", "first", metavar="ADDRESS", help="First address.")
@click.option(
    "--by",
    type=click.Choice(["address", "chunk"]),
    help="Letter per address, or the worst one of each chunk. Default: chunk for a whole network of more than 65,536 "
    "addresses, or of more than 1,024 IPv6 addresses.",
)
@click.option(
    "--block",
    type=click.IntRange(min=0, max=128),
    metavar="LENGTH",
    help="Size of a cell as a prefix length, for example 28. Default: one chunk, or one address up to 1,024 addresses, else "
    "16.",
)
@click.option(
    "--width", type=click.IntRange(min=1), help="Cells per row. Default: 16 to 64, so that the map is square."
)
@click.option("--ascii", "plain", is_flag=True, help="Only ASCII characters, and no colours.")
@formats(rest.CoverageMap)
@with_session
def map_(
    session: Session,
    /,
    *,
    job_id: int,
    ports: str | None,
    first: str | None,
    by: Literal["address", "chunk"] | None,
    block: int | None,
    width: int | None,
    plain: bool,
) -> None:
    """Draw the outcome of each address of a job.

    An outcome is a letter; for a large network, each letter is the worst outcome of a block of addresses, or of a chunk.
    """

    def read(by: Literal["address", "chunk"] | None) -> Any:
        return _added(session, calls.read_map(job_id, ports=ports, first=first, by=by), "maps of jobs")

    whole = by is None and first is None
    try:
        found = read(by)
    except ApiError as error:
        if not whole or error.status != _TOO_LARGE:
            raise
        found = read("chunk")
    if whole and block is None and ":" in found["first"] and found["addresses"] > chart.SINGLE:
        found = read("chunk")
    drawn = rest.CoverageMap.model_validate(found)
    session.output.one(
        found, lambda: chart.lines(drawn, session.output, block=block, width=width, plain=plain), "job_id"
    )


@job.command()
@job_id
@formats(rest.Waiting)
@with_session
def waiting(session: Session, /, *, job_id: int) -> None:
    """Show the reasons why a job waits."""
    found = session.ask(calls.read_waiting(job_id))
    session.output.one(found, lambda: _waiting(found), "job_id")


def _waiting(found: Row) -> Iterator[str]:
    yield f"job {found['job_id']} {'waits' if found['waiting'] else 'does not wait'}: {found['queued_chunks']} chunks queued, {found['held_chunks']} at workers"
    for reason in found["reasons"]:
        yield f"  {reason['kind']}: {printable(reason['detail'])}"
    if found["next_possible_start"]:
        yield f"  next possible start {found['next_possible_start']}"
    if found["eta_seconds"] is not None:
        yield f"  about {duration(found['eta_seconds'])} left"


def _added(session: Session, call: calls.Call[Any], what: str) -> Any:
    """Send a call that an older service does not support."""
    with supported(what):
        return session.ask(call)


@job.command()
@job_id
@click.option("--port", "ports", multiple=True, type=int, help="Only this port; repeat for several.")
@click.option("--service", help="Only this service.")
@click.option("--address", metavar="CIDR", help="Only addresses of this network.")
@click.option("--open-only", is_flag=True, help="Exclude open|filtered ports.")
@click.option("--raw", is_flag=True, help="Print nmap's XML of each port instead of a table.")
@click.option("--follow", "following", is_flag=True, help="Print new results until the job has ended.")
@follow.timeout_option
@long_lists(rest.Result, xml=True)
@with_session
def results(
    session: Session,
    /,
    *,
    job_id: int,
    ports: Sequence[int],
    service: str | None,
    address: str | None,
    open_only: bool,
    raw: bool,
    following: bool,
    timeout: str | None,
) -> None:
    """Print the results of a job. Without a filter, CSV and JSON lines are passed through unchanged.

    `-o xml` prints all results of an ended job in nmap's XML format.
    """
    output = session.output
    lines = _line_printer(session, raw=raw, following=following, timed=timeout is not None)
    filtered = bool(ports or service or address or open_only or output.fields is not None)
    if output.format is Format.XML:
        if filtered or session.limit:
            raise CommandError("-o xml prints the whole job", hint="omit the filters, --json and --limit")
        with supported("exports in nmap's XML format"):
            findings.nmap_xml(session, job_id)
        findings.note_not_probed(session, job_id)
        return
    if output.format in {Format.CSV, Format.JSONL} and not filtered and not session.limit and not following:
        findings.pass_through(session, job_id, "text/csv" if output.format is Format.CSV else calls.NDJSON)
        findings.note_not_probed(session, job_id)
        return
    network = _network(address) if address else None

    def matches(row: Row) -> bool:
        return (
            (not ports or row["port"] in ports)
            and (not service or row["service"] == service)
            and (not open_only or row["status"] == "open")
            and (network is None or ip_address(row["ip_address"]) in network)
        )

    query: dict[str, Any] = {"port": list(ports) or None, "service": service, "address": address}
    query |= {} if raw else findings.query(output)
    if following and lines is not None:
        show = lines.print
        follow.to_the_end(
            session,
            [job_id],
            views.Silent(output),
            follow.seconds(timeout),
            found=lambda row: show(row) if matches(row) else None,
            query=query,
        )
    rows = filter(matches, findings.rows(session, job_id, **query))
    if lines is not None:
        lines.print_all(rows if following else session.limited(rows))
    else:
        found = session.limited(rows)
        if output.format is Format.WIDE and output.terminal:
            found = iter(sorted(found, key=lambda row: (ip_address(row["ip_address"]).packed, row["port"])))
        columns = findings.columns(grouped=output.format is Format.WIDE and output.terminal)
        session.show_list(found, columns, "no result matches" if filtered else "no open ports", "ip_address")
    findings.note_not_probed(session, job_id)


def _line_printer(session: Session, *, raw: bool, following: bool, timed: bool) -> findings.Printer | None:
    """Return the printer of results that are printed line by line, None for a table or a document."""
    if timed and not following:
        raise CommandError("--timeout is the time limit of --follow", hint="add --follow, or omit --timeout")
    if following and session.limit:
        raise CommandError("--follow prints every result", hint="omit --limit")
    if raw or following:
        return findings.Printer(session.output, "--follow" if following else "--raw", raw=raw)
    return None


def _network(text: str) -> Any:
    try:
        return ip_network(text)
    except ValueError as error:
        raise CommandError(f"--address: {error}") from error


@job.command()
@job_id
@click.option("--port", "ports", multiple=True, type=int, help="Only hosts with this port; repeat for several.")
@click.option("--service", help="Only hosts with this service.")
@click.option("--address", metavar="CIDR", help="Only addresses of this network.")
@long_lists(rest.Host)
@with_session
def hosts(session: Session, /, *, job_id: int, ports: Sequence[int], service: str | None, address: str | None) -> None:
    """Print one line for each address that answered or has ports.

    A port with a question mark is open or filtered, without further information. `-o wide` adds what nmap reports about the host
    as a whole, and the JSON formats all of it, with the output of host scripts.
    """
    rows = findings.host_rows(session, job_id, port=list(ports) or None, service=service, address=address)
    with supported("lists of hosts"):
        session.show_list(
            session.limited(rows),
            findings.host_columns(),
            "no host matches" if ports or service or address else "no host answered",
            "ip_address",
        )
    findings.note_not_probed(session, job_id)


@job.command()
@job_id
@click.option("--not-probed", is_flag=True, help="List the addresses that were not fully probed, with reasons.")
@click.option(
    "--outcome",
    "wanted",
    multiple=True,
    metavar="NAME",
    help=f"Only this outcome; repeat for several: {', '.join(_LEDGER_NAMES)}.",
)
@click.option("--networks", is_flag=True, help="Collapse addresses to networks.")
@long_lists(*_LEDGERS)
@with_session
def ledger(session: Session, /, *, job_id: int, not_probed: bool, wanted: Sequence[str], networks: bool) -> None:
    """Show the outcome of every probe of a job."""
    if unknown := [each for each in wanted if each not in _LEDGER_NAMES]:
        raise CommandError(f"unknown outcome {unknown[0]}", hint=f"one of {', '.join(_LEDGER_NAMES)}")
    whole = not (not_probed or wanted or networks)
    session.output.check_fields(rest.Ledger if whole else _NETWORK if networks else rest.LedgerEntry)
    reply = session.client.ask(call := calls.read_ledger(job_id, after=None if whole else 0))
    first = reply.read(call)
    if whole:
        session.output.one(reply.json, lambda: _ledger(session, first), "job_id")
        return
    outcomes = set(wanted) or set(coverage.NOT_PROBED) | {"timed_out"}
    listed = list(_entries(session, first))
    if first.status.final and len(listed) < first.not_probed.total:
        session.output.note(
            f"the service has listed {len(listed):,} of {count(first.not_probed.total, 'address', 'addresses')}"
        )
    entries = [each for each in listed if each.outcome in outcomes]
    if networks:
        groups: dict[tuple[str, str], set[str]] = {}
        for each in entries:
            groups.setdefault((each.outcome, each.reason), set()).add(each.address)
        rows: Iterator[Row] = (
            {"network": network, "outcome": outcome, "reason": reason}
            for (outcome, reason), addresses in groups.items()
            for network in coverage.collapse(addresses)
        )
        columns = [column("NETWORK"), column("OUTCOME"), column("REASON")]
    else:
        rows = (each.model_dump() for each in entries)
        columns = [column("ADDRESS"), column("PORTS"), column("OUTCOME"), column("REASON")]
    session.show_list(
        session.limited(rows),
        columns,
        f"{coverage.proof(first)}; no addresses to list",
        columns[0].title.lower(),
    )


def _entries(session: Session, first: rest.Ledger) -> Iterator[rest.LedgerEntry]:
    """Yield the addresses that a ledger lists, from its first page on."""
    page = first.not_probed
    yield from page.addresses
    while page.next is not None:
        page = session.client.send(calls.read_ledger(first.job_id, after=page.next)).not_probed
        yield from page.addresses


def _ledger(session: Session, first: rest.Ledger) -> Iterator[str]:
    probes = max(first.request.probes, 1)
    for name, number in first.counts.model_dump().items():
        share = number / probes
        bar = "▇" * round(_SHARE_BAR * share) if session.output.terminal else ""
        text = name.replace("_", " ")
        yield f"{session.output.paint(name, f'{text:<10}')} {number:>14,} {share:>7.1%}  {bar}".rstrip()
    asked = f"{count(first.request.addresses, 'address', 'addresses')} × {count(first.request.ports, 'port')}"
    yield f"{'asked':<10} {first.request.probes:>14,}           {asked}"
    yield f"accounted: {'yes' if first.accounted else 'no'}"
    if first.status.final and not first.accounted:
        yield coverage.proof(first)
        not_probed = coverage.NotProbed()
        not_probed.add(first)
        while not_probed.after is not None:
            not_probed.add(session.client.send(calls.read_ledger(first.job_id, after=not_probed.after)))
        yield from (f"  {printable(reason)}" for reason in not_probed.reasons)


@job.command("open")
@job_id
@with_session
def open_(session: Session, /, *, job_id: int) -> None:
    """Print the URL of the page of a job, and open it in a browser."""
    url = _page(session, job_id)
    session.output.emit(url)
    if session.output.terminal:
        session.effects.browse(url)


def _page(session: Session, job_id: int) -> str:
    return f"{session.endpoint.url}/app/jobs/{job_id}"
