"""Rules of jobs, chunks and scheduling, without I/O."""
