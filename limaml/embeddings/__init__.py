"""Adapt entities, write a partition, publish it; fill a slot, cut over, and the daily run."""
