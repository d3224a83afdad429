"""Matrices behind the bounds: the network's weights and Jacobians as linear maps, and norms of them.

Three modules describe the maps: `weight_blocks` (norms of the maps between consecutive nonlinear nodes, which need no
sample), `jacobians` (the maps of the network linearised at each sample) and `row_sparsity` with `row_operators` (how to
multiply with rows of convolutions, which use few columns). `weighted_gram` bounds the eigenvalues that every curvature
bound ends in. The maps stand in a room of their own because global and local bounds differ in the slopes that they
linearise at, and in nothing else. Every norm is an upper bound that includes the error of the computed entries.
"""
