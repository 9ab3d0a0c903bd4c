"""Inner and outer loop: the plain reference and the form batched over tasks."""
