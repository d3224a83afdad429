"""Arithmetic that may be trusted: directed rounding, verified eigenvalues, verified norms. Imports torch only."""
