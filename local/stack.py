"""The local stack: Kafka, mongod and the four services as real processes with their data in one folder."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any, Final

import httpx2
from cryptography.fernet import Fernet
from pymongo import MongoClient

from local import kafka, mongod, ports, tokens
from local.credentials import ADMIN, LOOPBACK, Credentials, make_service_certificates
from local.supervisor import Process, Program, Supervisor
from local.wait import until
from scanfleet.runtime.settings import KafkaSettings
from scanfleet.services import GATEWAY, ORCHESTRATOR, RESULT_STORE, SERVICES, WITH_API, WITH_DATABASE, WORKER

SERVERS: Final = ("kafka", "mongod")
LOCAL_REPLICAS: Final = dict.fromkeys(SERVICES, 1) | {WORKER: 2}
USUAL_PORTS: Final = {
    "kafka": 9092,
    "kafka-controller": 9093,
    "mongod": 27017,
    **{service: 8080 + number for number, service in enumerate(WITH_API)},
    **{f"{name}-probes": 8090 + number for number, name in enumerate((*WITH_API, f"{WORKER}-1", f"{WORKER}-2"))},
}

LEASE_SECONDS: Final = 10  # short for development, where workers get killed; loopback has no network delays
WRITES: Final = 60_000  # per minute: tests and benchmarks are one user with many requests
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
        self._replicas = replicas
        self._usual_ports = usual_ports or {}
        self._kafka_at = kafka_at
        self._mongodb_at = mongodb_at
        self._topic_prefix = topic_prefix
        self._database_prefix = database_prefix
        self._settings = settings or {}
        self._credentials = Credentials(self.folder / "credentials") if secured else None
        self._settings_of = settings_of or {}
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
                self._choose_ports()
                self._supervisor.launch(self._programs())
            try:
                self._supervisor.start(self._servers)
                if "mongod" in self._servers:
                    mongod.make_ready(self.address("mongod"), credentials=self._credentials)
                if "kafka" in self._servers:
                    kafka.wait_until_up(self.kafka, settings=self.kafka_settings())
            except Exception as error:
                raise StackError(f"{error}{self._logs(self._servers)}") from error
            if self._credentials is not None:
                databases = {service: self.database(service) for service in WITH_DATABASE}
                mongod.make_users(self.address("mongod"), self._credentials, databases)
            self._run("scanfleet.kafka", "create-topics", environment=self._way_to_the_bus())
            if self._credentials is not None:
                self._run("scanfleet.kafka", "create-acls", environment=self._way_to_the_bus())
            for service in WITH_DATABASE if restored else ():
                self._run(f"{SERVICES[service].package}.restored", environment=self._environment(service, 0, service))
            self._supervisor.start(self._services)
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
        with MongoClient[dict[str, Any]](self.mongodb) as client:
            client.admin.command("fsync", lock=True)
            try:
                # mongod writes diagnostics even then, and its lock file would indicate a crash.
                shutil.copytree(files, folder, ignore=shutil.ignore_patterns("diagnostic.data", "mongod.lock"))
            finally:
                client.admin.command("fsyncUnlock")

    def restore(self, folder: Path) -> None:
        """Restore MongoDB from a backup and start; Kafka is unchanged.

        Raises:
            StackError: the stack has no MongoDB of its own, or did not start; call again.
        """
        files = self._mongodb_files
        self.down()
        shutil.rmtree(files)
        shutil.copytree(folder, files)
        self.up(restored=True)

    @property
    def _mongodb_files(self) -> Path:
        if self._mongodb_at is not None:
            raise StackError("this stack has no MongoDB of its own")
        return mongod.data(self.folder / "mongod")

    def processes(self) -> list[Process]:
        """The state of every process according to supervisord; empty when the stack is down."""
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

    def wait_until_ready(self, limit: float = READY_TIMEOUT_SECONDS) -> None:
        """Wait until every service is ready.

        Raises:
            StackError: timeout; the message names each unready service and shows the end of its log.
        """
        unready: dict[str, str] = dict.fromkeys(self._services, "")

        def ready(name: str) -> bool:
            try:
                answer = client.get(f"{self.probes(name)}/readyz")
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
                until(
                    all_ready, limit, "every service to be ready", pause=0.2
                )  # each check costs the starting processes CPU
        except TimeoutError as error:
            reasons = "".join(f"\n{name} {reason}" for name, reason in unready.items())
            raise StackError(f"{error}{reasons}{self._logs(list(unready))}") from error

    def moved(self) -> dict[str, tuple[int, int]]:
        """Return the preferred port of each process that listens on another one, and that port."""
        return {
            name: (self._usual_ports[name], port)
            for name, port in self._ports().items()
            if port != self._usual_ports.get(name, port)
        }

    def address(self, name: str) -> str:
        """Return `host:port` of a server or of a service's API."""
        return f"127.0.0.1:{self._ports()[name]}"

    def listens(self, name: str) -> list[str]:
        """Return `host:port` of each port of a process."""
        numbers = self._ports()
        return [f"127.0.0.1:{numbers[key]}" for key in (name, f"{name}-probes") if key in numbers]

    def probes(self, name: str) -> str:
        """Return the URL of the probes and metrics of a service's process."""
        return f"http://127.0.0.1:{self._ports()[f'{name}-probes']}"

    @property
    def url(self) -> str:
        """URL of the (first) gateway."""
        return f"http://{self.address(self.names('api-gateway')[0])}"

    @property
    def kafka(self) -> str:
        return self._kafka_at or self.address("kafka")

    @property
    def mongodb(self) -> str:
        """The URI of the administrator."""
        user = ADMIN if self._credentials else ""
        return self._mongodb_at or mongod.uri(self.address("mongod"), user, credentials=self._credentials)

    def mongodb_of(self, service: str) -> str:
        """Return the URI of a service with a database."""
        if self._credentials is None:
            return self.mongodb
        return mongod.uri(self.address("mongod"), service, self.database(service), self._credentials)

    def database(self, service: str) -> str:
        """Return the name of a service's database."""
        return f"{self._database_prefix}_{SERVICES[service].package}"

    def kafka_settings(self, service: str | None = None) -> KafkaSettings:
        """Return the Kafka settings of a service, or of the administrator."""
        if self._credentials is None:
            return KafkaSettings(kafka=self.kafka, topic_prefix=self._topic_prefix)
        user = ADMIN if service is None else self._topic_prefix + service
        return KafkaSettings(
            kafka=self.kafka,
            kafka_ca_file=self._credentials.authority,
            kafka_username=user,
            kafka_password_file=self._credentials.password_file(user),
            topic_prefix=self._topic_prefix,
        )

    @property
    def env(self) -> dict[str, str]:
        """The addresses for clients, as environment variables."""
        return {"SCANFLEET_URL": self.url, "SCANFLEET_KAFKA": self.kafka, "SCANFLEET_MONGODB": self.mongodb}

    def token(self, user: int, *, admin: bool = False) -> str:
        """Return a JWT that the services of this stack accept."""
        return self._issuer.token(user, admin=admin)

    @property
    def _issuer(self) -> tokens.Issuer:
        of_gateway = self._settings_of.get(GATEWAY, {})
        return tokens.Issuer(self.folder / "jwt", of_gateway.get("SCANFLEET_JWT_ISSUER") or tokens.ISSUER)

    @property
    def _servers(self) -> list[str]:
        elsewhere = {"kafka": self._kafka_at, "mongod": self._mongodb_at}
        return [name for name in SERVERS if elsewhere[name] is None]

    @property
    def _services(self) -> list[str]:
        return [name for service in SERVICES for name in self.names(service)]

    def names(self, service: str) -> list[str]:
        """Return the process names of a service."""
        count = self._replicas[service]
        return [service] if count == 1 else [f"{service}-{number}" for number in range(1, count + 1)]

    def _programs(self) -> Iterator[Program]:
        if "kafka" in self._servers:
            numbers = self._ports()
            command = kafka.command(
                self.folder / "kafka",
                numbers["kafka"],
                numbers["kafka-controller"],
                self._credentials,
                [self._topic_prefix + service for service in SERVICES],
            )
            yield Program("kafka", command, autostart=True)
        if "mongod" in self._servers:
            command = mongod.command(self.folder / "mongod", self._ports()["mongod"], self._credentials)
            yield Program("mongod", command, autostart=True)
        for service in SERVICES:
            for index, name in enumerate(self.names(service)):
                command = [sys.executable, "-m", "scanfleet.runtime.server", service]
                yield Program(name, command, self._environment(service, index, name))

    def _environment(self, service: str, index: int, name: str) -> dict[str, str]:
        def replica_url(other: str) -> str:
            names = self.names(other)
            scheme = "http" if self._credentials is None else "https"
            return f"{scheme}://{self.address(names[index % len(names)])}"

        variables = {
            "SCANFLEET_INSTANCE": name,
            **self._listening(name),
            **self._certificates(service),
            **self._way_to_the_bus(service),
            "SCANFLEET_ALLOWED_NETWORKS": "127.0.0.0/8,::1/128",
            "SCANFLEET_LEASE_SECONDS": str(LEASE_SECONDS),
            "SCANFLEET_WRITES_PER_MINUTE": str(WRITES),
        }
        key, public_keys = self._signing_keys("internal")
        chunk_key, chunk_public_keys = self._signing_keys("chunk")
        if service == ORCHESTRATOR:
            variables["SCANFLEET_AUDIT_KEY_FILE"] = str(self._secret_file("audit-key", token_hex(24)))
        if service in WITH_DATABASE:
            variables["SCANFLEET_INTERNAL_PUBLIC_KEYS_FILE"] = str(public_keys)
            variables["SCANFLEET_DATABASE"] = self.database(service)
            uri = self.mongodb_of(service)
            if self._credentials is None:
                variables["SCANFLEET_MONGODB"] = uri
            else:
                variables["SCANFLEET_MONGODB_FILE"] = str(self._credentials.file(f"{service}-mongodb", uri))
        if service == ORCHESTRATOR:
            variables["SCANFLEET_CHUNK_KEY_FILE"] = str(chunk_key)
        if service == RESULT_STORE:
            variables["SCANFLEET_CHUNK_PUBLIC_KEYS_FILE"] = str(chunk_public_keys)
        if service != GATEWAY:
            variables["SCANFLEET_TRUSTED_PROXIES"] = "127.0.0.1/32"  # the gateway
        else:
            variables |= {
                "SCANFLEET_JWT_ISSUER": self._issuer.name,
                "SCANFLEET_JWT_AUDIENCE": tokens.AUDIENCE,
                "SCANFLEET_JWT_PUBLIC_KEY_FILE": str(self._issuer.public_key_file),
                "SCANFLEET_INTERNAL_KEY_FILE": str(key),
                "SCANFLEET_SESSION_KEYS_FILE": str(self._secret_file("session-keys", Fernet.generate_key().decode())),
            }
            variables["SCANFLEET_ORCHESTRATOR_URL"] = replica_url(ORCHESTRATOR)
            variables["SCANFLEET_RESULT_STORE_URL"] = replica_url(RESULT_STORE)
        more: dict[str, str | None] = {**variables, **self._settings}
        for whose in (service, name):
            more |= self._settings_of.get(whose, {})
        return {variable: value for variable, value in more.items() if value is not None}

    def _listening(self, name: str) -> dict[str, str]:
        """Return the ports of a process; a worker has no API, and a one-shot command does not listen."""
        numbers = self._ports()
        ports_of = {"SCANFLEET_API_PORT": name, "SCANFLEET_PROBE_PORT": f"{name}-probes"}
        return {variable: str(numbers[key]) for variable, key in ports_of.items() if key in numbers}

    def _certificates(self, service: str) -> dict[str, str]:
        """Return the TLS settings of a secured service; one without an API has none."""
        if self._credentials is None or service not in WITH_API:
            return {}
        folder = self.folder / "certificates"
        make_service_certificates(folder, LOOPBACK)
        files = {"CA": "ca.crt", "CERTIFICATE": "tls.crt", "KEY": "tls.key"}
        return {f"SCANFLEET_TLS_{name}_FILE": str(folder / service / file) for name, file in files.items()}

    def _signing_keys(self, purpose: str) -> tuple[Path, Path]:
        """Return the files with the private and the public key."""
        private, public = self.folder / purpose / "private.pem", self.folder / purpose / "public.pem"
        tokens.make_signing_keys(private, public)
        return private, public

    def _secret_file(self, name: str, secret: str) -> Path:
        """Return the file of a secret, created once."""
        file = self.folder / name
        if not file.exists():
            file.touch(0o600)
            file.write_text(f"{secret}\n")
        return file

    def _way_to_the_bus(self, service: str | None = None) -> dict[str, str]:
        settings = self.kafka_settings(service).model_dump(mode="json", exclude_none=True)
        return {f"SCANFLEET_{name.upper()}": value for name, value in settings.items()}

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

    def _ports(self) -> dict[str, int]:
        try:
            numbers: dict[str, int] = json.loads((self.folder / "ports.json").read_text())
        except FileNotFoundError:
            return {}
        return numbers

    def _choose_ports(self) -> None:
        """Reuse the previous ports that are still free, so that clients find the stack at the same addresses."""
        servers = [*self._servers, *(["kafka-controller"] if "kafka" in self._servers else [])]
        apis = [name for service in WITH_API for name in self.names(service)]
        before = self._ports()
        numbers: dict[str, int] = {}
        for name in [*servers, *apis, *(f"{name}-probes" for name in self._services)]:
            number = ports.choose(before.get(name, self._usual_ports.get(name)))
            while number in numbers.values():
                number = ports.choose()
            numbers[name] = number
        (self.folder / "ports.json").write_text(json.dumps(numbers, indent=2))

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
