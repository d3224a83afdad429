"""Certificates: radii and attacks that the bounds of a network prove for its samples.

A method (`methods`) maps a batch of evaluated samples to `Certificates`. It can start from those of cheaper methods, so
that `auto` is a loop over one table. There are two kinds of methods:

- Closed forms (`closed_form`, `anchoring`, `dual`, `dual_on_ball`) turn a margin, a gradient and a bound into a radius.
- Searches (`local`, `ball_search`) look for the largest ball on which a bound of that ball keeps every margin positive.
  `radius_bracket` proposes radii, and only a bound evaluated on a ball certifies it: estimates made by a search change
  how large the radius is, never whether it holds.
"""
