"""Pretrained weights: sources, file formats, naming tables and the strict merge."""
