"""Predictions, figures, tables and the one-file HTML report."""
