"""Linear relaxation of the network on a ball around each sample: CROWN, intermediate bounds, optimised slopes.

`backward` bounds every nonlinearity by lines on its range and substitutes them backward; it needs ranges, which
`intermediate_bounds` narrows by the same bound, layer after layer. `optimise` improves the slopes for one row, with the
proved constants of `supporting_lines`. Lines are bounded through the remainder identity (theory section 4) instead of
by substituting inequalities, so that rounding enters by the errors of computed adjoints and no coefficient needs a
directed rounding.
"""
