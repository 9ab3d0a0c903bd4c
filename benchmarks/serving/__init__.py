"""`make bench-serving`: the ranking service beside a BentoML no-op and a plain service that does the same work."""
