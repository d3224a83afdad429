"""Matrices behind the bounds: the network's weights and Jacobians as linear maps, and norms of them.

Three modules describe the maps: `weight_blocks` (norms of the maps from the input or a nonlinear node to a later pre-
activation, which need no sample), `jacobians` (the maps of the network linearised at each sample) and `row_matrices`
(how to multiply with rows of convolutions, which use few columns). `row_products` bounds weighted sums of squares of
such rows without an eigenvalue; `weighted_gram` bounds the eigenvalues that every curvature bound ends in. The maps
have a room of their own because global and local bounds need the same ones: only the slopes of the linearisation
differ. Every norm is an upper bound that includes the error of the computed entries.
"""
