"""The local stack: Kafka, mongod and the four services as real processes with their data in one folder."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx2
from pymongo import MongoClient

from local.credentials import Credentials
from local.ports import Ports
from local.servers import SERVERS, Servers
from local.services import Services
from local.supervisor import Process, Supervisor
from local.wait import until
from scanfleet.services import GATEWAY, SERVICES, WITH_API, WITH_DATABASE, WORKER

LOCAL_REPLICAS: Final = dict.fromkeys(SERVICES, 1) | {WORKER: 2}
USUAL_PORTS: Final = {
    "kafka": 9092,
    "kafka-controller": 9093,
    "mongod": 27017,
    **{service: 8080 + number for number, service in enumerate(WITH_API)},
    **{f"{name}-probes": 8090 + number for number, name in enumerate((*WITH_API, f"{WORKER}-1", f"{WORKER}-2"))},
}

READY_TIMEOUT_SECONDS: Final = 120.0  # until every service is ready; usually about five, on a busy machine many more
ANSWER_TIMEOUT_SECONDS: Final = 5.0  # of /readyz, longer than that of its checks
LOG_TAIL: Final = 10  # lines of a log in an error
LOG_LINE: Final = 600  # characters of such a line that are kept: the last ones, with the error of a traceback


class StackError(Exception):
    """The stack is not in the expected state; the message names the problem and shows the logs."""


class Stack:
    """The stack in `folder`. Several objects and processes may refer to the same one."""

    def __init__(
        self,
        folder: Path,
        *,
        replicas: Mapping[str, int] = LOCAL_REPLICAS,
        usual_ports: Mapping[str, int] | None = None,
        kafka_at: str | None = None,
        mongodb_at: str | None = None,
        topic_prefix: str = "",
        database_prefix: str = "scanfleet",
        settings: Mapping[str, str] | None = None,
        secured: bool = False,
        settings_of: Mapping[str, Mapping[str, str | None]] | None = None,
    ) -> None:
        """Define a stack without starting it.

        Args:
            folder: its data, logs, ports and keys.
            replicas: number of processes per service. Replica n of the gateway calls replica n of the others.
            usual_ports: preferred ports by process; others are random.
            kafka_at: bootstrap address of an existing broker; by default the stack runs its own.
            mongodb_at: URI of an existing replica set; by default the stack runs its own.
            topic_prefix: prefix of every topic.
            database_prefix: prefix of every database.
            settings: additional environment variables for every service.
            secured: use TLS, authenticate each service at Kafka and mongod, and authorise it by ACLs and roles;
                requests between services use TLS with certificates.
            settings_of: additional variables of one service or process; those with the value None are omitted.
        """
        self.folder = folder.resolve()
        self.ports = Ports(self.folder / "ports.json", usual_ports or {})
        self.servers = Servers(
            self.folder,
            self.ports,
            Credentials(self.folder / "credentials") if secured else None,
            kafka_at=kafka_at,
            mongodb_at=mongodb_at,
            topic_prefix=topic_prefix,
            database_prefix=database_prefix,
        )
        self.services = Services(
            self.folder,
            self.ports,
            self.servers,
            replicas=replicas,
            settings=settings or {},
            settings_of=settings_of or {},
        )
        self._supervisor = Supervisor(self.folder)

    def up(self, *, restored: bool = False) -> bool:
        """Start the stopped processes and return when every service is ready.

        Args:
            restored: MongoDB was restored from a backup, so run the services' restore commands first.

        Returns:
            Whether the stack was down.

        Raises:
            StackError: a part did not become ready in time. Running processes are kept for inspection.
        """
        with self._locked():
            was_down = not self._supervisor.answers()
            if was_down:
                self.ports.choose([*self.servers.port_names(), *self.services.port_names()])
                self._supervisor.launch([*self.servers.programs(), *self.services.programs()])
            try:
                self._supervisor.start(self.servers.own)
                self.servers.wait_until_ready()
            except Exception as error:
                raise StackError(f"{error}{self._logs(self.servers.own)}") from error
            self.servers.make_users()
            self._run("scanfleet.kafka", "create-topics", environment=self.servers.kafka_environment())
            if self.servers.credentials is not None:
                self._run("scanfleet.kafka", "create-acls", environment=self.servers.kafka_environment())
            for service in WITH_DATABASE if restored else ():
                environment = self.services.environment(service, 0, service)
                self._run(f"{SERVICES[service].package}.operator.after_restore", environment=environment)
            self._supervisor.start(self.services.all_names())
            self.wait_until_ready()
            text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in self.env.items())
            (self.folder / "stack.env").write_text(text)
        return was_down

    def down(self) -> bool:
        """Stop everything: the services first, so that they can finish their work.

        Returns:
            Whether anything was running.
        """
        with self._locked():
            if not self._supervisor.answers():
                self._supervisor.kill()
                return False
            names = [process.name for process in self._supervisor.processes()]
            self._supervisor.stop([name for name in names if name not in SERVERS])
            self._supervisor.stop([name for name in names if name in SERVERS])
            self._supervisor.shut_down()
            return True

    def backup(self, folder: Path) -> None:
        """Copy MongoDB's files to a new folder, consistent for both databases. All processes keep running; writes wait.

        Raises:
            StackError: the stack has no MongoDB of its own.
        """
        files = self._mongodb_files
        with MongoClient[dict[str, Any]](self.servers.mongodb) as client:
            client.admin.command("fsync", lock=True)
            try:
                # mongod writes diagnostics even then, and its lock file would indicate a crash.
                shutil.copytree(files, folder, ignore=shutil.ignore_patterns("diagnostic.data", "mongod.lock"))
            finally:
                client.admin.command("fsyncUnlock")

    def restore(self, folder: Path) -> None:
        """Restore MongoDB from a backup and start; Kafka is unchanged.

        Raises:
            StackError: the folder has no backup, or the stack no MongoDB of its own, or it did not start; call again.
        """
        files = self._mongodb_files
        if not (folder / "WiredTiger").is_file():  # MongoDB writes it with the first data
            raise StackError(f"{folder} has no backup of MongoDB")
        self.down()
        shutil.rmtree(files)
        shutil.copytree(folder, files)
        self.up(restored=True)

    @property
    def _mongodb_files(self) -> Path:
        if "mongod" not in self.servers.own:
            raise StackError("this stack has no MongoDB of its own")
        return self.servers.mongodb_files

    def processes(self) -> list[Process]:
        """Return the state of every process according to supervisord; empty when the stack is down."""
        return self._supervisor.processes() if self._supervisor.answers() else []

    def pid(self, name: str) -> int:
        """Return the pid of the running process `name`.

        Raises:
            StackError: it is not running.
        """
        for process in self.processes():
            if process.name == name and process.pid:
                return process.pid
        raise StackError(f"{name} is not running")

    def kill(self, name: str, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to a process; if it ends, supervisord restarts it."""
        os.kill(self.pid(name), signal_number)

    def stop(self, name: str) -> None:
        """Stop a process gracefully; it is not restarted until `start`."""
        self._supervisor.stop([name])

    def start(self, name: str) -> None:
        self._supervisor.start([name])

    def wait_until_ready(self, limit_seconds: float = READY_TIMEOUT_SECONDS) -> None:
        """Wait until every service is ready.

        Raises:
            StackError: timeout; the message names each unready service and shows the end of its log.
        """
        unready: dict[str, str] = dict.fromkeys(self.services.all_names(), "")

        def ready(name: str) -> bool:
            try:
                answer = client.get(f"{self.ports.probes(name)}/readyz")
            except httpx2.HTTPError as error:
                unready[name] = f"does not answer ({error})"
                return False
            unready[name] = f"is not ready: {answer.text}"
            return answer.is_success

        def all_ready() -> bool:
            for name in [name for name in unready if ready(name)]:
                del unready[name]
            return not unready

        try:
            with httpx2.Client(timeout=ANSWER_TIMEOUT_SECONDS) as client:
                # Each check costs the starting processes CPU.
                until(all_ready, limit_seconds, "every service to be ready", pause_seconds=0.2)
        except TimeoutError as error:
            reasons = "".join(f"\n{name} {reason}" for name, reason in unready.items())
            raise StackError(f"{error}{reasons}{self._logs(list(unready))}") from error

    @property
    def url(self) -> str:
        """URL of the (first) gateway."""
        return f"http://{self.ports.address(self.services.names(GATEWAY)[0])}"

    @property
    def env(self) -> dict[str, str]:
        """The addresses for clients, as environment variables."""
        return {
            "SCANFLEET_URL": self.url,
            "SCANFLEET_KAFKA": self.servers.kafka,
            "SCANFLEET_MONGODB": self.servers.mongodb,
        }

    def token(self, user: int, *, admin: bool = False) -> str:
        """Return a JWT that the services of this stack accept."""
        return self.services.issuer.token(user, admin=admin)

    def _run(self, *module: str, environment: Mapping[str, str]) -> None:
        """Run a one-time command."""
        done = subprocess.run(
            [sys.executable, "-m", *module],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise StackError(f"{' '.join(module)} failed:\n{done.stdout}{done.stderr}")

    def _logs(self, names: list[str]) -> str:
        """Return the ends of these processes' logs as text for an error."""
        text = ""
        for name in names:
            log = self.folder / "logs" / f"{name}.log"
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            text += f"\n--- the end of {log}\n" + "\n".join(line[-LOG_LINE:] for line in lines[-LOG_TAIL:])
        return text

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Serialise `up` and `down` of a folder: two brokers on one data folder would destroy it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
