"""Own subnets, policies, jobs and chunks: the state machines, dispatch and leases."""
