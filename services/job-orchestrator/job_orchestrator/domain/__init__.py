"""What jobs, chunks and schedules are: rules only, no I/O."""
