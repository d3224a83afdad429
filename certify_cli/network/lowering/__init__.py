"""Lowering: from a torch.fx graph to a `Network`, layer by layer.

Every layer and function is looked up by its exact type in a table of rules (`context`, `torch_layers`); `fx_graph`
walks the graph. A type without a rule is refused by name: a bound holds for the layers that were read, and for nothing
else.
"""
