"""Certificates: what a bound proves about one sample."""
