"""Bounds of networks: Lipschitz constants, curvature, and margins on balls. Every bound is proved, and rounded outward.

The rooms are ordered by what a bound knows. `linear_maps` knows matrices alone; `global_bounds` the network; `on_ball`
the ball around a sample; `relaxation` and `remainder` bound margins there, by lines around every nonlinearity and by
its Taylor remainder. A room imports only from rooms before it in this list: linear_maps, global_bounds, on_ball,
relaxation, remainder. Nothing here searches for a radius (that is in `certificates`) or looks at the data.

Code that proves a bound and code that chooses its free parameters are in different files. The choice is made in the
two modules `optimise` and in `trust_region_estimate`; an error there can make a bound loose, but not false.
"""
