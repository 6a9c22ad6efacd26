"""What every Scanfleet service stands on: contracts, the bus runtime, and one way to be a service."""
