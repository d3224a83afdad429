"""Finished or running runs held against something else: a policy, another run, the model and the data themselves.

The room reads records and makes none. `policy`, `judge` and `compare` need nothing but the records, so that they work
on any file of them; they share one table of figures (`figures`), so that a policy, a baseline and `diff` mean the same
by a name. `verify` is a second implementation, kept apart on purpose.
"""
