"""`curvcert verify`: honest runs pass, and whatever is altered in one is found, also where the seal is made to fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from certify_cli.audit.verify import claims
from certify_cli.output.document import View
from certify_cli.output.formats import FORMATS
from certify_cli.output.read import read_document
from certify_cli.records import Result, Sample, sealed, summarise
from tests.cli.conftest import Outcome
from tests.schema import conforms

Curvcert = Callable[..., Outcome]
MODELS = Path(__file__).parents[2] / "models"
MODEL = str(MODELS / "digits_mlp.onnx")
COUNT = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run by `curvature`, every radius of which is proved anew, with all that verify can be given."""
    from certify_cli.cli.app import main

    folder = tmp_path_factory.mktemp("run")
    paths = {name: str(folder / name) for name in ("run.json", "w.npz", "c.npz")}
    words = [
        "--data",
        "digits",
        "--samples",
        str(COUNT),
        "--method",
        "curvature",
        "--eps",
        "0.2",
        "--attack",
        "search",
        "-q",
    ]
    made = ["-o", paths["run.json"], "--witnesses", paths["w.npz"], "--certificate", paths["c.npz"]]
    assert main(["certify", MODEL, *words, *made]) == 0
    return paths


def verified(curvcert: Curvcert, path: str, *more: str, model: str = MODEL) -> tuple[int, dict[str, Any]]:
    done = curvcert("verify", path, model, "--format", "json", "--quiet", *more)
    assert done.err == ""
    assert conforms(done.out, "verify")
    return done.code, json.loads(done.out)["verify"]


@pytest.mark.smoke
def test_an_honest_run_is_proved(curvcert: Curvcert, run: dict[str, str]) -> None:
    code, found = verified(curvcert, run["run.json"], "--witnesses", run["w.npz"], "--certificate", run["c.npz"])
    assert (code, found["verified"], found["contradictions_of_run"]) == (0, True, [])
    assert len(found["samples"]) == COUNT
    assert found["outcomes"]["proved"] >= COUNT - 2
    done = curvcert("verify", run["run.json"], MODEL, "--quiet")
    assert done.code == 0
    assert "no contradiction" in done.out
    assert "proved" in done.out
    assert curvcert("verify", run["run.json"], MODEL, "-q", "--format", "markdown").out.startswith(
        "## curvcert: records"
    )


@pytest.mark.parametrize("method", ["lipschitz", "dual", "local", "auto"])
def test_other_methods_pass(curvcert: Curvcert, tmp_path: Path, method: str) -> None:
    path = str(tmp_path / "run.jsonl")
    words = ("--data", "digits", "--samples", "6", "--method", method, "--attack", "search")
    assert curvcert("certify", MODEL, *words, "-o", path, "-q").code == 0
    code, found = verified(curvcert, path, "--share", "1")
    assert code == 0
    wanted = {"lipschitz": "proved", "dual": "proved"}.get(method, "recomputed")
    assert found["outcomes"][wanted] >= 4


def test_a_method_without_a_proof_rule_is_recomputed_or_attacked_only(
    curvcert: Curvcert, run: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a new method needs in `verify`: its name among METHOD_NAMES, and nothing else."""
    monkeypatch.setattr(claims, "METHOD_NAMES", ("new",))
    result = read_document(run["run.json"])
    samples = tuple(replace(sample, method=sample.method and "new") for sample in result.samples)
    made = replace(result.run, method="new")
    path = write(tmp_path / "new.json", Result(made, samples, sealed(made, samples, result.summary)))
    code, found = verified(curvcert, path, "--share", "0")
    assert (code, found["verified"], found["outcomes"]["attacked only"]) == (0, True, COUNT)
    code, found = verified(curvcert, path, "--share", "1")
    assert (code, found["verified"]) == (0, True)
    assert found["outcomes"]["recomputed"] >= COUNT - 2
    assert found["outcomes"]["recomputed"] + found["outcomes"]["attacked only"] == COUNT


def each(**changes: Any) -> Callable[[Result], Result]:
    """The first sample that was attacked with other fields."""

    def change(result: Result) -> Result:
        rows = list(result.samples)
        n = next(k for k, row in enumerate(rows) if row.attack_radius is not None)
        rows[n] = replace(
            rows[n], **{key: value(rows[n]) if callable(value) else value for key, value in changes.items()}
        )
        return replace(result, samples=tuple(rows))

    return change


def of_run(**changes: Any) -> Callable[[Result], Result]:
    return lambda result: replace(result, run=replace(result.run, **changes))


def of_summary(**changes: Any) -> Callable[[Result], Result]:
    return lambda result: replace(result, summary=replace(result.summary, **changes))


def swapped(result: Result) -> Result:
    first, second, *rest = result.samples
    return replace(result, samples=(replace(first, index=second.index), replace(second, index=first.index), *rest))


def dropped(result: Result) -> Result:
    return replace(result, samples=result.samples[:-1])


def repeated(result: Result) -> Result:
    return replace(result, samples=(*result.samples[:-1], result.samples[0]))


TAMPERED: dict[str, tuple[Callable[[Result], Result], str]] = {
    "a radius far too large": (each(certified_radius=lambda s: 5.0), "inside the certified radius"),
    "every radius half as large again": (
        lambda r: replace(r, samples=tuple(replace(s, certified_radius=1.5 * s.certified_radius) for s in r.samples)),
        "inside the certified radius",
    ),
    "every radius twice as large": (
        lambda r: replace(r, samples=tuple(replace(s, certified_radius=2 * s.certified_radius) for s in r.samples)),
        "radius",
    ),
    "a radius beyond all numbers of use": (each(certified_radius=1e200), "inside the certified radius"),
    "a prediction that is no class": (each(prediction=57), "is no class"),
    "a radius on a sample without": (each(status="not_certified"), "status not_certified with the radius"),
    "a negative radius": (each(certified_radius=-0.1), "not positive"),
    "another prediction": (each(prediction=lambda s: (s.prediction + 1) % 10), "the model predicts"),
    "another label": (each(label=lambda s: (s.label + 1) % 10), "the label is"),
    "correct turned round": (each(correct=lambda s: not s.correct), "correct is"),
    "a larger margin": (each(margin=lambda s: s.margin * 1.001), "the margin is"),
    "another runner-up": (
        each(runner_up=lambda s: next(i for i in range(10) if i not in (s.prediction, s.runner_up))), "the runner-up is"
    ),
    "the prediction as its own rival": (each(rival=lambda s: s.prediction), "is no other class"),
    "a smaller gradient": (each(gradient_norm=lambda s: s.gradient_norm * 0.99), "the gradient's norm is"),
    "a curvature of nothing": (each(curvature_lower=0.0, curvature_upper=0.0), "the curvature bound 0"),
    "a Lipschitz constant too small": (each(lipschitz=lambda s: 0.9 * s.gradient_norm), "the Lipschitz constant"),
    "a nearer attack": (each(attack_radius=lambda s: s.certified_radius * 1.0001), "witness lies at"),
    "an attack inside the radius": (each(attack_radius=lambda s: 0.5 * s.certified_radius), "inside the certified"),
    "no attack, of a kind": (each(attack_radius=None), "an attack radius of None"),
    "an attack of an unknown kind": (each(attack_kind="luck"), "of the kind luck in a run"),
    "the witness in another range": (each(attack_in_range=lambda s: not s.attack_in_range), "attack_in_range is"),
    "another method": (each(method="local"), "the method is local"),
    "samples exchanged": (swapped, "not those of the data's"),
    "a sample left out": (dropped, "not those of the data's"),
    "a sample twice": (repeated, "not those of the data's"),
    "another model": (lambda r: of_run(model=replace(r.run.model, sha256="0" * 64))(r), "the model is not the run's"),
    "other data": (lambda r: of_run(data=replace(r.run.data, sha256="0" * 64))(r), "the data is not the run's"),
    "more classes": (lambda r: of_run(model=replace(r.run.model, classes=11))(r), "says 11 classes"),
    "another normalisation": (
        lambda r: of_run(preprocessing={**r.run.preprocessing, "mean": [0.1]})(r), "the margin is",
    ),
    "another accuracy": (of_summary(accuracy=0.5), "the summary's accuracy"),
    "a better mean": (of_summary(mean_certified_radius=0.9), "the summary's mean_certified_radius"),
    "a better certified accuracy": (of_summary(certified_accuracy={"0.2": 1.0}), "the summary's certified_accuracy"),
    "a smaller radius asked for": (
        lambda r: of_summary(certified_accuracy={"0.1": 1.0}, attack_accuracy={"0.1": 1.0})(r), "were asked for",
    ),
}  # fmt: skip
OF_SUMMARY = {name for name in TAMPERED if name.startswith(("another accuracy", "a better", "a smaller radius asked"))}


def tampered(result: Result, name: str) -> Result:
    """Altered, the summary added up anew where it is not what was altered, and the seal made to fit."""
    changed = TAMPERED[name][0](result)
    if name not in OF_SUMMARY:
        eps = tuple(result.summary.certified_accuracy or {})
        summary = summarise(changed.samples, eps, result.summary.seconds, result.summary.search_seconds)
        changed = replace(changed, summary=summary)
    return replace(changed, summary=sealed(changed.run, changed.samples, changed.summary))


def write(path: Path, result: Result) -> str:
    records = iter([result.run, *result.samples, result.summary])
    path.write_text("".join(FORMATS["jsonl"].render(records, View())), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", TAMPERED)
def test_an_altered_record_fails(curvcert: Curvcert, run: dict[str, str], tmp_path: Path, name: str) -> None:
    """With a seal that fits, by what is wrong; with the old seal, by that as well."""
    honest = read_document(run["run.json"])
    changed = tampered(honest, name)
    code, found = verified(curvcert, write(tmp_path / "a.jsonl", changed), "--witnesses", run["w.npz"])
    said = found["contradictions_of_run"] + [text for row in found["samples"] for text in row["contradictions"]]
    assert (code, found["verified"]) == (1, False)
    assert any(TAMPERED[name][1] in text for text in said), said
    assert not any("the seal" in text for text in said)
    assert all((row["outcome"] == "contradicted") == bool(row["contradictions"]) for row in found["samples"])


@pytest.mark.smoke
def test_the_seal_tells_what_nothing_else_can(curvcert: Curvcert, run: dict[str, str], tmp_path: Path) -> None:
    """A radius made smaller is still true; but the run did not write it."""
    honest = read_document(run["run.json"])
    smaller = each(certified_radius=lambda s: s.certified_radius * 0.99)(honest)
    eps = tuple(honest.summary.certified_accuracy or {})
    summary = summarise(smaller.samples, eps, honest.summary.seconds)
    altered = replace(smaller, summary=replace(summary, seal=honest.summary.seal))
    code, found = verified(curvcert, write(tmp_path / "a.jsonl", altered))
    assert code == 1
    assert found["contradictions_of_run"] == ["the seal does not fit: something was changed after it was written"]
    unsealed = replace(altered, summary=replace(summary, seal=None))
    assert verified(curvcert, write(tmp_path / "b.jsonl", unsealed))[0] == 0


def test_altered_witnesses_fail(curvcert: Curvcert, run: dict[str, str], tmp_path: Path) -> None:
    arrays = dict(np.load(run["w.npz"]))

    def contradictions(**changes: Any) -> list[str]:
        np.savez(tmp_path / "w.npz", **{**arrays, **changes})
        code, found = verified(curvcert, run["run.json"], "--witnesses", str(tmp_path / "w.npz"))
        assert code == 1
        return [text for row in found["samples"] for text in row["contradictions"]]

    assert any("does not change the prediction" in text for text in contradictions(d=arrays["d"] * 0.9))
    assert any("about another image" in text for text in contradictions(x=arrays["x"][::-1].copy()))
    nothing = arrays["d"] * np.nan
    assert any("lies at nan" in text for text in contradictions(d=nothing))
    assert any("does not change the prediction" in text for text in contradictions(d=nothing))
    assert any("hold no attack on it" in text for text in contradictions(index=arrays["index"] + 1000))


def test_another_model_or_other_data_are_told_before_anything_else(
    curvcert: Curvcert, run: dict[str, str], tmp_path: Path
) -> None:
    code, found = verified(curvcert, run["run.json"], model=str(MODELS / "digits_conv.onnx"))
    assert code == 1
    assert "the model is not the run's" in found["contradictions_of_run"][0]
    assert found["samples"] == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("no.json", MODEL), 3, "no.json: cannot be read"),
        (("{run}", "no.onnx"), 3, "no.onnx: no such file"),
        (("{run}", MODEL, "--share", "2"), 2, "--share 2.0 is not a part"),
        (("{run}", MODEL, "--witnesses", "{run}"), 3, "not an .npz file"),
    ],
)
def test_errors_are_sentences(
    curvcert: Curvcert, run: dict[str, str], words: tuple[str, ...], code: int, said: str
) -> None:
    done = curvcert("verify", *(word.format(run=run["run.json"]) for word in words))
    assert done.code == code
    assert said in done.last


def test_a_sample_without_a_radius_is_no_claim(curvcert: Curvcert, tmp_path: Path) -> None:
    """A tie: nothing is certified, and nothing is wrong."""
    x = np.full((2, 1, 8, 8), 0.5, dtype=np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    path = str(tmp_path / "r.json")
    assert curvcert("certify", MODEL, "--data", str(tmp_path / "d.npz"), "-o", path, "-q").code == 0
    document = read_document(path)
    none = dict.fromkeys(
        ("certified_radius", "method", "rival", "gradient_norm", "curvature_lower", "curvature_upper", "lipschitz")
    )
    nothing: list[Sample] = [
        replace(s, **none, status="not_certified", reason="no radius")  # type: ignore[arg-type]
        for s in document.samples
    ]
    summary = sealed(document.run, nothing, summarise(nothing, (), document.summary.seconds))
    changed = replace(document, samples=tuple(nothing), summary=summary)
    code, found = verified(curvcert, write(tmp_path / "n.jsonl", changed))
    assert (code, found["outcomes"]["no radius"]) == (0, 2)


# --- networks that are hard to attack -------------------------------------------------------------------------------


def classifier(folder: Path, weights: list[np.ndarray], biases: list[np.ndarray]) -> str:
    """Dense layers with ReLUs between them, as an ONNX file."""
    nodes, last = [], "x"
    initializers = []
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        out = "y" if number == len(weights) - 1 else f"z{number}"
        nodes.append(helper.make_node("Gemm", [last, f"w{number}", f"b{number}"], [out], transB=1))
        initializers.append(numpy_helper.from_array(weight.astype(np.float32), f"w{number}"))
        initializers.append(numpy_helper.from_array(bias.astype(np.float32), f"b{number}"))
        if out != "y":
            nodes.append(helper.make_node("Relu", [out], [f"h{number}"]))
            last = f"h{number}"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", weights[0].shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", weights[-1].shape[0]])],
        initializers,
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return str(path)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape)


DEAD = np.full(12, -3.0)
HARD: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {
    # no unit responds near the samples: the margin's gradient is 0 there
    "dead units": ([random(12, 4), 3 * random(3, 12)], [DEAD, np.array([1.0, 0.0, -1.0])]),
    "dead units, far away": ([random(12, 4), 3 * random(3, 12)], [100 * DEAD, np.array([1.0, 0.0, -1.0])]),
    # a logit that has nothing to do with the others
    "a huge logit": ([random(12, 4), random(3, 12)], [np.zeros(12), np.array([0.3, 0.0, -1e15])]),
    # margins that do not depend on the input
    "a constant": ([np.zeros((5, 4)), random(3, 5)], [np.ones(5), np.array([0.5, 0.0, 0.1])]),
    "a constant, by cancellation": (
        [np.concatenate([random(6, 4), random(6, 4)]), np.concatenate([np.ones((3, 6)), -np.ones((3, 6))], axis=1)],
        [np.full(12, 10.0), np.array([0.5, 0.0, 0.1])],
    ),
    "offsets that cancel": ([1e4 * random(12, 4), 1e-4 * random(3, 12)], [np.full(12, 1e8), np.zeros(3)]),
    "tiny numbers": ([1e-6 * random(12, 4), 1e-6 * random(3, 12)], [np.zeros(12), np.zeros(3)]),
    "huge numbers": ([1e6 * random(12, 4), 1e6 * random(3, 12)], [np.zeros(12), np.zeros(3)]),
}


@pytest.fixture(scope="module")
def hard_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[str, str]]:
    """Of every hard network by two methods: the records and the model."""
    from certify_cli.cli.app import main

    found = {}
    for name, (weights, biases) in HARD.items():
        folder = tmp_path_factory.mktemp("hard")
        model = classifier(folder, weights, biases)
        np.savez(folder / "d.npz", x=np.random.default_rng(5).random((6, 4)).astype(np.float32))
        for method in ("lipschitz", "auto"):
            path = str(folder / f"{method}.jsonl")
            words = ["certify", model, "--data", str(folder / "d.npz"), "--method", method, "-o", path, "-q"]
            assert main(words) == 0
            found[name, method] = path, model
    return found


@pytest.mark.parametrize("method", ["lipschitz", "auto"])
@pytest.mark.parametrize("name", HARD)
def test_an_honest_run_of_a_hard_network_is_not_contradicted(
    curvcert: Curvcert, hard_runs: dict[tuple[str, str], tuple[str, str]], name: str, method: str
) -> None:
    path, model = hard_runs[name, method]
    code, found = verified(curvcert, path, model=model)
    assert (code, found["contradictions_of_run"]) == (0, []), found["samples"]


def scaled(result: Result, factor: float) -> Result:
    """Every radius times a factor (1e6 where there is none), the summary and the seal made to fit."""
    rows = [
        replace(
            s,
            certified_radius=factor * s.certified_radius if s.certified_radius else 1e6,
            status="certified",
            method=s.method or result.run.method.replace("auto", "linear"),
            reason=None,
            attack_radius=None,
            attack_kind=None,
            attack_in_range=None,
        )
        for s in result.samples
    ]
    summary = summarise(rows, (), result.summary.seconds)
    return replace(result, samples=tuple(rows), summary=sealed(result.run, rows, summary))


FORGED = [
    pytest.param(name, method, factor, marks=pytest.mark.slow if factor == 100.0 else ())
    for name in HARD
    for method in ("lipschitz", "auto")
    for factor in (20.0, 100.0, 1e6)
    if not name.startswith("a constant")  # every radius is true there
]


@pytest.mark.parametrize(("name", "method", "factor"), FORGED)
def test_a_forged_radius_of_a_hard_network_is_found(
    curvcert: Curvcert,
    hard_runs: dict[tuple[str, str], tuple[str, str]],
    tmp_path: Path,
    name: str,
    method: str,
    factor: float,
) -> None:
    """Every record of a lipschitz run, whose radii can be proved; of other methods those that an attack reaches."""
    path, model = hard_runs[name, method]
    forged = scaled(read_document(path), factor)
    code, found = verified(curvcert, write(tmp_path / "f.jsonl", forged), model=model)
    assert code == 1
    wrong = [row for row in found["samples"] if row["contradictions"]]
    assert len(wrong) == len(found["samples"]) if method == "lipschitz" else len(wrong) >= 1


def test_a_turned_prediction_beside_a_huge_logit_is_found(
    curvcert: Curvcert, hard_runs: dict[tuple[str, str], tuple[str, str]], tmp_path: Path
) -> None:
    path, model = hard_runs["a huge logit", "lipschitz"]
    honest = read_document(path)
    rows = [replace(s, prediction=1 - s.prediction, runner_up=s.prediction, rival=s.prediction) for s in honest.samples]
    summary = sealed(honest.run, rows, summarise(rows, (), honest.summary.seconds))
    forged = replace(honest, samples=tuple(rows), summary=summary)
    code, found = verified(curvcert, write(tmp_path / "t.jsonl", forged), model=model)
    assert code == 1
    assert all(any("the model predicts" in text for text in row["contradictions"]) for row in found["samples"])


@pytest.fixture(scope="module")
def honest_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """By method."""
    from certify_cli.cli.app import main

    found = {}
    for method in ("lipschitz", "curvature", "dual"):
        path = str(tmp_path_factory.mktemp("run") / "r.jsonl")
        words = ["--data", "digits", "--samples", "12", "--method", method, "-o", path, "-q"]
        assert main(["certify", MODEL, *words]) == 0
        found[method] = read_document(path)
    return found


@pytest.mark.parametrize("method", ["lipschitz", "curvature", "dual"])
@pytest.mark.parametrize("factor", [1.02, 1.2, 3.0, 20.0])
def test_a_radius_that_is_not_proved_says_so(
    curvcert: Curvcert, honest_runs: dict[str, Result], tmp_path: Path, method: str, factor: float
) -> None:
    """Raised by a little it ends as not proved, by more as contradicted; never as merely attacked."""
    forged = write(tmp_path / "f.jsonl", scaled(honest_runs[method], factor))
    code, found = verified(curvcert, forged, "--share", "0")
    counts = found["outcomes"]
    assert counts["attacked only"] == 0
    if method == "lipschitz":
        assert counts["proved"] == 0
    assert (code, counts["contradicted"]) == (1, 12) if factor >= 3 else counts["proved"] + counts["contradicted"] < 13
