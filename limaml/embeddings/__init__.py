"""Adapt entities, write a partition, publish it, and the slots' life."""
