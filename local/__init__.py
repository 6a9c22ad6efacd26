"""The local stack: real Kafka, real mongod and the four services on this machine, without Docker."""
