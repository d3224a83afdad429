"""Attacks: perturbations whose replay provably changes the prediction.

An attack bounds the largest possible certified radius from above, whether a certificate yields it or a search (`ddn`)
finds it. Neither is trusted: `replay` evaluates the network at the perturbed point, with a bound of its rounding
errors, and only an attack that passes is reported. The room imports nothing of `certificates`, whose certified attacks
are replayed as well.

`measured_curvature` measures the network at samples. It finds no attacks, and like a search no bounds.
"""
