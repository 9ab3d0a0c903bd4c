"""Does it personalise? Every method on the same rows, with intervals (`make experiments`)."""
