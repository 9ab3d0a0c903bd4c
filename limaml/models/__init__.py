"""Meta blocks, the global block, and the two joined."""
