"""Decide on what callers request: submit and cancel jobs."""
