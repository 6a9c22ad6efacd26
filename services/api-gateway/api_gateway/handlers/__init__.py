"""What the gateway does with the bus: commands and their replies, and events for whoever watches a job."""
