"""Results of jobs: reading and printing them, and notes on addresses that were not probed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from scanfleet.contracts import rest
from scanfleet_cli import calls, coverage
from scanfleet_cli.client import parse_json
from scanfleet_cli.errors import CommandError
from scanfleet_cli.output import Column, Format, Output, Row, column, count, printable
from scanfleet_cli.session import Session
from scanfleet_cli.views import Followed

TABLE_FIELDS: Final = "id,ip_address,port,protocol,status,service,version,os_info,banner"
"""Fields of the results that a table needs; without `raw_data` a response has a seventh of the size."""

MATCHED_FIELDS: Final = ("id", "ip_address", "port", "protocol", "status", "service")
"""Fields of the results by which they are filtered, and printed once."""


def query(output: Output) -> dict[str, str]:
    """Return the parameter with the fields of the results that the format prints; empty for all fields."""
    if output.fields is not None:
        return {"fields": ",".join(dict.fromkeys([*MATCHED_FIELDS, *output.fields]))}
    return {"fields": TABLE_FIELDS} if output.format in {Format.TABLE, Format.WIDE, Format.NAME} else {}


def columns(*, grouped: bool = False) -> list[Column]:
    """Return the columns of a table of results.

    Args:
        grouped: whether to show each address only in its first row; for rows in order of addresses.
    """
    return [
        Column("ADDRESS", _address_once()) if grouped else column("ADDRESS", "ip_address"),
        Column("PORT", lambda row: f"{row['port']}/{row['protocol']}"),
        column("STATE", "status"),
        column("SERVICE"),
        column("VERSION"),
        column("OS", "os_info", wide=True),
        column("BANNER", wide=True),
    ]


def _address_once() -> Callable[[Row], str]:
    last = ""

    def cell(row: Row) -> str:
        nonlocal last
        same = row["ip_address"] == last
        last = row["ip_address"]
        return "" if same else last

    return cell


def rows(session: Session, job_id: int, **query: Any) -> Iterator[Row]:
    """Stream the results of a job as JSON; an older service ignores `query`.

    Raises:
        UnavailableError: the connection was cut; the results so far are incomplete.
    """
    return _lines(session, calls.read_results(job_id, **query))


def host_columns() -> list[Column]:
    """Return the columns of a table of hosts."""
    return [
        column("ADDRESS", "ip_address"),
        Column("PORTS", _ports),
        Column("SERVICES", lambda row: " ".join(each["service"] for each in row["ports"] if each["service"]) or "-"),
        column("OUTCOME", wide=True),
        column("OS", "os_info", wide=True),
        column("MAC", wide=True),
        column("NAMES", "hostnames", wide=True),
        Column("SCRIPTS", lambda row: ",".join(each["id"] for each in row["scripts"]) or "-", wide=True),
    ]


def _ports(row: Row) -> str:
    """Format the ports of a host by protocol: `22,80/tcp 53/udp 67-69/udp?`."""
    by_protocol: dict[str, list[str]] = {}
    for each in row["ports"]:
        by_protocol.setdefault(each["protocol"], []).append(str(each["port"]))
    listed = [f"{','.join(ports)}/{protocol}" for protocol, ports in by_protocol.items()]
    if row["open_filtered"]:
        listed.append(f"{row['open_filtered']}/udp?")
    if len(row["ports"]) == rest.MAX_HOST_PORTS:
        listed.append(f"… of {row['port_count']:,}")
    return " ".join(listed) or "-"


def host_rows(session: Session, job_id: int, **query: Any) -> Iterator[Row]:
    """Stream the hosts of a job as JSON.

    Raises:
        UnavailableError: the connection was cut; the hosts so far are incomplete.
    """
    return _lines(session, calls.read_hosts(job_id, **query))


def _lines(session: Session, call: calls.Call[Any]) -> Iterator[Row]:
    with session.client.stream(call) as response:
        for line in response.iter_lines():
            if not line.isspace():  # sent while a long search finds nothing
                yield parse_json(line)


def pass_through(session: Session, job_id: int, accept: str) -> None:
    """Copy the results of a job from the service to stdout.

    Raises:
        UnavailableError: the connection was cut; the output is incomplete.
    """
    _copy(session, calls.read_results(job_id, accept))


def nmap_xml(session: Session, job_id: int) -> None:
    """Copy the results of an ended job from the service to stdout, as nmap's XML.

    Raises:
        UnavailableError: the connection was cut; the output is incomplete and has no end tag.
    """
    _copy(session, calls.read_nmap_xml(job_id))


def _copy(session: Session, call: calls.Call[Any]) -> None:
    stdout = session.output.stdout
    with session.client.stream(call) as response:
        for text in response.iter_text():
            stdout.write(text)
    stdout.flush()


class Printer:
    """Prints results one by one, each once.

    Args:
        output: of the command.
        option: of the command that makes it print line by line.
        raw: whether to print nmap's XML of each port instead of a table.

    Raises:
        CommandError: the format cannot be printed line by line.
    """

    def __init__(self, output: Output, option: str = "--found", *, raw: bool = False) -> None:
        table = output.format in {Format.TABLE, Format.WIDE}
        if raw and not (table and output.fields is None):
            raise CommandError("--raw prints text; in the other formats it is the field raw_data", hint="omit --raw")
        if not (table or output.format is Format.JSONL):
            raise CommandError(f"{option} prints a table, or JSON lines with -o jsonl", hint=f"omit {option}")
        self._output = output
        self._tagged = option == "--found"
        self._raw = raw
        self._printed: set[int] = set()

    def print(self, row: Row) -> None:
        """Print a result unless it was already printed."""
        if row["id"] in self._printed:
            return
        self._printed.add(row["id"])
        if self._raw:
            self._output.emit("\n".join(map(printable, row["raw_data"].splitlines())))
        elif self._output.fields is not None:
            self._output.line(row)
        elif self._output.format is Format.JSONL:
            self._output.line(({"kind": "result"} if self._tagged else {}) | dict(row))
        else:
            self._output.row(row, columns())

    def print_all(self, found: Iterable[Row]) -> None:
        for row in found:
            self.print(row)


def note_not_probed(session: Session, job_id: int) -> None:
    """Note the progress of a running job, or the addresses that an ended job did not probe."""
    if session.output.quiet:
        return
    ledger = session.client.send(calls.read_ledger(job_id, page_size=1, after=0))
    if not ledger.status.final:
        looked_at = f"{coverage.looked_at(ledger):,} of {ledger.request.addresses:,} addresses"
        session.output.note(f"job {job_id} is {ledger.status}: {looked_at} so far")
    elif not ledger.accounted:
        session.output.note(f"{coverage.proof(ledger)}: scanfleet job ledger {job_id} --not-probed")


def nothing(job: Followed, ledger: rest.Ledger) -> str:
    """Explain why a job found no open port."""
    machines = job.task.status.machines_found if job.task else 0
    if machines:
        return f"{count(machines, 'machine')} answered, none with an open port"
    return "no machine answered" if ledger.accounted else f"no open ports: {coverage.proof(ledger)}"
