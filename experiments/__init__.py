"""Experiments: each assembles the parts of medtl_jax and runs them."""
