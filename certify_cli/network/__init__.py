"""Networks: the one form of a model, a small graph of affine operations, joins and nonlinear nodes.

A bound must know exactly what it bounds. Every file format is therefore lowered (`lowering`) to a `Network` of a few
primitives with known norms (`affine`, `convolution`, `graph`, `pooling`) and to activations of one table
(`activations`); a layer outside these is refused, not approximated. All bounds, certificates and commands see networks
only, so that a new layer or format needs no new bound. `evaluate` computes values with bounds of their rounding errors,
`propagate` carries vectors and intervals through the linearised network.
"""
