"""Data sets: what they are, how they are read, and how batches are drawn."""
