"""`python -m scanfleet.kafka create-topics`: settings come from the environment."""

from __future__ import annotations

import argparse
import asyncio

from scanfleet.kafka.topics import TopicSettings, create_topics


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scanfleet.kafka", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("create-topics", help="make every topic, with its settings; again changes nothing")
    parser.parse_args()
    asyncio.run(create_topics(TopicSettings()))


if __name__ == "__main__":
    main()
