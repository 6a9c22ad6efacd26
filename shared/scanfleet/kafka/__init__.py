"""The bus on Kafka."""

from scanfleet.kafka.bus import KafkaBus

__all__ = ["KafkaBus"]
