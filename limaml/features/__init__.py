"""Features as numbers, and Feast: its registry, the point-in-time join, the online stores' bulk path."""
