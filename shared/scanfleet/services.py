"""The services of the platform: the one list for code, tools and tests.

`tests/house/test_services.py` compares it with the files that cannot import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

GATEWAY: Final = "api-gateway"
ORCHESTRATOR: Final = "job-orchestrator"
WORKER: Final = "scanner-worker"
RESULT_STORE: Final = "result-store"


@dataclass(frozen=True, slots=True)
class Service:
    """One service.

    Attributes:
        name: of its image, its user at Kafka and its folder in `services/`.
        api: whether it serves requests; every service serves probes.
        database: whether it has its own MongoDB database, and so reads topics as a member of consumer groups.
    """

    name: str
    api: bool
    database: bool

    @property
    def package(self) -> str:
        return self.name.replace("-", "_")


SERVICES: Final = {
    service.name: service
    for service in (
        Service(GATEWAY, api=True, database=False),
        Service(ORCHESTRATOR, api=True, database=True),
        Service(WORKER, api=False, database=False),
        Service(RESULT_STORE, api=True, database=True),
    )
}
IMAGES: Final = (*SERVICES, "cli")
"""Names of the images: of the services, and of the command line."""
WITH_API: Final = tuple(name for name, service in SERVICES.items() if service.api)
WITH_DATABASE: Final = tuple(name for name, service in SERVICES.items() if service.database)
