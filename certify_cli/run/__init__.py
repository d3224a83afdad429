"""Runs: samples in, records out, in order and as they are done.

`engine` prepares a run from a model, data and `settings`, and yields its records batch by batch; the command line and
the library (`library`) only consume them, so that both report the same. Everything on which a record depends stands in
the run record (`provenance`), and batches are fixed by it: a run that was stopped can go on (`resume`) with the same
records as if it had not been. `sample_records` is the only place where tensors become records.
"""
