"""Runs: samples in, records out, in order and as they are done."""
