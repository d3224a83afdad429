"""The one form of a model: a small graph of affine operations, joins and nonlinear nodes."""
