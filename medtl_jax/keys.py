"""Random keys by name, so that one use never shifts the draws of another."""

import zlib

import jax


def named_key(key: jax.Array, name: str) -> jax.Array:
    """`key` folded with a name (`augment`, `dropout`, ...): the same in every process and run."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
