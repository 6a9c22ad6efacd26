"""A service as a process, as a supervisor runs it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping

import httpx2

EXIT_SECONDS = 60  # far above the usual time


class ServiceProcess:
    """A process of a service; it can be started again after its end.

    Args:
        service: name of the service.
        environment: its settings.
        probe_port: where it answers probes.
    """

    def __init__(self, service: str, environment: Mapping[str, str], probe_port: int) -> None:
        # It dies with the test.
        self._command = ("setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "scanfleet.runtime.server", service)
        self._environment = {**os.environ, **environment, "SCANFLEET_PROBE_PORT": str(probe_port)}
        self._probe_port = probe_port
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(*self._command, env=self._environment)

    async def probe(self, path: str) -> httpx2.Response:
        async with httpx2.AsyncClient(trust_env=False) as client:
            return await client.get(f"http://127.0.0.1:{self._probe_port}{path}")

    def send(self, number: signal.Signals) -> None:
        self._running.send_signal(number)

    async def end(self, number: signal.Signals) -> int:
        """Send the signal; return the exit code."""
        self._running.send_signal(number)
        async with asyncio.timeout(EXIT_SECONDS):
            return await self._running.wait()

    async def discard(self) -> None:
        """Kill the process if it runs."""
        if self._process is not None and self._process.returncode is None:
            await self.end(signal.SIGKILL)

    @property
    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError("the process has not been started")
        return self._process
