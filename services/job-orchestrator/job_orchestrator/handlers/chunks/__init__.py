"""Change and cancel chunks, and keep in memory what workers hold and users have used."""
