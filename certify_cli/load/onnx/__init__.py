"""ONNX files, of any exporter and opset.

`loader` runs the steps: `file` reads safely and renames (`tensors`, `outputs`, `neutral_names`, `ml_operators`),
`interpret` evaluates one sample, `normalise` rewrites the graph to few operators (`rewriting`, the files of rules
`*_rewrites`, `patterns` for decomposed activations, `refused_blocks` for refusals), onnx2torch converts it with our
`converters`, and `layers` lowers the result. Any of these may be wrong, so `subgraph_checks` compares each rewritten
part, and `parity` the whole, with the file itself, evaluated in float64 and by onnxruntime (`runtime`).
"""
