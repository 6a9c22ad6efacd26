"""Carry jobs on after their acceptance: create their chunks, publish their events, end, repair and delete them."""
