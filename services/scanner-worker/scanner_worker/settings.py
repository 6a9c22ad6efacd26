"""What the scanner-worker is told by its environment."""

from __future__ import annotations

from pydantic import Field

from scanfleet.settings import CommonSettings, KafkaSettings, TargetSettings


class Settings(CommonSettings, KafkaSettings, TargetSettings):
    """Every setting of the scanner-worker."""

    nmap: str = Field("nmap", min_length=1, description="The nmap program: a path, or a name to look for in PATH.")
    slots: int = Field(
        2,  # an nmap mostly waits for the network, so two share a core well
        ge=1,
        le=256,
        description="How many nmaps run side by side. One scans a chunk, or several small ones that are alike.",
    )
    scan_time_factor: float = Field(
        10.0,  # an estimate is a guess about a network that nobody has seen
        ge=1,
        description="A scan is given up after its estimate times this, but not before `scan_time_floor_seconds`.",
    )
    scan_time_floor_seconds: float = Field(
        600.0,  # one host that drops everything takes nmap minutes, however small the chunk
        gt=0,
        description="Seconds that every scan may take, however short its estimate.",
    )
    max_output_bytes: int = Field(
        256 << 20,  # four times what 1,024 addresses with a hundred talkative ports each have to say
        ge=1 << 16,
        description="Bytes that one nmap may write before it is stopped.",
    )
    max_host_bytes: int = Field(
        32 << 20,  # 8,192 open ports with 4 KB of service and script output each
        ge=1 << 16,
        description="Bytes that nmap may write about one host before it is stopped.",
    )
    stop_grace_seconds: float = Field(
        20.0,  # of the 30 s between SIGTERM and SIGKILL that Kubernetes gives by default
        ge=0,
        description="Seconds that running scans may take to finish when the worker is told to stop; then they are given back.",
    )
