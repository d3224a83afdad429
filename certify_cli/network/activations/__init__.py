"""Activations: elementwise nonlinear functions, and everything that the bounds ask of them on an interval.

`rows` holds one row a function, entered in the `table` that is looked up by torch module, ONNX operator or name. A row
gives phi, phi' and phi'' as monotone pieces; from these alone `interval_bounds` derives proved remainders on any
interval, `quadratic_minorants` the constants of quadratic lower bounds, `anchored_table` constants around a point, and
`grid_estimates` unproved guesses for what an optimiser chooses. Import the table from here: it is filled by `rows`.
"""

from certify_cli.network.activations.rows import ACTIVATIONS, Activation, from_module, from_name, from_onnx

__all__ = ["ACTIVATIONS", "Activation", "from_module", "from_name", "from_onnx"]
