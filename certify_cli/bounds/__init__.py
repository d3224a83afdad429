"""Bounds of networks: Lipschitz constants, curvature, and margins on balls. Every bound is proved, and rounded outward.

The rooms are ordered by the arguments of their bounds: `linear_maps` are norms of matrices, `global_bounds` hold for a
network, `on_ball` for a ball around a sample; `relaxation` and `remainder` bound margins on balls, by lines around
every nonlinearity and by its remainder. A room imports only from those before it; the last two do not import each
other. The search for the largest radius is not here but in `certificates`.

Code that proves a bound and code that chooses its free parameters are in different files. The choice is made in the
two modules `optimise` and in `trust_region_estimate`; an error there can make a bound loose, but not false.
"""
