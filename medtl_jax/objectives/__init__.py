"""Loss terms with the signature (out, batch, params, anchor) -> (masked sum, count)."""
