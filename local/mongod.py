"""mongod as a replica set of one: how to start it and how to make it usable.

A replica set, because majority writes and sessions exist only there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from pymongo.errors import OperationFailure

from local.paths import TOOLS
from local.wait import until

REPLICA_SET = "scanfleet"
NOT_YET_INITIALIZED = 94  # mongod's error code


def command(folder: Path, port: int) -> list[str]:
    """The command that runs mongod in the foreground, its data under `folder`."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    return [
        shutil.which("mongod") or str(TOOLS / "mongod/fiftyone/db/bin/mongod"),
        *("--dbpath", str(data)),
        *("--port", str(port)),
        *("--bind_ip", "127.0.0.1"),
        *("--replSet", REPLICA_SET),
        # By default half of the memory and a twentieth of the disk would be its own.
        *("--wiredTigerCacheSizeGB", "0.5"),
        *("--oplogSize", "512"),  # MB
        "--nounixsocket",
        "--quiet",
    ]


def uri(address: str) -> str:
    """How clients reach the only member: without asking it for others, so its own name for itself does not matter."""
    return f"mongodb://{address}/?directConnection=true"


def make_ready(address: str, member: str | None = None, limit: float = 60.0) -> None:
    """Make the replica set if it is not there, move it if its address was another, and wait for its primary.

    Args:
        address: where we reach it, `host:port`.
        member: where it reaches itself, if that is another (in a container).
        limit: seconds.

    Raises:
        TimeoutError: no primary in time.
    """
    milliseconds = int(limit * 1000)
    member = member or address
    with MongoClient[dict[str, Any]](address, directConnection=True, serverSelectionTimeoutMS=milliseconds) as client:
        config = {"_id": REPLICA_SET, "members": [{"_id": 0, "host": member}]}
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
