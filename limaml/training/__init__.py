"""One step, the loop, checkpoints and the Ray Train entry."""
