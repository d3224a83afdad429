"""Loading: a model file to a `Network`, with where it came from and how it is deployed.

A certificate is worth nothing for another model than the one that runs. Each format (`onnx`, `safetensors`) therefore
reads a file without running code from it, refuses by name what it cannot represent exactly, and is checked against the
file: ONNX models against a float64 evaluation and against onnxruntime. `model.load_model` tells the format;
`preprocessing` puts mean, std and layout in front of the network, so that it takes samples in the data's units.
"""
