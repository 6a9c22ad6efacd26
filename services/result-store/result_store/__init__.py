"""Stores what was found and serves the views over it."""
