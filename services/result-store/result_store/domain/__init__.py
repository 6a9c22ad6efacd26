"""Decisions of result-store without I/O, and the ports of its handlers and routes."""
