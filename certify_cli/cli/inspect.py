"""`curvcert inspect`: the nodes of a loaded model, and the methods that apply to it."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from certify_cli.cli import options as opt
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.sink import sink
from certify_cli.names import SUMMARIES
from certify_cli.output.console import Column, grid, pairs
from certify_cli.output.document import View
from certify_cli.output.json import pretty
from certify_cli.output.layers import shape_text
from certify_cli.output.numbers import UP, near_one
from certify_cli.plain import binary_size
from certify_cli.records import SCHEMA

if TYPE_CHECKING:
    from certify_cli.load.loaded_model import LoadedModel
    from certify_cli.network.graph import Op


def inspect(
    model: opt.ModelFile,
    activation: opt.ActivationName = None,
    output: opt.ModelOutput = None,
    input_shape: opt.InputShape = None,
    format: opt.PlainFormat = None,
    output_file: opt.OutputFile = None,
    quiet: opt.Quiet = False,
) -> None:
    """Show what a model file holds and which methods apply."""
    form = opt.format_of(format, output_file, opt.PLAIN_FORMATS)
    with sink(output_file) as out, Reporter(quiet) as reporter:
        from certify_cli import load_model

        loaded = load_model(model, activation=activation, output=output, input_shape=opt.shape(input_shape))
        found = describe(loaded)
        if form == "json":
            out.write(pretty(found) + "\n")
        else:
            reporter.notes(loaded.notes)
            out.write(as_text(found, out.view))


def describe(loaded: LoadedModel) -> dict[str, Any]:
    """The model, its nodes in order, residual blocks of a known form, and every method, with the reason against it."""
    from certify_cli.bounds.global_bounds.chain import recognised_blocks
    from certify_cli.certificates.footprints import of_process, wanted
    from certify_cli.certificates.methods import METHODS
    from certify_cli.efforts import NORMAL

    nodes = loaded.network.nodes
    reasons = {name: method.applies(loaded.network) for name, method in METHODS.items()}
    return {
        "schema": SCHEMA,
        "model": asdict(loaded.info),
        "input_shape": list(loaded.input_shape),
        "stored_dtype": loaded.stored_dtype,
        "parameters": sum(parameter_count(node.op) for node in nodes),
        "process_memory": of_process(loaded.network),
        "notes": list(loaded.notes),
        "nodes": [
            {
                "name": node.name,
                "operation": node.op.title,
                "inputs": [nodes[i].name for i in node.inputs],
                "shape": list(node.shape),
                "parameters": parameter_count(node.op),
            }
            for node in nodes
        ],
        "blocks": [
            {
                "form": block.form,
                "from": nodes[first].name,
                "to": nodes[last].name,
                "lipschitz": block.constant,
            }
            for (first, last), block in recognised_blocks(loaded.network, NORMAL.budget).items()
        ],
        "methods": [
            {
                "name": name,
                "summary": SUMMARIES[name],
                "applies": reason is None,
                "reason": reason,
                "memory": wanted(name, loaded.network),
            }
            for name, reason in reasons.items()
        ],
    }


def parameter_count(op: Op) -> int:
    """The number of real numbers that the operation holds; not index maps, nor the rest of rounded constants."""
    from torch import Tensor

    if not is_dataclass(op):
        return 0
    values = (getattr(op, item.name) for item in fields(op) if item.name != "weight_tail")
    return sum(value.numel() for value in values if isinstance(value, Tensor) and value.is_floating_point())


BLOCK_COLUMNS = (
    Column("block"),
    Column("from"),
    Column("to"),
    Column("Lipschitz constant", right=True),
)
NODE_COLUMNS = (
    Column("#", right=True),
    Column("node"),
    Column("operation"),
    Column("inputs", wraps=True),  # numbers of nodes: names are long, and in a chain the one above
    Column("shape"),
    Column("parameters", right=True),
)


def as_text(found: dict[str, Any], view: View) -> str:
    """What inspect found, as text: the model, then a table of its nodes."""
    model = found["model"]
    opset = f", opset {model['opset']}" if model["opset"] is not None else ""
    head = pairs(
        [
            ("model", model["path"]),
            ("format", f"{model['format']}{opset}"),
            ("sha256", model["sha256"]),
            ("input shape", shape_text(found["input_shape"])),
            ("classes", str(model["classes"])),
            ("stored as", found["stored_dtype"]),
            ("parameters", str(found["parameters"])),
            ("memory", f"{binary_size(found['process_memory'])} for the program and the model, besides a method's"),
        ]
    )
    number_of = {node["name"]: str(position) for position, node in enumerate(found["nodes"])}
    nodes = [
        (
            number_of[node["name"]],
            node["name"],
            node["operation"],
            ", ".join(number_of[name] for name in node["inputs"]),
            shape_text(node["shape"]),
            str(node["parameters"] or "-"),
        )
        for node in found["nodes"]
    ]
    methods = [
        (
            method["name"],
            "applies" if method["applies"] else "does not apply",
            binary_size(method["memory"]) if method["applies"] else "-",
            method["reason"] or method["summary"],
        )
        for method in found["methods"]
    ]
    method_columns = (
        Column("method"),
        Column("verdict"),
        Column("memory", right=True),  # for one sample
        Column("explanation", wraps=True),
    )
    blocks = [(b["form"], b["from"], b["to"], near_one(b["lipschitz"], UP)) for b in found["blocks"]]
    recognised = f"{grid(BLOCK_COLUMNS, blocks, view)}\n" if blocks else ""
    return f"{head}\n{grid(NODE_COLUMNS, nodes, view)}\n{recognised}{grid(method_columns, methods, view)}"
