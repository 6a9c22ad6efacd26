"""mongod as a replica set of one member: its command and its initialisation.

A replica set is required for majority writes and sessions.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from pymongo import MongoClient
from pymongo.errors import NotPrimaryError, OperationFailure

from local.credentials import ADMIN, Credentials
from local.paths import TOOLS
from local.wait import until

REPLICA_SET = "scanfleet"
READY_SECONDS = 60  # timeout of a primary
# mongod's error codes
UNAUTHORIZED = 13
ALREADY_INITIALIZED = 23
NOT_YET_INITIALIZED = 94
USER_EXISTS = 51_003


def command(folder: Path, port: int, credentials: Credentials | None = None) -> list[str]:
    """Return the command that runs mongod in the foreground with its data under `folder`, secured by `credentials`."""
    data(folder).mkdir(parents=True, exist_ok=True)
    return [
        shutil.which("mongod") or str(TOOLS / "mongod/fiftyone/db/bin/mongod"),
        *("--dbpath", str(data(folder))),
        *("--port", str(port)),
        *("--bind_ip", "127.0.0.1"),
        *("--replSet", REPLICA_SET),
        # By default it would use half of the memory and a twentieth of the disk.
        *("--wiredTigerCacheSizeGB", "0.5"),
        *("--oplogSize", "512"),  # MB
        "--nounixsocket",
        "--quiet",
        *(_secured(credentials) if credentials else ()),
    ]


def data(folder: Path) -> Path:
    """Return the folder of its files."""
    return folder / "data"


def _secured(credentials: Credentials) -> list[str]:
    members = credentials.file("mongod-key", token_hex(24))  # authenticates members of the replica set
    return [
        *("--keyFile", str(members)),
        *("--tlsMode", "requireTLS"),
        *("--tlsCertificateKeyFile", str(credentials.server)),
        *("--tlsCAFile", str(credentials.authority)),
        "--tlsAllowConnectionsWithoutCertificates",  # clients use passwords
    ]


def uri(address: str, user: str = "", database: str = "admin", credentials: Credentials | None = None) -> str:
    """Return the URI of the only member, as a direct connection, so its own name in the replica set does not matter.

    With `credentials` it is the URI of a user that is stored in `database`, else an anonymous one.
    """
    if credentials is None:
        return f"mongodb://{address}/?directConnection=true"
    tls = f"directConnection=true&tls=true&tlsCAFile={credentials.authority}"
    if not user:
        return f"mongodb://{address}/?{tls}"
    return f"mongodb://{user}:{credentials.password(user)}@{address}/?{tls}&authSource={database}"


def make_ready(address: str, member: str | None = None, credentials: Credentials | None = None) -> None:
    """Initiate the replica set if necessary, update its address if it has changed, and wait for its primary.

    Args:
        address: address for this process, `host:port`.
        member: its own address of itself, if different (in a container).
        credentials: for a secured server; its administrator is created too.

    Raises:
        TimeoutError: no primary in time.
    """
    member = member or address
    config = {"_id": REPLICA_SET, "members": [{"_id": 0, "host": member}]}
    if credentials is not None:
        _make_admin(address, config, credentials)
    with _client(uri(address, ADMIN if credentials else "", credentials=credentials)) as client:
        try:
            current = client.admin.command("replSetGetConfig")["config"]
        except OperationFailure as error:
            if error.code != NOT_YET_INITIALIZED:
                raise
            client.admin.command("replSetInitiate", config)
        else:
            if current["members"][0]["host"] != member:
                client.admin.command("replSetReconfig", config | {"version": current["version"] + 1}, force=True)
        until(
            lambda: bool(client.admin.command("hello")["isWritablePrimary"]), READY_SECONDS, f"a primary at {address}"
        )


def make_users(address: str, credentials: Credentials, databases: Mapping[str, str]) -> None:
    """Create each user of `databases` in the database that it may read and write."""
    with _client(uri(address, ADMIN, credentials=credentials)) as client:
        for user, database in databases.items():
            roles = [{"role": "readWrite", "db": database}]
            with _unless(USER_EXISTS):
                client[database].command("createUser", user, pwd=credentials.password(user), roles=roles)


def _make_admin(address: str, config: Mapping[str, Any], credentials: Credentials) -> None:
    """Initiate the replica set and create its first user, by the localhost exception."""
    with _client(uri(address, credentials=credentials)) as client:
        with _unless(UNAUTHORIZED, ALREADY_INITIALIZED):
            client.admin.command("replSetInitiate", config)

        def made() -> bool:
            try:
                with _unless(UNAUTHORIZED):
                    client.admin.command("createUser", ADMIN, pwd=credentials.password(ADMIN), roles=["root"])
            except NotPrimaryError:
                return False
            return True

        until(made, READY_SECONDS, f"a primary at {address}")


def _client(uri: str) -> MongoClient[dict[str, Any]]:
    return MongoClient(uri, serverSelectionTimeoutMS=READY_SECONDS * 1_000)


@contextmanager
def _unless(*codes: int) -> Iterator[None]:
    """Treat an error with one of these codes as success: it was done before."""
    try:
        yield
    except OperationFailure as error:
        if error.code not in codes:
            raise
