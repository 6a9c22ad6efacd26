"""The vocabulary of a scan: targets, ports, policies and outcomes."""
