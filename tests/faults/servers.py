"""Kafka and mongod of a platform, behind proxies."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from local import kafka, mongod, ports
from local.supervisor import Process, Program, Supervisor
from scanfleet.kafka.topics import TopicSettings, create_topics
from scanfleet.services import SERVICES, WITH_DATABASE
from tests.faults.proxies import FaultProxies, FaultProxy


class Servers:
    """One broker and one mongod, which each service reaches through its own proxies.

    Attributes:
        kafka: bootstrap address without a proxy.
        mongodb: URI without a proxy.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._supervisor = Supervisor(folder)
        self._proxies = FaultProxies()
        self._numbers = {name: ports.choose() for name in ("kafka", "controller", "mongod", *SERVICES)}
        self._to_kafka = {name: self._proxies.open("127.0.0.1", self._numbers[name]) for name in SERVICES}
        self._to_mongod = {name: self._proxies.open("127.0.0.1", self._numbers["mongod"]) for name in WITH_DATABASE}
        self.kafka = f"127.0.0.1:{self._numbers['kafka']}"
        self.mongodb = mongod.uri(self._mongod_address)

    def up(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._supervisor.launch(
            [
                Program("kafka", self._kafka_command(), autostart=True),
                Program("mongod", self._mongod_command(), autostart=True),
            ],
        )
        self.wait_until_ready()

    def down(self) -> None:
        self._supervisor.shut_down()
        self._proxies.close()

    def kill(self) -> None:
        self._supervisor.kill()
        self._proxies.close()

    def processes(self) -> list[Process]:
        return self._supervisor.processes()

    def stop(self, name: str) -> None:
        self._supervisor.stop([name])

    def start(self, *names: str) -> None:
        self._supervisor.start(list(names))
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until Kafka and mongod answer."""
        mongod.make_ready(self._mongod_address)
        kafka.wait_until_up(self.kafka)

    def lose_the_log(self) -> None:
        """Restart the broker without its data; its topics are created again."""
        self.stop("kafka")
        shutil.rmtree(self._folder / "kafka" / "data")
        self._kafka_command()  # it formats the folder
        self.start("kafka")
        asyncio.run(create_topics(TopicSettings(kafka=self.kafka)))

    def proxy(self, service: str, to: str) -> FaultProxy:
        """Return the proxy between every process of `service` and `kafka` or `mongod`."""
        return (self._to_kafka if to == "kafka" else self._to_mongod)[service]

    def proxies(self, to: str) -> list[FaultProxy]:
        """Return the proxies of all services."""
        return list((self._to_kafka if to == "kafka" else self._to_mongod).values())

    def settings_of(self, service: str) -> dict[str, str | None]:
        """Return the addresses of the proxies of a service."""
        found: dict[str, str | None] = {"SCANFLEET_KAFKA": f"127.0.0.1:{self._to_kafka[service].port}"}
        if service in self._to_mongod:
            found["SCANFLEET_MONGODB"] = mongod.uri(f"127.0.0.1:{self._to_mongod[service].port}")
        return found

    @property
    def _mongod_address(self) -> str:
        return f"127.0.0.1:{self._numbers['mongod']}"

    def _kafka_command(self) -> list[str]:
        folder = self._folder / "kafka"
        command = kafka.command(folder, self._numbers["kafka"], self._numbers["controller"])
        # Each service connects to the broker by the address of its proxy; the last value in the file wins.
        names = {service: service.replace("-", "").upper() for service in SERVICES}
        plain = f"PLAINTEXT://127.0.0.1:{self._numbers['kafka']}"
        own = [f"{names[service]}://127.0.0.1:{self._numbers[service]}" for service in SERVICES]
        advertised = [f"{names[service]}://127.0.0.1:{self._to_kafka[service].port}" for service in SERVICES]
        controller = f"CONTROLLER://127.0.0.1:{self._numbers['controller']}"
        protocols = ",".join(f"{name}:PLAINTEXT" for name in ("CONTROLLER", "PLAINTEXT", *names.values()))
        with (folder / "server.properties").open("a") as properties:
            properties.write(f"listeners={','.join([plain, *own, controller])}\n")
            properties.write(f"advertised.listeners={','.join([plain, *advertised])}\n")
            properties.write(f"listener.security.protocol.map={protocols}\n")
            properties.write("inter.broker.listener.name=PLAINTEXT\n")
        return command

    def _mongod_command(self) -> list[str]:
        command = mongod.command(self._folder / "mongod", self._numbers["mongod"])
        return [*command, "--setParameter", "enableTestCommands=1"]  # required by failCommand
