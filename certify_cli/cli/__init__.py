"""The commands of `curvcert`: a module each, and the modules that they share.

A command reads options, calls the library, and writes text to a sink; it computes nothing itself. Options are declared
once (`options`, `record_options`, `run_options`). Data goes to stdout or the output file, all else to stderr
(`reporter`). Nothing here imports torch at the top of a module: `--help` and completion answer at once.
"""
