"""What a worker does with its tasks."""
