"""The processes of one folder under supervisord: any that ends, however, is started again."""

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

MAX_SOCKET_PATH: Final = 90  # the kernel takes 107 bytes, and supervisord first makes it with its pid behind
START_LIMIT: Final = 15.0  # seconds until supervisord answers; it takes half a second
STOP_LIMIT: Final = 30  # seconds a process has to finish before it is killed

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

# `startsecs=0` lets a process that ends at once be started again as any other, about once a second, for ever; with any
# other value supervisord waits longer each time and gives up in the end.
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
    """What to run. `autostart` says whether supervisord starts it by itself or waits for `Supervisor.start`."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    autostart: bool = False


@dataclass(frozen=True, slots=True)
class Process:
    """What became of it. `pid` is 0 while it is not running."""

    name: str
    pid: int
    state: str
    running: bool


class Supervisor:
    """supervisord in one folder; every call reaches the one that is there, whoever started it."""

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
        """Start supervisord over `programs`. The caller has made sure that none answers.

        Raises:
            subprocess.CalledProcessError: it did not start; says why.
            TimeoutError: it does not answer.
        """
        self.kill()
        (self._folder / "logs").mkdir(exist_ok=True)
        text = CONFIG.format(folder=_escape(str(self._folder)), socket=_escape(str(self._socket)))
        self._config.write_text(text + "".join(self._program(program) for program in programs))
        argv = [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(self._config)]
        subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
        until(self.answers, START_LIMIT, "supervisord to answer")

    def kill(self) -> None:
        """Kill what is left of a supervisord of this folder that does not answer: itself and its processes.

        Else an orphan would keep its port, or two brokers one data folder.

        Raises:
            TimeoutError: they are still there.
        """
        until(self._nothing_left, START_LIMIT, "an earlier supervisord and its processes to end")

    def shut_down(self) -> None:
        """End supervisord and whatever still runs under it.

        Raises:
            TimeoutError: it is still there.
        """
        self._call("shutdown")
        until(lambda: self._pid() is None, 2.0 * STOP_LIMIT, "supervisord to end")

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
        """Start those of `names` that are not running."""
        for name in names:
            self._call("startProcess", name, False, but=Faults.ALREADY_STARTED)

    def stop(self, names: Collection[str]) -> None:
        """Stop `names`, all at once, and return when they have ended.

        Raises:
            TimeoutError: one is still there.
        """
        for name in names:
            self._call("stopProcess", name, False, but=Faults.NOT_RUNNING)

        def ended() -> bool:
            return not any(process.pid for process in self.processes() if process.name in names)

        until(ended, 2.0 * STOP_LIMIT, f"{', '.join(names)} to end")

    def _call(self, method: str, *arguments: object, but: int | None = None) -> Any:
        """Ask supervisord; `but` is the one fault that means that there is nothing to do."""
        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        try:
            with ServerProxy("http://localhost", transport=transport) as server:
                return getattr(server.supervisor, method)(*arguments)
        except Fault as fault:
            if fault.faultCode != but:
                raise
            return None

    def _pid(self) -> int | None:
        """supervisord's, if it lives: a pid in a file may long be another process's."""
        try:
            pid = int((self._folder / "supervisord.pid").read_text())
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if self._is_supervisord(arguments) else None

    def _is_supervisord(self, arguments: Sequence[bytes]) -> bool:
        return b"supervisor.supervisord" in arguments and os.fsencode(self._config) in arguments

    def _nothing_left(self) -> bool:
        """Kill whatever is left of a supervisord of this folder, and say whether there was nothing.

        Its address is in the environment of what it has started; what it has forked, and is not yet the program, has its
        own command line.
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
            stop_limit=STOP_LIMIT,
            folder=_escape(str(self._folder)),
        )


def _escape(text: str) -> str:
    return text.replace("%", "%%")  # supervisord expands %(names)s
