"""Bounds that hold on the whole input space, or around a sample for every perturbation of any size.

`model_bounds` is the entrance: one object for each network and effort, from which methods take what they need. Behind
it are `lipschitz` (product of norms and LipLT), `curvature` (of each pair of classes) and `anchored` with
`anchored_network` (bounds of differences from a sample, sharper than the global ones and still valid for every d).
`layer_report` shows the same numbers by layer. They share a room because they are computed once for a network, whatever
the samples; every bound on a ball takes them as its upper limit.
"""
