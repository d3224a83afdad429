"""Bounds by the remainder identity: the network as a linearisation plus the remainders of its nonlinearities.

With any slopes, one per neuron, the margin at x + d is exactly f + <g, d> + sum of <v, q> (theory section 4). Modules
by what they bound: `tangent_bound` the margin with tangents at the sample, from ranges alone; `expansion` every
pre-activation, with the sums of `weighted_squares`; `margin_bound` the margin on top of that, with quadratic minorants,
whose sum is the maximum of a quadratic on a ball (`trust_region`). `optimise` and `trust_region_estimate` choose the
minorants, by estimates alone, and `margin_bound` proves the choice, so that the search needs no error analysis.
"""
