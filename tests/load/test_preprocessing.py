"""Preprocessing in front of a network: values, inference of the layout, and the errors for what cannot fit."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from certify_cli.errors import DataError, UsageError
from certify_cli.load.preprocessing import LAYOUTS, fit
from certify_cli.network.affine import Dense
from certify_cli.network.graph import Add, Builder, Network, Shape
from certify_cli.network.movement import Reshape, Select

IMAGE = (3, 4, 5)


def flatten_then_dense(shape: Shape) -> tuple[Network, Tensor]:
    """A network that flattens its input row-major, and its weight."""
    size = torch.Size(shape).numel()
    weight = torch.arange(2.0 * size, dtype=torch.float64).reshape(2, size).sin()
    builder = Builder(shape)
    flat = builder.add("flatten", Reshape((size,)), 0)
    return builder.build(builder.add("fc", Dense(weight), flat)), weight


def images(shape: Shape = IMAGE) -> Tensor:
    return torch.rand(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_same_shape_and_no_normalisation_is_the_network_itself() -> None:
    network, _ = flatten_then_dense(IMAGE)
    assert fit(network, IMAGE) is network


@pytest.mark.parametrize("model", [(60,), (60, 1), (1, 60, 1), (4, 3, 5)])
def test_any_other_shape_is_the_row_major_flattening_of_nchw(model: Shape) -> None:
    network, weight = flatten_then_dense(model)
    fitted = fit(network, IMAGE)
    assert fitted.input_shape == IMAGE
    torch.testing.assert_close(fitted(images()), images().flatten(1) @ weight.T)


@pytest.mark.parametrize(("model", "layout"), [((4, 5, 3), None), ((4, 5, 3), "nhwc"), ((60,), "nhwc")])
def test_channels_last(model: Shape, layout: str | None) -> None:
    network, weight = flatten_then_dense(model)
    fitted = fit(network, IMAGE, layout=layout)
    torch.testing.assert_close(fitted(images()), images().permute(0, 2, 3, 1).flatten(1) @ weight.T)
    assert fitted.nodes[1].op.norm(IMAGE) == 1.0


MOVED = {
    "back to channels first": (lambda x: x.permute(0, 3, 1, 2), 0),
    "elsewhere": (lambda x: x.permute(0, 2, 3, 1), 1),
    "in part, among zeros": (lambda x: torch.nn.functional.pad(x[:, 1:], (1, 1, 0, 2)), 1),
}


@pytest.mark.parametrize("name", MOVED)
def test_channels_that_the_model_moves_again_are_moved_once_or_not_at_all(name: str) -> None:
    function, movements = MOVED[name]
    builder = Builder((4, 5, 3))
    moved = builder.add("moved", Select.of(function, (4, 5, 3)), 0)
    size = torch.Size(builder.shape(moved)).numel()
    weight = torch.arange(2.0 * size, dtype=torch.float64).reshape(2, size).sin()
    flat = builder.add("flatten", Reshape((size,)), moved)
    also = builder.add("all", Reshape((60,)), 0)  # what reads the input as it is must see it so
    unmoved = builder.add("fc all", Dense(torch.ones(2, 60, dtype=torch.float64).cumsum(1)), also)
    network = builder.build(builder.add("sum", Add(), builder.add("fc", Dense(weight), flat), unmoved))
    fitted = fit(network, IMAGE)
    torch.testing.assert_close(fitted(images()), network(images().permute(0, 2, 3, 1)))
    selects = [node for node in fitted.nodes if isinstance(node.op, Select)]
    assert len(selects) == movements + 1  # the other one is for what reads the input as it is
    alone = Builder((4, 5, 3))
    alone_flat = alone.add("flatten", Reshape((size,)), alone.add("moved", Select.of(function, (4, 5, 3)), 0))
    whole = fit(alone.build(alone.add("fc", Dense(weight), alone_flat)), IMAGE)
    assert sum(isinstance(node.op, Select) for node in whole.nodes) == movements


def test_one_grey_channel_needs_no_permutation() -> None:
    network, weight = flatten_then_dense((4, 5, 1))
    fitted = fit(network, (1, 4, 5))
    torch.testing.assert_close(fitted(images((1, 4, 5))), images((1, 4, 5)).flatten(1) @ weight.T)
    assert len(fitted.nodes) == len(network.nodes) + 1


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("layout", [None, "nchw", "nhwc", "flat"])
def test_data_with_their_channels_last_are_never_reinterpreted(channels: int, layout: str | None) -> None:
    network, _ = flatten_then_dense((channels, 8, 9))
    with pytest.raises(DataError, match=rf"\(8, 9, {channels}\).*\({channels}, 8, 9\).*say --data-layout nhwc"):
        fit(network, (8, 9, channels), layout=layout)


def test_data_with_their_channels_first_and_told_to_be_last() -> None:
    network, _ = flatten_then_dense((3, 8, 9))
    with pytest.raises(DataError, match=r"\(9, 3, 8\).*\(3, 8, 9\).*leave --data-layout nhwc out"):
        fit(network, (9, 3, 8))


@pytest.mark.parametrize(("data", "model"), [((784,), (1, 28, 28)), ((1, 28, 28), (1, 784, 1)), ((8, 9, 5), (5, 8, 9))])
def test_what_is_no_image_in_another_layout_is_still_the_row_major_flattening(data: Shape, model: Shape) -> None:
    network, weight = flatten_then_dense(model)
    torch.testing.assert_close(fit(network, data)(images(data)), images(data).flatten(1) @ weight.T)


def test_normalisation_is_per_channel_of_the_data_whatever_the_models_layout() -> None:
    network, weight = flatten_then_dense((4, 5, 3))
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    fitted = fit(network, IMAGE, mean=mean, std=std)
    columns = [torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (mean, std)]
    expected = ((images() - columns[0]) / columns[1]).permute(0, 2, 3, 1).flatten(1) @ weight.T
    torch.testing.assert_close(fitted(images()), expected)
    assert [node.name for node in fitted.nodes[:4]] == ["input", "mean", "std", "layout"]


def test_one_value_serves_every_channel_and_flat_data() -> None:
    for shape in (IMAGE, (60,)):
        network, weight = flatten_then_dense((60,))
        fitted = fit(network, shape, mean=[0.5], std=[0.25])
        torch.testing.assert_close(fitted(images(shape)), ((images(shape) - 0.5) / 0.25).flatten(1) @ weight.T)


def test_a_shape_that_cannot_fit_names_both_shapes() -> None:
    network, _ = flatten_then_dense((784,))
    with pytest.raises(DataError, match=r"\(3, 4, 5\).*\(784,\).*60 values.*784"):
        fit(network, IMAGE)


@pytest.mark.parametrize(("model", "layout"), [((60,), "nchw"), ((3, 4, 5), "nhwc"), ((3, 4, 5), "flat")])
def test_a_layout_that_contradicts_the_shape(model: Shape, layout: str) -> None:
    with pytest.raises(DataError, match=f"--layout {layout}"):
        fit(flatten_then_dense(model)[0], IMAGE, layout=layout)


@pytest.mark.parametrize(
    ("mean", "std", "what"),
    [
        ([0.1, 0.2], None, "2 values"),
        (None, [0.0], "positive"),
        (None, [1.0, -1.0, 1.0], "positive"),
        ([float("nan")], None, "finite"),
        (None, [float("inf")], "finite"),
    ],
)
def test_bad_mean_or_std(mean: list[float] | None, std: list[float] | None, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        fit(flatten_then_dense(IMAGE)[0], IMAGE, mean=mean, std=std)


SHAPES = [(4,), (1,), (6, 2), (1, 4), (1, 2, 2), (2, 2, 1), (3, 4, 4), (4, 4, 3), (4, 3, 4), (48,), (48, 1), (1, 48, 1),
          (3, 3, 3), (3, 16), (2, 2, 2, 2), (16,), (1, 4, 4), (4, 4, 1)]  # fmt: skip


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("data", SHAPES)
@pytest.mark.parametrize("model", SHAPES)
def test_what_is_said_of_shapes_is_true(data: Shape, model: Shape, layout: str | None) -> None:
    """Every clause of a refusal is read and held against the shapes; what is taken computes the same everywhere."""
    network, weight = flatten_then_dense(model)
    try:
        fitted = fit(network, data, layout=layout)
    except DataError as error:
        said = str(error)
    else:
        x = images(data)
        last = x.movedim(1, -1) if len(data) == 3 and (layout == "nhwc" or (layout is None and model != data)) else x
        orders = [x.flatten(1) @ weight.T, last.flatten(1) @ weight.T]
        assert any(torch.allclose(fitted(x), order) for order in orders)
        return
    shapes = [tuple(map(int, found.strip(", ").split(","))) for found in re.findall(r"\(((?:[0-9]+,? ?)+)\)", said)]
    assert model in shapes or f"data of shape {data}" in said
    sides = [data, model, (*data[1:], data[0])]
    assert all(shape in sides for shape in shapes), said
    facts = {
        "does not fit": math.prod(data) != math.prod(model),
        "is not the data's shape": model != data,
        "is neither": model != (*data[1:], data[0]) and sum(n > 1 for n in model) > 1,
        "are no images": len(data) != 3,
        "no channels to move": len(data) != 3,
        "is not flat": sum(n > 1 for n in model) > 1,
        "with the channels last; say": data == (*model[1:], model[0]) and data != model,
        "becomes when it is taken for channels last": len(model) == 3 and data == (model[2], *model[:2]),
    }
    claimed = [clause for clause in facts if clause in said]
    assert claimed, said
    assert all(facts[clause] for clause in claimed), said
    if layout is not None and f"--layout {layout}" in said:
        assert math.prod(data) == math.prod(model)


@pytest.mark.parametrize(
    ("data", "values", "words"),
    [
        ((4,), [1, 2], "takes one$"),
        ((1, 2, 2), [1, 2], "takes one$"),
        ((3, 2, 2), [1, 2], "one each for its 3 channels$"),
    ],
)
def test_how_many_values_a_mean_may_have(data: Shape, values: list[float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        fit(flatten_then_dense(data)[0], data, mean=values)


def test_a_std_whose_reciprocal_overflows() -> None:
    with pytest.raises(UsageError, match="positive, and not so small"):
        fit(flatten_then_dense((4,))[0], (4,), std=[1e-320])


def test_an_unknown_layout() -> None:
    with pytest.raises(UsageError, match="chwn"):
        fit(flatten_then_dense(IMAGE)[0], IMAGE, layout="chwn")
