"""Bounds on one ball around each sample that need no linear relaxation and no Taylor remainder.

`interval_ranges` is the base of everything local: intervals and norms of every pre-activation's change on the ball,
from a few forward passes. On these ranges `lipschitz` bounds the slopes of the ball, for every network, `hessian` its
curvature, for smooth networks, and `max_pooling` gives linear bounds of group maps. `affine_loss` is the form in which
bounds of a margin are handed on: affine in the radius, so that one ball also certifies the smaller ones. Ranges are
arguments of the other bounds, not computed in them, so that every bound gains when another method narrows them.
"""
