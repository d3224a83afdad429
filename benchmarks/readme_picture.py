"""The README's picture: accuracy certified, and accuracy left by the attack, against the radius.

    python benchmarks/readme_picture.py [--folder docs] [--samples N]

Certifies the shipped models/digits_mlp.onnx on its test digits (seconds to minutes; every method, with the search for
attacks), and writes certified-light.svg and certified-dark.svg, which differ in colours only. No library draws: the
curves are exact steps, one a sample, and the texts are texts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from certify_cli import certify, load_data, load_model
from certify_cli.audit.figures import counts
from certify_cli.records import Result, counted_radius

ROOT = Path(__file__).resolve().parents[1]
MODEL = "models/digits_mlp.onnx"
WIDE, HIGH = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 48
"""Margins around the axes, in the same pixels as WIDE and HIGH."""
FARTHEST = 1.0
"""The radius at the right end of the axis."""
COLOURS = {
    "light": {"ink": "#1c2330", "faint": "#c9ced8", "proved": "#1f5fb4", "attacked": "#c2570c"},
    "dark": {"ink": "#e4e8f0", "faint": "#3b4353", "proved": "#7db3ff", "attacked": "#ffa866"},
}


def across(distance: float) -> float:
    """The pixel of a radius."""
    return LEFT + (WIDE - LEFT - RIGHT) * distance / FARTHEST


def down(share: float) -> float:
    """The pixel of a share of the samples."""
    return TOP + (HIGH - TOP - BOTTOM) * (1 - share)


def steps(distances: Sequence[float], total: int) -> str:
    """An SVG path of the share of `total` samples whose distance is above the radius; it ends at FARTHEST."""
    path, left = [f"M{across(0):.1f} {down(len(distances) / total):.1f}"], len(distances)
    for distance in sorted(d for d in distances if d <= FARTHEST):
        left -= 1
        path.append(f"H{across(distance):.1f}V{down(left / total):.1f}")
    return "".join(path) + f"H{across(FARTHEST):.1f}"


def widest(proved: Sequence[float], unattacked: Sequence[float]) -> tuple[float, float]:
    """Where words fit best between the two curves: a radius, and the share of the correct samples there.

    proved, unattacked: distances of the correct samples, equally many. The words take the height of `rows` samples to
    either side, and both curves fall to the right: the gap is from the lower curve below them to the upper one above.
    """
    near, far = sorted(proved, reverse=True), sorted((min(d, FARTHEST) for d in unattacked), reverse=True)
    rows = len(near) // 30
    gaps = [(far[k + rows] - near[k - rows], k) for k in range(2 * rows, len(near) - rows)]
    _, rank = max(gaps)
    return (far[rank + rows] + near[rank - rows]) / 2, rank / len(near)


def text(x: float, y: float, words: str, colour: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{more}>{words}</text>'


def drawing(result: Result, colours: dict[str, str]) -> str:
    right = [sample for sample in result.samples if counts(sample)]
    total = len(result.samples)
    certified = [counted_radius(sample) for sample in right]
    attacks = [math.inf if sample.attack_radius is None else sample.attack_radius for sample in right]
    proved, unattacked = steps(certified, total), steps(attacks, total)
    between, share_between = widest(certified, attacks)
    ink, faint = colours["ink"], colours["faint"]
    grid, labels = [], []
    for k in range(6):
        share = k / 5
        grid.append(f"M{LEFT} {down(share):.1f}H{WIDE - RIGHT}")
        labels.append(text(LEFT - 8, down(share) + 4, f"{share:.1f}", ink, ' text-anchor="end"'))
        labels.append(text(across(share * FARTHEST), HIGH - BOTTOM + 20, f"{share * FARTHEST:.1f}", ink,
                           ' text-anchor="middle"'))  # fmt: skip
    middle, foot = (LEFT + WIDE - RIGHT) / 2, down(0)
    says = f"Of {total} test digits: the share certified above each radius, and the share that no attack reached"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" role="img" font-size="14"'
        ' font-family="system-ui, sans-serif">',
        f"<title>{says}</title>",
        f'<path d="{"".join(grid)}" stroke="{faint}" fill="none"/>',
        f'<path d="{proved}V{foot:.1f}H{LEFT}Z" fill="{colours["proved"]}" fill-opacity="0.18"/>',
        f'<path d="{unattacked}V{TOP}H{LEFT}Z" fill="{colours["attacked"]}" fill-opacity="0.14"/>',
        f'<path d="{proved}" stroke="{colours["proved"]}" stroke-width="2" fill="none"/>',
        f'<path d="{unattacked}" stroke="{colours["attacked"]}" stroke-width="2" fill="none"/>',
        *labels,
        text(across(0.02), down(0.06), "proved: correct, and no perturbation changes it", colours["proved"]),
        text(across(0.98), down(0.92), "refuted: misclassified, or an attack was found", colours["attacked"],
             ' text-anchor="end"'),
        text(across(between), down(share_between * len(right) / total) + 5, "not known", ink, ' text-anchor="middle"'),
        text(middle, HIGH - 8, "radius (Euclidean norm of the perturbation, pixels in [0, 1])", ink,
             ' text-anchor="middle"'),
        text(16, TOP + (HIGH - TOP - BOTTOM) / 2, "share of the samples", ink,
             f' text-anchor="middle" transform="rotate(-90 16 {TOP + (HIGH - TOP - BOTTOM) / 2:.1f})"'),
        "</svg>\n",
    ])  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--folder", type=Path, default=ROOT / "docs", help="where the two files are written")
    arguments.add_argument("--samples", type=int, default=None, help="the first so many test digits (all)")
    options = arguments.parse_args()
    data = load_data("digits", samples=options.samples)
    result = certify(load_model(ROOT / MODEL), data, method="auto", attack="search")
    for name, colours in COLOURS.items():
        (options.folder / f"certified-{name}.svg").write_text(drawing(result, colours), encoding="utf-8")


if __name__ == "__main__":
    main()
