"""Kafka and mongod of a stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from local import kafka, mongod
from local.credentials import ADMIN, Credentials
from local.ports import Ports
from local.supervisor import Program
from scanfleet.runtime.settings import KafkaSettings
from scanfleet.services import SERVICES, WITH_DATABASE

SERVERS: Final = ("kafka", "mongod")


class Servers:
    """Kafka and mongod, each the stack's own or an existing one, and how administrator and services reach them.

    Attributes:
        own: the servers that the stack runs.
        credentials: of the administrator and of the services; None if the servers are not secured.
        mongodb_files: folder of the data of the stack's own mongod.
    """

    def __init__(
        self,
        folder: Path,
        ports: Ports,
        credentials: Credentials | None,
        *,
        kafka_at: str | None,
        mongodb_at: str | None,
        topic_prefix: str,
        database_prefix: str,
    ) -> None:
        elsewhere = {"kafka": kafka_at, "mongod": mongodb_at}
        self.own = [name for name in SERVERS if elsewhere[name] is None]
        self.credentials = credentials
        self.mongodb_files = mongod.data(folder / "mongod")
        self._folder = folder
        self._ports = ports
        self._kafka_at = kafka_at
        self._mongodb_at = mongodb_at
        self._topic_prefix = topic_prefix
        self._database_prefix = database_prefix

    def port_names(self) -> list[str]:
        return [*self.own, *(["kafka-controller"] if "kafka" in self.own else [])]

    def programs(self) -> Iterator[Program]:
        numbers = self._ports.numbers
        if "kafka" in self.own:
            command = kafka.command(
                self._folder / "kafka",
                numbers["kafka"],
                numbers["kafka-controller"],
                self.credentials,
                [self._topic_prefix + service for service in SERVICES],
            )
            yield Program("kafka", command, autostart=True)
        if "mongod" in self.own:
            command = mongod.command(self._folder / "mongod", numbers["mongod"], self.credentials)
            yield Program("mongod", command, autostart=True)

    def wait_until_ready(self) -> None:
        """Wait until the stack's own servers answer.

        Raises:
            TimeoutError: one does not.
        """
        if "mongod" in self.own:
            mongod.make_ready(self._ports.address("mongod"), credentials=self.credentials)
        if "kafka" in self.own:
            kafka.wait_until_up(self.kafka, settings=self.kafka_settings())

    def make_users(self) -> None:
        """Create the services' users of a secured mongod; those of Kafka are in its settings."""
        if self.credentials is not None:
            databases = {service: self.database(service) for service in WITH_DATABASE}
            mongod.make_users(self._ports.address("mongod"), self.credentials, databases)

    @property
    def kafka(self) -> str:
        return self._kafka_at or self._ports.address("kafka")

    def kafka_settings(self, service: str | None = None) -> KafkaSettings:
        """Return the Kafka settings of a service, or of the administrator."""
        if self.credentials is None:
            return KafkaSettings(kafka=self.kafka, topic_prefix=self._topic_prefix)
        user = ADMIN if service is None else self._topic_prefix + service
        return KafkaSettings(
            kafka=self.kafka,
            kafka_ca_file=self.credentials.authority,
            kafka_username=user,
            kafka_password_file=self.credentials.password_file(user),
            topic_prefix=self._topic_prefix,
        )

    def kafka_environment(self, service: str | None = None) -> dict[str, str]:
        """Return the same as environment variables."""
        settings = self.kafka_settings(service).model_dump(mode="json", exclude_none=True)
        return {f"SCANFLEET_{name.upper()}": value for name, value in settings.items()}

    @property
    def mongodb(self) -> str:
        """The URI of the administrator."""
        user = ADMIN if self.credentials else ""
        return self._mongodb_at or mongod.uri(self._ports.address("mongod"), user, credentials=self.credentials)

    def mongodb_of(self, service: str) -> str:
        """Return the URI of a service with a database."""
        if self.credentials is None:
            return self.mongodb
        return mongod.uri(self._ports.address("mongod"), service, self.database(service), self.credentials)

    def database(self, service: str) -> str:
        """Return the name of a service's database."""
        return f"{self._database_prefix}_{SERVICES[service].package}"
