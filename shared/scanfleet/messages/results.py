"""What a scan found on one host."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from scanfleet.messages.chunks import Technique, _Fenced


class PortFound(BaseModel):
    """One port that nmap found `open` or `open|filtered`; texts as in the public results."""

    model_config = ConfigDict(frozen=True)

    port: Annotated[int, Field(ge=0, le=65_535)]
    protocol: Literal["tcp", "udp"] = "tcp"
    status: Literal["open", "open|filtered"] = "open"
    service: str = ""
    version: str = ""
    os_info: str = ""
    banner: str = ""
    raw_data: str = ""


class HostScanned(_Fenced):
    """One address of a chunk is done. Below 1 MB: `raw_data` goes first, then banners, with `trimmed` set."""

    compact: ClassVar[bool] = True

    user_id: int
    address: str
    outcome: Literal["a", "s", "t"]
    """Answered, silent or timed out (see `scanfleet.outcomes`); a host that is down is only in the map."""

    technique: Technique
    ports: tuple[PortFound, ...] = ()
    open_filtered: str = ""
    """UDP ports that are `open|filtered` and of which nothing else is known, as ranges in nmap's syntax ("1-52,54").

    They are not in `ports`: a silent host would otherwise be thousands of equal objects.
    """

    trimmed: bool = False

    @property
    def event_id(self) -> str:
        """The same for every attempt: the first in the log wins."""
        return f"{self.chunk_id}/{self.address}"
