"""Ours and the rivals, each as one function: fit on an origin's training rows, choose on its validation users, score."""
