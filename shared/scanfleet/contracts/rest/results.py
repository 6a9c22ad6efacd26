"""Results and hosts of a job."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict

from scanfleet.clock import Time
from scanfleet.contracts.rest.base import Answer

MAX_HOST_PORTS = 1_000  # listed per host; the results have all


class Result(Answer):
    """One port that nmap found open or open|filtered."""

    id: int
    job_id: int
    ip_address: str
    port: int
    protocol: str
    service: str
    version: str
    os_info: str
    status: str
    banner: str
    raw_data: str
    created_at: Time
    updated_at: Time


HostOutcome = Literal["answered", "silent", "timed_out"]


class HostPort(Answer):
    """One port of a host that nmap found open or open|filtered; its texts are in the results."""

    port: int
    protocol: str
    status: str
    service: str
    version: str


class HostSystem(Answer):
    """An operating system that nmap found probable."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    name: str
    accuracy: int
    """Percent."""


class HostScript(Answer):
    """Output of an NSE script about a host as a whole."""

    id: str
    output: str


class Host(Answer):
    """An address that answered, or has ports that nmap found open or open|filtered."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    job_id: int
    ip_address: str
    outcome: HostOutcome
    """As in the ledger; `answered` if the address answered for any block of ports."""

    reason: str
    """Why the host is up, in nmap's words: `echo-reply`, `syn-ack`, `user-set` …"""

    hostnames: list[str]
    """Names that its services report; the platform does not query DNS."""

    mac: str
    """Hardware address, if the host is on a network of the worker."""

    vendor: str
    os_info: str
    """The most probable operating system; without OS detection what a service reports."""

    systems: list[HostSystem]
    """Operating systems found by OS detection, the most accurate first."""

    ports: list[HostPort]
    """The first ports that are open or open|filtered, at most 1,000."""

    open_filtered: str
    """UDP ports that are open|filtered without further information, as ranges; they are not in `ports`."""

    port_count: int
    """Number of ports that are open or open|filtered."""

    closed: int
    filtered: int
    scripts: list[HostScript]
    seconds: float | None
    """Duration of the scan of this host; null if unknown."""

    created_at: Time
    updated_at: Time
