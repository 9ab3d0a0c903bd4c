"""Storage, local or remote, and the locks over it: the only place that tells one from the other."""
