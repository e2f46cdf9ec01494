"""Metrics of every task and the uncertainty of each number."""
