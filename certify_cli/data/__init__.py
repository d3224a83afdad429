"""Data sets: named sets, .npz files and folders of images in one form, pixels in [0, 1].

A radius has a meaning only in a known unit, so samples are handed on in the data's own units and every normalisation is
a part of the network. Each kind of source checks sizes from headers before it reads anything, and reads only the chosen
samples (`source`); `datasets.load_data` is the entry.
"""
