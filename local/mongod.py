"""mongod as a replica set of one: how to start it and how to make it usable.

A replica set, because majority writes and sessions exist only there.
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
# mongod's error codes
UNAUTHORIZED = 13
ALREADY_INITIALIZED = 23
NOT_YET_INITIALIZED = 94
USER_EXISTS = 51_003


def command(folder: Path, port: int, credentials: Credentials | None = None) -> list[str]:
    """The command that runs mongod in the foreground, its data under `folder`; with `credentials` it asks who is there."""
    data(folder).mkdir(parents=True, exist_ok=True)
    return [
        shutil.which("mongod") or str(TOOLS / "mongod/fiftyone/db/bin/mongod"),
        *("--dbpath", str(data(folder))),
        *("--port", str(port)),
        *("--bind_ip", "127.0.0.1"),
        *("--replSet", REPLICA_SET),
        # By default half of the memory and a twentieth of the disk would be its own.
        *("--wiredTigerCacheSizeGB", "0.5"),
        *("--oplogSize", "512"),  # MB
        "--nounixsocket",
        "--quiet",
        *(_secured(credentials) if credentials else ()),
    ]


def data(folder: Path) -> Path:
    """Where its files are."""
    return folder / "data"


def _secured(credentials: Credentials) -> list[str]:
    members = credentials.file("mongod-key", token_hex(24))  # by which members of the replica set know each other
    return [
        *("--keyFile", str(members)),
        *("--tlsMode", "requireTLS"),
        *("--tlsCertificateKeyFile", str(credentials.server)),
        *("--tlsCAFile", str(credentials.authority)),
        "--tlsAllowConnectionsWithoutCertificates",  # clients have passwords
    ]


def uri(address: str, user: str = "", database: str = "admin", credentials: Credentials | None = None) -> str:
    """How clients reach the only member: without asking it for others, so its own name for itself does not matter.

    With `credentials` it is the URI of a user that is kept in `database`, or of nobody in particular.
    """
    if credentials is None:
        return f"mongodb://{address}/?directConnection=true"
    tls = f"directConnection=true&tls=true&tlsCAFile={credentials.authority}"
    if not user:
        return f"mongodb://{address}/?{tls}"
    return f"mongodb://{user}:{credentials.password(user)}@{address}/?{tls}&authSource={database}"


def make_ready(
    address: str, member: str | None = None, limit: float = 60.0, credentials: Credentials | None = None
) -> None:
    """Make the replica set if it is not there, move it if its address was another, and wait for its primary.

    Args:
        address: where we reach it, `host:port`.
        member: where it reaches itself, if that is another (in a container).
        limit: seconds.
        credentials: for one that asks who is there; its administrator is made too.

    Raises:
        TimeoutError: no primary in time.
    """
    member = member or address
    config = {"_id": REPLICA_SET, "members": [{"_id": 0, "host": member}]}
    if credentials is not None:
        _make_admin(address, config, limit, credentials)
    with _client(uri(address, ADMIN if credentials else "", credentials=credentials), limit) as client:
        try:
            current = client.admin.command("replSetGetConfig")["config"]
        except OperationFailure as error:
            if error.code != NOT_YET_INITIALIZED:
                raise
            client.admin.command("replSetInitiate", config)
        else:
            if current["members"][0]["host"] != member:
                client.admin.command("replSetReconfig", config | {"version": current["version"] + 1}, force=True)
        until(lambda: bool(client.admin.command("hello")["isWritablePrimary"]), limit, f"a primary at {address}")


def make_users(address: str, credentials: Credentials, databases: Mapping[str, str]) -> None:
    """Make each user of `databases`, who may read and write the one that it names, in that database."""
    with _client(uri(address, ADMIN, credentials=credentials)) as client:
        for user, database in databases.items():
            roles = [{"role": "readWrite", "db": database}]
            with _unless(USER_EXISTS):
                client[database].command("createUser", user, pwd=credentials.password(user), roles=roles)


def _make_admin(address: str, config: Mapping[str, Any], limit: float, credentials: Credentials) -> None:
    """Make the replica set and its first user, which on this machine nobody in particular may, once."""
    with _client(uri(address, credentials=credentials), limit) as client:
        with _unless(UNAUTHORIZED, ALREADY_INITIALIZED):
            client.admin.command("replSetInitiate", config)

        def made() -> bool:
            try:
                with _unless(UNAUTHORIZED):
                    client.admin.command("createUser", ADMIN, pwd=credentials.password(ADMIN), roles=["root"])
            except NotPrimaryError:
                return False
            return True

        until(made, limit, f"a primary at {address}")


def _client(uri: str, limit: float = 60.0) -> MongoClient[dict[str, Any]]:
    return MongoClient(uri, serverSelectionTimeoutMS=int(limit * 1000))


@contextmanager
def _unless(*codes: int) -> Iterator[None]:
    """Take a refusal with one of these codes for success: it was done before."""
    try:
        yield
    except OperationFailure as error:
        if error.code not in codes:
            raise
