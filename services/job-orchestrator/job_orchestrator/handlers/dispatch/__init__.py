"""Dispatch queued chunks: the workers and their credit, the picks of a round, their attempts."""
