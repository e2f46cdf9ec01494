"""Transfer: frozen / low / high groups and their optimizers."""
