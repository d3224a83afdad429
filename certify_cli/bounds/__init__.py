"""Bounds of a network: Lipschitz constants and curvature. Every number is proved and rounded outward."""
