"""The services of a stack: their processes, settings, keys and certificates."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from secrets import token_hex
from typing import Final

from cryptography.fernet import Fernet

from local import tokens
from local.credentials import LOOPBACK, make_service_certificates
from local.ports import Ports
from local.servers import Servers
from local.supervisor import Program
from scanfleet.services import GATEWAY, ORCHESTRATOR, RESULT_STORE, SERVICES, WITH_API, WITH_DATABASE

LEASE_SECONDS: Final = 10  # short for development, where workers get killed; loopback has no network delays
WRITES: Final = 60_000  # per minute: tests and benchmarks are one user with many requests


class Services:
    """The processes of the services and their settings. Missing keys and certificates are created on first use.

    Args:
        folder: of keys and certificates.
        ports: of the processes.
        servers: Kafka and mongod.
        replicas: number of processes per service. Replica n of the gateway calls replica n of the others.
        settings: additional environment variables for every service.
        settings_of: additional variables of one service or process; those with the value None are omitted.
    """

    def __init__(
        self,
        folder: Path,
        ports: Ports,
        servers: Servers,
        *,
        replicas: Mapping[str, int],
        settings: Mapping[str, str],
        settings_of: Mapping[str, Mapping[str, str | None]],
    ) -> None:
        self._folder = folder
        self._ports = ports
        self._servers = servers
        self._replicas = replicas
        self._settings = settings
        self._settings_of = settings_of

    def names(self, service: str) -> list[str]:
        """Return the process names of a service."""
        count = self._replicas[service]
        return [service] if count == 1 else [f"{service}-{number}" for number in range(1, count + 1)]

    def all_names(self) -> list[str]:
        return [name for service in SERVICES for name in self.names(service)]

    def port_names(self) -> list[str]:
        """Return the names of the ports: a worker has no API."""
        apis = [name for service in WITH_API for name in self.names(service)]
        return [*apis, *(f"{name}-probes" for name in self.all_names())]

    def programs(self) -> Iterator[Program]:
        for service in SERVICES:
            for index, name in enumerate(self.names(service)):
                command = [sys.executable, "-m", "scanfleet.runtime.server", service]
                yield Program(name, command, self.environment(service, index, name))

    @property
    def issuer(self) -> tokens.Issuer:
        """The issuer whose tokens the gateway accepts."""
        of_gateway = self._settings_of.get(GATEWAY, {})
        return tokens.Issuer(self._folder / "jwt", of_gateway.get("SCANFLEET_JWT_ISSUER") or tokens.ISSUER)

    def environment(self, service: str, index: int, name: str) -> dict[str, str]:
        """Return the settings of the process `name`, replica `index` of a service."""

        def replica_url(other: str) -> str:
            names = self.names(other)
            scheme = "http" if self._servers.credentials is None else "https"
            return f"{scheme}://{self._ports.address(names[index % len(names)])}"

        variables = {
            "SCANFLEET_INSTANCE": name,
            **self._listening(name),
            **self._certificates(service),
            **self._servers.kafka_environment(service),
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
            variables["SCANFLEET_DATABASE"] = self._servers.database(service)
            uri = self._servers.mongodb_of(service)
            if self._servers.credentials is None:
                variables["SCANFLEET_MONGODB"] = uri
            else:
                variables["SCANFLEET_MONGODB_FILE"] = str(self._servers.credentials.file(f"{service}-mongodb", uri))
        if service == ORCHESTRATOR:
            variables["SCANFLEET_CHUNK_KEY_FILE"] = str(chunk_key)
        if service == RESULT_STORE:
            variables["SCANFLEET_CHUNK_PUBLIC_KEYS_FILE"] = str(chunk_public_keys)
        if service != GATEWAY:
            variables["SCANFLEET_TRUSTED_PROXIES"] = "127.0.0.1/32"  # the gateway
        else:
            issuer = self.issuer
            variables |= {
                "SCANFLEET_JWT_ISSUER": issuer.name,
                "SCANFLEET_JWT_AUDIENCE": tokens.AUDIENCE,
                "SCANFLEET_JWT_PUBLIC_KEY_FILE": str(issuer.public_key_file),
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
        numbers = self._ports.numbers
        ports_of = {"SCANFLEET_API_PORT": name, "SCANFLEET_PROBE_PORT": f"{name}-probes"}
        return {variable: str(numbers[key]) for variable, key in ports_of.items() if key in numbers}

    def _certificates(self, service: str) -> dict[str, str]:
        """Return the TLS settings of a secured service; one without an API has none."""
        if self._servers.credentials is None or service not in WITH_API:
            return {}
        folder = self._folder / "certificates"
        make_service_certificates(folder, LOOPBACK)
        files = {"CA": "ca.crt", "CERTIFICATE": "tls.crt", "KEY": "tls.key"}
        return {f"SCANFLEET_TLS_{name}_FILE": str(folder / service / file) for name, file in files.items()}

    def _signing_keys(self, purpose: str) -> tuple[Path, Path]:
        """Return the files with the private and the public key."""
        private, public = self._folder / purpose / "private.pem", self._folder / purpose / "public.pem"
        tokens.make_signing_keys(private, public)
        return private, public

    def _secret_file(self, name: str, secret: str) -> Path:
        """Return the file of a secret, created once."""
        file = self._folder / name
        if not file.exists():
            file.touch(0o600)
            file.write_text(f"{secret}\n")
        return file
