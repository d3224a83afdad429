"""Activations: elementwise nonlinear functions, and bounds of them on an interval.

An activation is one row of a table (`rows`, entered in `table`, looked up by torch module, ONNX operator or name), so
that a new function needs no code elsewhere. A row gives phi, phi' and phi'' as piecewise monotone curves
(`monotone_pieces`, `formulas`). Everything else is derived from these alone: bounds of slopes, secants and remainders
on any interval (`interval_bounds`, by `cells`), offsets of quadratic minorants (`quadratic_minorants`), constants
around a point (`anchored_table`), and estimates for optimisers (`grid_estimates`). Import the table from here: `rows`
fills it.
"""

from certify_cli.network.activations.rows import ACTIVATIONS, Activation, from_module, from_name, from_onnx
from certify_cli.network.activations.table import to_module

__all__ = ["ACTIVATIONS", "Activation", "from_module", "from_name", "from_onnx", "to_module"]
