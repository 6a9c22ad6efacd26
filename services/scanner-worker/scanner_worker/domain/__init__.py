"""Decisions of the worker without I/O, and the ports of its handlers."""
