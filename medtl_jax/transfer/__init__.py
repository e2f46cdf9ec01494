"""Transfer: groups, phases and optimizers; norms by group; kept features and probes; drift."""
