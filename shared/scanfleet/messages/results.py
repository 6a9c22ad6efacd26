"""The results of one host."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from scanfleet.messages.chunks import Grant, Technique, _Fenced
from scanfleet.messages.fields import MAX_BYTES, Address, Id
from scanfleet.ports import MAX_RANGES_TEXT

MAX_FOUND: Final = 8_192  # ports per chunk
MAX_LINE_CHARS: Final = 10_000
MAX_TEXT_CHARS: Final = MAX_BYTES  # a longer text does not fit into a message

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


class HostScanned(_Fenced):
    """One address of a chunk is done. To stay below 1 MB, `raw_data`, then banners are removed; `trimmed` is set."""

    user_id: Id
    address: Address
    outcome: Literal["a", "s", "t"]
    """Answered, silent or timed out (see `scanfleet.outcomes`); hosts that are down are only in the map."""

    technique: Technique
    ports: Annotated[tuple[PortFound, ...], Field(max_length=MAX_FOUND), FailFast()] = ()
    open_filtered: Annotated[str, Field(max_length=MAX_RANGES_TEXT)] = ""
    """UDP ports that are `open|filtered` without further information, as ranges in nmap's syntax ("1-52,54").

    They are not in `ports`: a silent host would otherwise need thousands of equal objects.
    """

    trimmed: bool = False
    grant: Grant | None = None
    """As in the ScanChunk; without it, result-store drops the message."""

    @property
    def event_id(self) -> str:
        """The same for every attempt: the first one in the log wins."""
        return f"{self.chunk_id}/{self.address}"
