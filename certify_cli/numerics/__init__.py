"""Arithmetic with proved errors: directed rounding, verified eigenvalues and norms. Imports torch only.

A certificate is a proof only if no rounding works against it. Bounds are therefore rounded up or down by inflation
(`rounding`), and eigenvalues and norms are never taken from an iteration, which converges from the wrong side: an
estimate is made first, cheaply, and then proved (`eigen`, `norms`). `batched`, `choose` and `momentum` are plain
helpers and prove nothing.
"""
