"""Owns subnets, policies, jobs and chunks: the state machine, dispatch and leases."""
