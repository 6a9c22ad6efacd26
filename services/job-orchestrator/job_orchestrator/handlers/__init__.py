"""Handle each message: load, decide, save, publish."""
