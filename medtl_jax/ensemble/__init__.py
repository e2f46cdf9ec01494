"""Ensembles: members trained as one program, and their fusion in scores or in weights."""
