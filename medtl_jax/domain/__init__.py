"""Domain adaptation: terms of the one step, and batch statistics of each domain's own."""
