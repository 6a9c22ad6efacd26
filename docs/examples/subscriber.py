"""Print one line of JSON for each port that scans find: an example of a subscriber to `scan-results`.

Delivery is at least once, and a subscriber that stops between printing and committing prints its last rows again. So every
row has an `id` that is the same in each copy: write rows to a table with it as the primary key. The example needs aiokafka
only; docs/events.md describes all messages and fields.

    python docs/examples/subscriber.py --bootstrap 127.0.0.1:9092 --topic scan-results
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any

from aiokafka import AIOKafkaConsumer

HOST = "scanfleet.HostScanned.v1"


def rows(host: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return one row per port of a HostScanned; unknown fields are ignored, because contracts grow by new ones."""
    for port in host["ports"]:
        yield {
            "id": f"{host['event_id']}/{port['protocol']}/{port['port']}",
            "job_id": host["job_id"],
            "user_id": host["user_id"],
            "address": host["address"],
            "protocol": port["protocol"],
            "port": port["port"],
            "status": port["status"],
            "service": port["service"],
            "version": port["version"],
        }


async def subscribe(bootstrap: str, topic: str, group: str) -> None:
    """Print the rows of all records that the group has not committed yet, then of new ones, until the process is stopped."""
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=bootstrap,
        group_id=group,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    async with consumer:
        while True:
            batches = await consumer.getmany(timeout_ms=1_000)
            for record in (record for batch in batches.values() for record in batch):
                # A topic may get further types of messages.
                if dict(record.headers).get("ce_type") == HOST.encode():
                    # JSON in ASCII: names and banners are texts of strangers, and a terminal obeys control characters.
                    sys.stdout.writelines(json.dumps(row) + "\n" for row in rows(json.loads(record.value)))
            sys.stdout.flush()
            if batches:
                await consumer.commit()  # only rows that were written


def main() -> None:
    parser = argparse.ArgumentParser(description="Print one line of JSON for each port that scans find.")
    parser.add_argument("--bootstrap", required=True, help="a Kafka broker, as host:port")
    parser.add_argument("--topic", default="scan-results", help="the topic, with its prefix if the platform has one")
    parser.add_argument("--group", default="example-subscriber", help="consumer group, whose position is committed")
    given = parser.parse_args()
    try:
        asyncio.run(subscribe(given.bootstrap, given.topic, given.group))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
