"""What the orchestrator does with each message: load, decide, save, publish."""
