"""What a method will take in memory for one sample, and what has to be left out where that does not fit.

The figures are estimates, from the sizes of the nodes, of the tensors that a method keeps at the same time. Results
depend on the memory in this way only, and every run says what it leaves out.
"""

from __future__ import annotations

from torch import Tensor

from certify_cli.bounds.global_bounds.expansion import ROW_ENTRIES
from certify_cli.bounds.relaxation.intermediate_bounds import CACHE
from certify_cli.certificates.local import footprint
from certify_cli.certificates.rivals import ROW
from certify_cli.network.graph import Network
from certify_cli.network.propagate import nonlinear_nodes

EVALUATION, PASSES, REMAINDERS, DIFFERENCES = 4, 4, 8, 2
"""Numbers for each entry of a node: its value and what its error bound needs; a row that is pulled back through it; a
row's remainders at a nonlinear node; and of a logit's row, what margins are made of that take two of them."""
PROCESS, STORED = 330 * 2**20, 4
"""Bytes that Python and its libraries take before anything else; copies of each weight in float64, one of them the file
as it was checked."""


def of_process(network: Network) -> int:
    """Bytes that a run takes whatever its method: the libraries and the model."""
    weights = sum(t.numel() for node in network.nodes for t in vars(node.op).values() if isinstance(t, Tensor))
    return PROCESS + 8 * STORED * weights


def needed(method: str, network: Network) -> int:
    """Bytes without which the method cannot treat one sample at all."""
    sizes = [node.size for node in network.nodes]
    bent = sum(sizes[k] for k in nonlinear_nodes(network))
    evaluation, classes = 8 * EVALUATION * sum(sizes), network.classes
    # logits' rows are taken in parts; of the margins of a predicted class there are as many as classes
    evaluation += 8 * DIFFERENCES * (classes + min(ROW_ENTRIES, classes * (classes + bent + sizes[0])))
    rows = 8 * classes * (classes + PASSES * max(sizes))
    adjoints = 8 * classes * (bent + sizes[0])
    if method in ("curvature", "dual"):
        return evaluation + rows + adjoints
    if method == "local":
        return evaluation + rows + adjoints + 8 * REMAINDERS * classes * bent
    if method in ("linear", "local-lipschitz"):  # rivals are taken in parts, of one row where no more fit
        return evaluation + 8 * (ROW * max(sizes) + 2 * classes) + min(CACHE, 64 * sum(sizes) * max(sizes))
    return evaluation


def wanted(method: str, network: Network) -> int:
    """Bytes for all that the method can do for one sample: `needed`, and the Jacobians of methods that use them."""
    jacobians = footprint(network) if method in WITH_JACOBIANS else 0
    return needed(method, network) + jacobians


WITH_JACOBIANS = {
    "local": "its tangent bound alone decides",
    "local-lipschitz": "it takes the ranges of linear, or alone those of intervals",
}
"""Methods that use a sample's Jacobians, and what they do without."""
