"""`curvcert train`: a classifier that is trained for its certificates."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from certify_cli.cli import options as opt
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.signals import Stopped
from certify_cli.cli.sink import sink
from certify_cli.errors import UsageError, quoted, shown
from certify_cli.output.console import pairs
from certify_cli.output.drawing import matplotlib
from certify_cli.output.json import pretty
from certify_cli.records import SCHEMA
from certify_cli.training.recipe import KEYS, OBJECTIVES, Recipe, is_named, read_recipe, suited, typed_text
from certify_cli.whole_file import refuse_existing, refuse_unwritable, write_whole

if TYPE_CHECKING:
    from certify_cli.data.datasets import Dataset
    from certify_cli.training.loop import Epoch, Training


def _of_recipe(flag: str, metavar: str, help: str) -> Any:
    """An option that replaces a value of the recipe."""
    return typer.Option(flag, metavar=metavar, help=help, show_default="the recipe's")


RecipeFile = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE", help="A recipe as TOML, or a model that train made.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the recipe (repeat).", show_default=False),
]
Arch = Annotated[
    str | None, _of_recipe("--arch", "NAME", "mlp:784-1024-10, conv:16,32-100, 4c3f, 6c2f, resnet:16-2 or sll:32-3.")
]
TrainedActivation = Annotated[
    str | None, _of_recipe("--activation", "NAME", "Such as softplus:5, tanh, relu or maxmin.")
]
ObjectiveName = Annotated[
    str | None, opt.choice("--objective", OBJECTIVES, "What to train for.", default="the recipe's")
]
Radius = Annotated[str | None, _of_recipe("--radius", "R", "The radius to train for, such as 1.58 or 36/255.")]
Epochs = Annotated[str | None, _of_recipe("--epochs", "N", "Passes over the data.")]
TrainedSeed = Annotated[str | None, _of_recipe("--seed", "N", "Seed of weights, order and augmentation.")]
TrainedData = Annotated[
    str | None, _of_recipe("--data", "SOURCE", "The data set, as for certify; its training split is used.")
]
ModelTarget = Annotated[
    str | None,
    typer.Option("--output-file", "-o", metavar="FILE", help="The .safetensors file to write.",
                 show_default="DATA_OBJECTIVE.safetensors"),
]  # fmt: skip
OnnxTarget = Annotated[
    str | None, typer.Option("--onnx", metavar="FILE", help="Write the model as ONNX, too.", show_default=False)
]
Continue = Annotated[
    bool, typer.Option("--resume", help="Go on from the checkpoint of the same run, which a stop leaves.")
]
ForceModel = Annotated[bool, typer.Option("--force", help="Overwrite the model and any checkpoint of it.")]
SavePlot = Annotated[
    str | None,
    typer.Option("--save-plot", metavar="FILE.svg", help="Draw loss and accuracies by epoch.", show_default=False),
]


def train(
    data: TrainedData = None,
    arch: Arch = None,
    activation: TrainedActivation = None,
    objective: ObjectiveName = None,
    radius: Radius = None,
    epochs: Epochs = None,
    seed: TrainedSeed = None,
    recipe: RecipeFile = None,
    set_: Set = None,
    output_file: ModelTarget = None,
    onnx: OnnxTarget = None,
    save_plot: SavePlot = None,
    resume: Continue = False,
    force: ForceModel = False,
    data_root: opt.DataRoot = None,
    offline: opt.Offline = False,
    device: opt.Device = "auto",
    threads: opt.Threads = "auto",
    format: opt.PrintedFormat = "table",
    quiet: opt.Quiet = False,
) -> None:
    """Train a classifier for its certificates.

    Models are compared by certified accuracy on training samples that are kept for it; the test samples are never seen.
    """
    opt.one_of("--format", format, opt.PLAIN_FORMATS)
    options = {
        "data": data,
        "arch": arch,
        "activation": activation,
        "objective": objective,
        "radius": radius,
        "epochs": epochs,
        "seed": seed,
    }
    chosen = recipe_of(recipe, options, set_ or ())
    target, onnx_file, plot_file = (
        _target(output_file, chosen),
        _named(onnx, "--onnx", ".onnx"),
        _named(save_plot, "--save-plot", ".svg"),
    )
    checkpoint = target.with_name(target.name + ".checkpoint")
    for path in (target, onnx_file, plot_file, checkpoint):
        if path is not None:
            refuse_unwritable(path)
    begun = checkpoint.exists()
    if begun and not (resume or force):
        raise UsageError(f"{checkpoint}: an unfinished run; go on with --resume, or begin anew with --force")
    for path in (target, onnx_file, plot_file):
        if path is not None and not (force or (resume and begun)):
            refuse_existing(path)
    with sink(None) as out, Reporter(quiet) as reporter:
        from certify_cli.output.training_plot import WHAT, training_plot
        from certify_cli.training.export import Made, refuse_unnamed, write_onnx

        if plot_file is not None:
            matplotlib(WHAT)
        training = _prepared(chosen, data_root, offline, device, threads, reporter)
        if onnx_file is not None:
            refuse_unnamed(training.module)
        if resume:
            _resumed(training, checkpoint, reporter)
        try:
            _run(training, checkpoint, reporter)
        except Stopped as stop:
            done = len(training.history)
            raise Stopped(stop.number, _hint(done, chosen.epochs)) from None
        made = Made.of(training)
        sha256 = made.write(target)
        if onnx_file is not None:
            write_onnx(training, onnx_file)
        if plot_file is not None:
            write_whole(plot_file, training_plot(training.history, chosen.radius))
        if format == "json":
            history = [
                {**asdict(epoch), "loss": epoch.loss if math.isfinite(epoch.loss) else None}
                for epoch in training.history
            ]
            body = {"schema": SCHEMA, "model": str(target), "sha256": sha256, **made.document(), "epochs": history}
            out.write(pretty(body) + "\n")
        else:
            out.write(pairs(_summary(target, sha256, made, chosen)))
        checkpoint.unlink(missing_ok=True)


def recipe_of(path: str | None, options: dict[str, str | None], settings: Sequence[str]) -> Recipe:
    """The recipe of a file, or the one suited to the data, with what the command line sets. Raises UsageError."""
    given = {key: typed_text(key, text) for key, text in options.items() if text is not None}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.replace("-", "_")
        if not equals or key not in KEYS:
            raise UsageError(f"--set {quoted(setting)} is not KEY=VALUE with a key among {', '.join(KEYS)}")
        given[key] = typed_text(key, text)
    read = {} if path is None else {key.replace("-", "_"): value for key, value in read_recipe(path).items()}
    values = {**read, **given}
    data = values.get("data")
    recipe = (suited(data) if isinstance(data, str) else Recipe()).with_values(values)
    if data is None:
        raise UsageError("name the data with --data, such as mnist or digits, or in a recipe with --recipe")
    return recipe


def _target(output: str | None, recipe: Recipe) -> Path:
    stem = Path(recipe.data).stem or "model"
    path = Path(output or f"{shown(stem)}_{recipe.objective}.safetensors")
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"--output-file {quoted(str(path))}: the model's name must end in .safetensors")
    return path


def _named(path: str | None, option: str, suffix: str) -> Path | None:
    if path is not None and Path(path).suffix.lower() != suffix:
        raise UsageError(f"{option} {quoted(path)}: the file's name must end in {suffix}")
    return None if path is None else Path(path)


def _prepared(
    recipe: Recipe, root: str | None, offline: bool, device: str, threads: str, reporter: Reporter
) -> Training:
    import torch

    from certify_cli import load_data
    from certify_cli.run.engine import device_named
    from certify_cli.training.loop import Training, TrainingData

    count = opt.count_or_auto("--threads", threads)
    if count is not None:
        torch.set_num_threads(count)
    reporter.stage("reading the data")
    found: Dataset = load_data(
        recipe.data,
        root=root,
        split="train" if is_named(recipe.data) else "test",  # a file has no splits: it is whole either way
        offline=offline,
        notify=None if reporter.quiet else reporter.note,
    )
    reporter.notes(found.notes)
    return Training(recipe, TrainingData.of(found.x, found.y, recipe), device_named(device))


def _resumed(training: Training, checkpoint: Path, reporter: Reporter) -> None:
    """Go on from the checkpoint, where there is one."""
    import torch

    from certify_cli.training.checkpoint import resume

    if not checkpoint.exists():
        reporter.note(f"{checkpoint} does not exist: the run begins anew")
        return
    threads = resume(checkpoint, training)
    if threads != torch.get_num_threads():
        reporter.warning(f"the run began with {threads} threads: its weights will differ in rounding")
    reporter.note(f"going on after {len(training.history)} of {training.recipe.epochs} epochs")


def _run(training: Training, checkpoint: Path, reporter: Reporter) -> None:
    from certify_cli.training.checkpoint import write_checkpoint

    left = training.recipe.epochs - len(training.history)
    done = len(training.history)
    advance = reporter.counter(left * training.steps, "training")
    losses: list[float] = []

    def step(loss: float) -> None:
        losses.append(loss)
        recent = losses[-50:]
        reporter.doing(
            f"epoch {len(training.history) + 1} of {training.recipe.epochs}, loss {sum(recent) / len(recent):.3f}"
        )
        advance()

    for epoch in training.epochs(step):
        write_checkpoint(checkpoint, training)
        reporter.note(_line(epoch, training.recipe))
        if epoch.skipped:
            reporter.warning(
                f"epoch {epoch.number}: steps without a finite loss and gradient, which were left out: {epoch.skipped}"
            )
    if done == training.recipe.epochs:
        reporter.note("all epochs were done already")


def _line(epoch: Epoch, recipe: Recipe) -> str:
    text = f"epoch {epoch.number} of {recipe.epochs}: loss {epoch.loss:.4f}"
    if epoch.accuracy is not None and epoch.certified is not None:
        text += f", accuracy {epoch.accuracy:.4f}, certified at {recipe.radius:g} {epoch.certified:.4f}"
    return f"{text} ({epoch.seconds:.1f} s)"


def _hint(done: int, epochs: int) -> str:
    return f"; the checkpoint has {done} of {epochs} epochs, go on with --resume" if done else ""


def _summary(target: Path, sha256: str, made: Any, recipe: Recipe) -> list[tuple[str, str]]:
    return [
        ("model", str(target)),
        ("sha256", sha256),
        ("epoch", f"{made.epoch} of {recipe.epochs}, the best by certified accuracy"),
        ("accuracy", f"{made.score.accuracy:.4f} on the samples kept for selection"),
        (f"certified at {recipe.radius:g}", f"{made.score.certified:.4f} of the first {made.checked} of them"),
        (
            "next",
            shlex.join(["curvcert", "certify", str(target), "--data", recipe.data, "--eps", f"{recipe.radius}"]),
        ),
    ]
