"""Use the bus: publish commands and receive their replies, and receive job events for subscriptions."""
