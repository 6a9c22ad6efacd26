"""The ports of the handlers."""
