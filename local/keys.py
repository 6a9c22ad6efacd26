"""Create the keys and secrets of docker-compose.yml, once: `python -m local.keys /jwt /secrets`.

Each folder in `/secrets` is a volume mounted by one service only, so its files may be readable by any user there.
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path
from secrets import token_hex
from typing import Final

from cryptography.fernet import Fernet

from local.credentials import make_service_certificates
from local.tokens import Issuer, make_signing_keys
from scanfleet.services import GATEWAY, ORCHESTRATOR, RESULT_STORE, SERVICES, WITH_DATABASE

CERTIFICATE_LIFE: Final = timedelta(days=3650)  # as long as the volumes that contain them
DATABASES: Final = {service: f"scanfleet_{SERVICES[service].package}" for service in WITH_DATABASE}


def make(folder: Path) -> None:
    """Create the missing files in each service's folder: passwords, keys, MongoDB URIs, MongoDB's member key."""
    # A volume belongs to one service, which runs as another user.
    services = (folder / service / "internal-public.pem" for service in DATABASES)
    make_signing_keys(folder / GATEWAY / "internal.pem", *services, mode=0o644)
    public = folder / RESULT_STORE / "chunk-public.pem"
    make_signing_keys(folder / ORCHESTRATOR / "chunk.pem", public, mode=0o644)
    make_service_certificates(folder, life=CERTIFICATE_LIFE, mode=0o644)
    _once(folder / ORCHESTRATOR / "audit-key", token_hex(24))
    _once(folder / GATEWAY / "session-keys", Fernet.generate_key().decode())
    for service in folder.iterdir():
        if service.name == "mongodb":
            _once(service / "key", token_hex(24))
            _once(service / "password", token_hex(24))
            continue
        _once(service / "kafka-password", token_hex(24))
        if database := DATABASES.get(service.name):
            password = _once(service / "mongodb-password", token_hex(24))
            uri = f"mongodb://{service.name}:{password}@mongodb/?replicaSet=scanfleet&authSource={database}"
            _once(service / "mongodb", uri)


def _once(file: Path, content: str) -> str:
    """Return the content of the file, created with `content` if missing."""
    if not file.exists():
        file.write_text(content)
    return file.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m local.keys", description=__doc__)
    parser.add_argument("jwt", type=Path)
    parser.add_argument("secrets", type=Path)
    arguments = parser.parse_args()
    Issuer(arguments.jwt)
    make(arguments.secrets)


if __name__ == "__main__":
    main()
