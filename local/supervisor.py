"""The processes of one folder under supervisord, which restarts every process that ends."""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from xmlrpc.client import Fault, ServerProxy

from supervisor.states import RUNNING_STATES, getProcessStateDescription
from supervisor.xmlrpc import Faults, SupervisorTransport

from local.wait import until

MAX_SOCKET_PATH: Final = 90  # the kernel's limit is 107 bytes, and supervisord first creates it with its pid appended
START_TIMEOUT_SECONDS: Final = 15.0  # until supervisord answers; it takes half a second
STOP_TIMEOUT_SECONDS: Final = 30  # between SIGTERM and SIGKILL

CONFIG: Final = """\
[supervisord]
logfile={folder}/logs/supervisord.log
pidfile={folder}/supervisord.pid
childlogdir={folder}/logs

[unix_http_server]
file={socket}
chmod=0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""

# With `startsecs=0` a process that ends at once is restarted indefinitely, about once a second; with any other value
# supervisord backs off and finally gives up.
PROGRAM: Final = """
[program:{name}]
command={command}
autostart={autostart}
autorestart=true
startsecs=0
startretries=1000000
stopwaitsecs={stop_limit}
stdout_logfile={folder}/logs/{name}.log
stdout_logfile_maxbytes=20MB
stdout_logfile_backups=1
redirect_stderr=true
"""


@dataclass(frozen=True, slots=True)
class Program:
    """A program to run. With `autostart` supervisord starts it by itself, else `Supervisor.start` does."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    autostart: bool = False


@dataclass(frozen=True, slots=True)
class Process:
    """The state of a program. `pid` is 0 while it is not running."""

    name: str
    pid: int
    state: str
    running: bool


class Supervisor:
    """supervisord in one folder; every call reaches the running instance, whichever process started it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = folder / "supervisord.conf"
        self._socket = folder / "supervisor.sock"
        if len(os.fsencode(self._socket)) > MAX_SOCKET_PATH:
            digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
            self._socket = Path(tempfile.gettempdir()) / f"scanfleet-{digest}.sock"

    def answers(self) -> bool:
        try:
            self._call("getState")
        except OSError:
            return False
        return True

    def launch(self, programs: Iterable[Program]) -> None:
        """Start supervisord with `programs`. The caller has checked that none is running.

        Raises:
            subprocess.CalledProcessError: it did not start.
            TimeoutError: it does not answer.
        """
        self.kill()
        (self._folder / "logs").mkdir(exist_ok=True)
        text = CONFIG.format(folder=_escape(str(self._folder)), socket=_escape(str(self._socket)))
        self._config.write_text(text + "".join(self._program(program) for program in programs))
        argv = [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(self._config)]
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
        until(self.answers, START_TIMEOUT_SECONDS, "supervisord to answer")

    def kill(self) -> None:
        """Kill a supervisord of this folder that does not answer, and its processes.

        Otherwise an orphan would keep its port, or two brokers would share a data folder.

        Raises:
            TimeoutError: they are still running.
        """
        until(self._nothing_left, START_TIMEOUT_SECONDS, "an earlier supervisord and its processes to end")

    def shut_down(self) -> None:
        """Stop supervisord and its processes.

        Raises:
            TimeoutError: it is still running.
        """
        self._call("shutdown")
        until(lambda: self._pid() is None, 2.0 * STOP_TIMEOUT_SECONDS, "supervisord to end")

    def processes(self) -> list[Process]:
        return [
            Process(
                name=info["name"],
                pid=info["pid"],
                state=getProcessStateDescription(info["state"]),
                running=info["state"] in RUNNING_STATES,
            )
            for info in self._call("getAllProcessInfo")
        ]

    def start(self, names: Iterable[str]) -> None:
        """Start the processes in `names` that are not running."""
        for name in names:
            self._call("startProcess", name, False, but=Faults.ALREADY_STARTED)

    def stop(self, names: Collection[str]) -> None:
        """Stop `names` in parallel, and return when they have ended.

        Raises:
            TimeoutError: one is still running.
        """
        for name in names:
            self._call("stopProcess", name, False, but=Faults.NOT_RUNNING)

        def ended() -> bool:
            return not any(process.pid for process in self.processes() if process.name in names)

        until(ended, 2.0 * STOP_TIMEOUT_SECONDS, f"{', '.join(names)} to end")

    def _call(self, method: str, *arguments: object, but: int | None = None) -> Any:
        """Call supervisord; ignore the fault `but`, which means that there is nothing to do."""
        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        try:
            with ServerProxy("http://localhost", transport=transport) as server:
                return getattr(server.supervisor, method)(*arguments)
        except Fault as fault:
            if fault.faultCode != but:
                raise
            return None

    def _pid(self) -> int | None:
        """Return supervisord's pid if it is running: the pid in the file may belong to another process by now."""
        try:
            pid = int((self._folder / "supervisord.pid").read_text())
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if self._is_supervisord(arguments) else None

    def _is_supervisord(self, arguments: Sequence[bytes]) -> bool:
        return b"supervisor.supervisord" in arguments and os.fsencode(self._config) in arguments

    def _nothing_left(self) -> bool:
        """Kill the remaining processes of a supervisord of this folder; return whether there were none.

        The environment of its children contains its address; a child that has forked but not yet called exec has
        supervisord's own command line.
        """
        address = b"SUPERVISOR_SERVER_URL=unix://" + os.fsencode(self._socket)
        found = False
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is another user's
                arguments = (folder / "cmdline").read_bytes().split(b"\0")
                if address in (folder / "environ").read_bytes().split(b"\0") or self._is_supervisord(arguments):
                    found = True
                    os.kill(int(folder.name), signal.SIGKILL)
        return not found

    def _program(self, program: Program) -> str:
        variables = [f"{name}={value}" for name, value in program.environment.items()]
        argv = ["env", *variables, *program.command]
        return PROGRAM.format(
            name=program.name,
            command=_escape(shlex.join(argv)),
            autostart=str(program.autostart).lower(),
            stop_limit=STOP_TIMEOUT_SECONDS,
            folder=_escape(str(self._folder)),
        )


def _escape(text: str) -> str:
    return text.replace("%", "%%")  # supervisord expands %(names)s
