"""Serve the public REST API: check tokens, publish commands, forward queries."""
