"""One train step, the loop around it, checkpoints and devices."""
