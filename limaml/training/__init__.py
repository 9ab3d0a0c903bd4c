"""One step, the outer loop of all that is trained, twin and refit, checkpoints and the Ray Train entry."""
