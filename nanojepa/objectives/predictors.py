"""What a view goes through before it is compared: weights that belong to an objective."""

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """A D x D matrix that begins as the identity."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class MLP(nn.Module):
    """Matrices with relu^2 between them, from widths[0] to widths[-1]. It gives zeros at first."""

    def __init__(self, *widths):
        super().__init__()
        shapes = list(zip(widths[1:], widths[:-1], strict=True))
        matrices = [torch.randn(shape) * 0.5 * shape[1] ** -0.5 for shape in shapes[:-1]]
        matrices.append(torch.zeros(shapes[-1]))
        self.matrices = nn.ParameterList(matrices)

    def forward(self, x):
        x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        *others, last = (matrix.to(x.dtype) for matrix in self.matrices)
        for matrix in others:
            x = F.relu(F.linear(x, matrix)).square()
        return F.linear(x, last)
