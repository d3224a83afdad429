"""1-Lipschitz residual blocks x - 2 V^T T^-1 phi(V x + b) (Araujo et al., SLL, ICLR 2023), as layers of the spec.

T is diagonal, T_i = sum_j |V V^T|_ij q_j / q_i with q > 0 learned, so that V^T T^-1 V <= I (Gershgorin's circles of
q^-1 V V^T q): with slopes of phi in [0, 1] the block's differences have eigenvalues in [-1, 1]. The spec declares what
a block computes, an affine layer, an activation, another affine layer and a sum; the second affine layer is written
from the first one's weights and q. Rounded to float32 a block is 1-Lipschitz to about 1e-6; what `certify` proves of a
file it proves of the file's own numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, linear

from certify_cli.training.derived import Derived


class Returning(Derived):
    """The affine layer -2 V^T T^-1 of a block.   into: the layer V x + b, dense or convolutional of stride 1."""

    def __init__(self, into: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.log_q = nn.Parameter(torch.zeros(into.weight.shape[0], dtype=into.weight.dtype))
        self._into = (into,)  # in a tuple: its parameters belong to the layer of its own name

    @property
    def weight(self) -> Tensor:
        """Of the layer as the spec declares it: Linear (out, in), or ConvTranspose2d (in, out, kernel, kernel)."""
        into = self._into[0].weight
        scaled = -2 * into / row_sums(into, self.log_q.exp()).reshape(-1, *[1] * (into.dim() - 1))
        return scaled.T if into.dim() == 2 else scaled

    def written_out(self) -> nn.Module:
        """The same layer with weights of its own."""
        weight, padding = self.weight.detach(), self._into[0].weight.shape[-1] // 2
        plain: nn.Linear | nn.ConvTranspose2d  # without memory, so that no random number of the run is drawn for it
        if weight.dim() == 2:
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        else:
            inputs, outputs, kernel = weight.shape[:3]
            plain = nn.ConvTranspose2d(inputs, outputs, kernel, padding=padding, bias=False, device="meta")
        plain.weight = nn.Parameter(weight)
        return plain

    def forward(self, x: Tensor) -> Tensor:
        into = self._into[0]
        if isinstance(into, nn.Linear):
            return linear(x, self.weight)
        return conv_transpose2d(x, self.weight, padding=into.weight.shape[-1] // 2)


def row_sums(weight: Tensor, q: Tensor) -> Tensor:
    """T (rows,): sum_j |V V^T|_ij q_j / q_i for a dense V (rows, inputs), or an upper bound of it for a convolution.

    A convolution (rows, channels, kernel, kernel) counts every overlap of two kernels, which zeros around the image
    only reduce. Rows of zeros get a positive sum.
    """
    if weight.dim() == 2:
        products = (weight @ weight.T).abs()
    else:
        products = conv2d(weight, weight, padding=weight.shape[-1] - 1).abs().sum(dim=(2, 3))
    return (products * q).sum(dim=1) / q + torch.finfo(weight.dtype).tiny


class Unshuffled(nn.Module):
    """Every 2 x 2 pixels as channels of one pixel, then channels of zeros up to `width`: it keeps all norms."""

    def __init__(self, channels: int, width: int, side: int) -> None:
        super().__init__()
        weight = torch.zeros(width, channels, side, side, dtype=torch.float32)
        for index in range(channels * side * side):
            weight[index, index // (side * side), index // side % side, index % side] = 1.0
        self.register_buffer("weight", weight)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.get_buffer("weight")
        return conv2d(x, weight, stride=self.side)
