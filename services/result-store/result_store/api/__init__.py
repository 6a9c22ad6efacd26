"""Serve results and hosts to the gateway."""
