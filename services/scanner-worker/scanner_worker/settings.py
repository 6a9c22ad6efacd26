"""The settings of the scanner-worker."""

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
    attempt_seconds: float = Field(
        120.0,  # twice what a chunk is planned for; the next attempt gets half of the addresses
        gt=0,
        description="Seconds that one nmap may scan more than one address; then the rest is released. A single address is "
        "ended by the policy's host timeout.",
    )
    stall_seconds: float = Field(
        300.0,  # nmap pauses for seconds at most, where its options do not ask for more
        gt=0,
        description="Seconds without progress after which nmap is stopped and the attempt fails. At timings 0 and 1 it may "
        "pause for two probes more; while it asks services and runs scripts, for the policy's host timeout more.",
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
        description="Seconds that running scans may take to finish after SIGTERM; then they are released.",
    )
