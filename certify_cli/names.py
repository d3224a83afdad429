"""Names of methods, declared once; `efforts` holds those of the efforts.

`certificates.methods` gives every method its function; a test compares its table with METHOD_NAMES. This module imports
nothing: help and completion read it and must answer at once.
"""

from __future__ import annotations

SUMMARIES = {
    "lipschitz": "margin over a global Lipschitz constant (product of norms, LipLT)",
    "curvature": (
        "closed form with curvature and Lipschitz bounds, global or anchored at the sample; attack certificates"
    ),
    "dual": "the same closed form at further points until the gap stops closing (CRC, all rivals)",
    "local": "curvature on the ball around the sample, expanded there layer by layer, proved ball by ball",
    "linear": "linear relaxation over the ball, substituted backward, for every activation and max pooling",
    "local-lipschitz": "margin over a Lipschitz constant on the ball, by the slopes that its pre-activations allow",
}
"""Method -> one line on how it certifies, in the order in which `auto` runs them."""
METHOD_NAMES = tuple(SUMMARIES)
AUTO = "auto"
"""In place of a method's name: every applicable method, and per sample the best result."""
TANGENT_METHODS = ("curvature", "dual")
"""Methods whose certificate is the closed form at one point, which `certify --certificate` writes."""
