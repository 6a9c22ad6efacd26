"""Test support of the gateway: the gateway with fakes of all other services."""
