"""Vectors of items from pretrained encoders and other sources. Only the command line imports it: what it makes is data."""
