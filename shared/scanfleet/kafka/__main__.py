"""What an administrator of the brokers does: `python -m scanfleet.kafka …`; settings come from the environment."""

from __future__ import annotations

import argparse
import asyncio

from scanfleet.kafka.acls import create_acls
from scanfleet.kafka.topics import TopicSettings, create_topics
from scanfleet.settings import KafkaSettings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scanfleet.kafka", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("create-topics", help="make every topic, with its settings; again changes nothing")
    commands.add_parser("create-acls", help="give the user of each service its rights; again changes nothing")
    match parser.parse_args().command:
        case "create-topics":
            asyncio.run(create_topics(TopicSettings()))
        case "create-acls":
            asyncio.run(create_acls(KafkaSettings()))


if __name__ == "__main__":
    main()
