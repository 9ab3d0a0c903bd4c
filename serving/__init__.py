"""The online half: one BentoML service that ranks candidates for a user (contracts 3, 4, 6 and 7)."""
