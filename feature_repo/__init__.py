"""Feast: entities, sources, views and services; registered by `limaml apply`, or by Feast's own command line from here."""
