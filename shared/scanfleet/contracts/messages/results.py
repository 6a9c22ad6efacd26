"""The results of one host."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from scanfleet.contracts.messages.chunks import Grant, Technique, _Fenced
from scanfleet.contracts.messages.fields import MAX_BYTES, Address, Id, Number, Seconds, Word
from scanfleet.scanning.ports import MAX_RANGES_TEXT

MAX_FOUND: Final = 8_192  # ports per chunk
MAX_LINE_CHARS: Final = 10_000
MAX_TEXT_CHARS: Final = MAX_BYTES  # a longer text does not fit into a message
MAX_HOSTNAMES: Final = 32  # per host
MAX_SYSTEMS: Final = 16  # per host; nmap lists at most ten perfect matches
MAX_OUTPUTS: Final = 64  # per host; as many as a policy has scripts
MAX_OUTPUT_CHARS: Final = 65_536  # for all scripts of a host together; the worker truncates longer output
MAX_NAME_CHARS: Final = 255  # of a host; longer than any in DNS
MAX_ELEMENT_CHARS: Final = 65_536  # of a host; its longest part is the output of scripts

Line = Annotated[str, Field(max_length=MAX_LINE_CHARS)]
Lines = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


class PortFound(BaseModel):
    """One port that is `open` or `open|filtered`; texts as in the public results."""

    model_config = ConfigDict(frozen=True)

    port: Annotated[int, Field(ge=0, le=65_535)]
    protocol: Literal["tcp", "udp"] = "tcp"
    status: Literal["open", "open|filtered"] = "open"
    service: Line = ""
    version: Line = ""
    os_info: Line = ""
    banner: Lines = ""
    raw_data: Lines = ""


class SystemMatch(BaseModel):
    """An operating system that nmap's detection found probable."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    name: Line
    accuracy: Annotated[int, Field(ge=0, le=100)]
    line: Number = 0
    """Line of the fingerprint in nmap's table."""


class ScriptOutput(BaseModel):
    """Output of an NSE script about a host as a whole."""

    model_config = ConfigDict(frozen=True)

    id: Word
    output: Annotated[str, Field(max_length=MAX_OUTPUT_CHARS)]


class HostDetails(BaseModel):
    """Facts that nmap reports about a host as a whole. Every text is plain text, as in the public results."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    reason: Word = ""
    """Why the host is up, as nmap calls it: `echo-reply`, `syn-ack`, `user-set` …"""

    mac: Annotated[str, Field(pattern=r"^(?:[0-9A-F]{2}(?::[0-9A-F]{2}){5})?$", max_length=17)] = ""
    """Hardware address, if the host is on a network of the worker."""

    vendor: Line = ""
    hostnames: Annotated[
        tuple[Annotated[str, Field(max_length=MAX_NAME_CHARS)], ...], Field(max_length=MAX_HOSTNAMES), FailFast()
    ] = ()
    """Names that the host's services report for it; the platform does not query DNS."""

    systems: Annotated[tuple[SystemMatch, ...], Field(max_length=MAX_SYSTEMS), FailFast()] = ()
    """The most accurate first."""

    scripts: Annotated[tuple[ScriptOutput, ...], Field(max_length=MAX_OUTPUTS), FailFast()] = ()
    """Scripts that ran once for the host; the output for a port is in its `raw_data`."""

    closed: Number = 0
    """Number of closed ports of the chunk."""

    filtered: Number = 0
    """Number of ports of the chunk without an answer, or with one from another machine."""

    seconds: Seconds | None = None
    """How long nmap scanned the host."""

    element: Annotated[str, Field(max_length=MAX_ELEMENT_CHARS)] = ""
    """Content of nmap's XML element of a host that has answered, without its open ports; empty if it is too long."""


class HostScanned(_Fenced):
    """One address of a chunk is done.

    To stay below 1 MB, the `element`, then script outputs of `details`, then `raw_data`, then banners are removed.
    """

    user_id: Id
    address: Address
    outcome: Literal["a", "s", "t"]
    """Answered, silent or timed out (see `scanfleet.scanning.outcomes`); hosts that are down are only in the map."""

    technique: Technique
    ports: Annotated[tuple[PortFound, ...], Field(max_length=MAX_FOUND), FailFast()] = ()
    open_filtered: Annotated[str, Field(max_length=MAX_RANGES_TEXT)] = ""
    """UDP ports that are `open|filtered` without further information, as ranges in nmap's syntax ("1-52,54").

    They are not in `ports`: a silent host would otherwise need thousands of equal objects.
    """

    details: HostDetails | None = None
    """Of a host that has answered or has ports; null for others."""

    trimmed: bool = False
    """Whether texts were removed."""

    grant: Grant | None = None
    """As in the ScanChunk; without it, result-store drops the message."""

    @property
    def event_id(self) -> str:
        """The same for every attempt: the first one in the log wins."""
        return f"{self.chunk_id}/{self.address}"
