"""Settings of scanner-worker, read from the environment."""

from __future__ import annotations

from pydantic import Field, IPvAnyAddress

from scanfleet.runtime.settings import CommonSettings, GrantSettings, KafkaSettings, TargetSettings


class Settings(CommonSettings, KafkaSettings, TargetSettings, GrantSettings):
    """All settings of scanner-worker."""

    nmap: str = Field("nmap", min_length=1, description="Path of the nmap program, or its name in PATH.")
    slots: int = Field(
        2,  # nmap mostly waits for the network, so two processes can share a core
        ge=1,
        le=256,
        description="Maximum number of concurrent nmap processes. One process scans a chunk or several small compatible chunks.",
    )
    attempt_seconds: float = Field(
        120.0,  # twice the planned duration of a chunk; the next attempt gets half of the addresses
        gt=0,
        description="Timeout in seconds of an nmap process that scans more than one address; then the remaining "
        "addresses are released. A single address is limited by the policy's host timeout.",
    )
    stall_seconds: float = Field(
        60.0,  # nmap pauses for seconds at most, unless its options require more; half of the timeout of an attempt
        gt=0,
        description="Timeout in seconds of an nmap without progress; then it is stopped and the attempt fails. At timings 0 and 1 "
        "the delay of two probes is added; during service detection and scripts, the policy's host timeout.",
    )
    max_output_bytes: int = Field(
        256 << 20,  # four times the output for 1,024 addresses with a hundred open ports and long banners each
        ge=1 << 16,
        description="Maximum bytes of output of one nmap; then it is stopped and the attempt fails.",
    )
    max_host_bytes: int = Field(
        32 << 20,  # 8,192 open ports with 4 KB of service and script output each
        ge=1 << 16,
        description="Maximum size in bytes of nmap's output per host; above it nmap is stopped and the attempt fails.",
    )
    egress_address: IPvAnyAddress | None = Field(
        None,
        description="Address that targets see as the source of scans, if they pass a NAT; it is recorded with each attempt. Without "
        "it, only the worker's own address is.",
    )
    stop_grace_seconds: float = Field(
        20.0,  # of the 30 s between SIGTERM and SIGKILL, Kubernetes' default
        ge=0,
        description="Timeout in seconds for running scans to finish after SIGTERM; then they are released.",
    )
