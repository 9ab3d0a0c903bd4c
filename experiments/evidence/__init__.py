"""Evidence of what a stored embedding adds, on several worlds, beside the rivals that their users would run."""
