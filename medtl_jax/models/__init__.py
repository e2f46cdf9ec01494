"""Backbones and heads in Flax Linen, and the registry that names them."""
