"""safetensors files: weights, with an architecture declared as data.

A file of weights says nothing about the network, and code that would say it must not be run. So the architecture is a
list of layers in JSON (`architecture`), of types from one table (`declared_layers`), read field by field (`fields`).
Any `Network` can be declared, so the format is the target of `convert`.
"""
