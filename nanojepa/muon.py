"""Muon: momentum, then the nearest orthogonal matrix as the update (Keller Jordan, 2024).

Matrices of one shape, or of its transpose, are stacked. With several ranks each has a part of
every stack: there it gets the sums of the ranks' gradients, keeps their momentum and
orthogonalises; then the ranks exchange the updates.

Shapes: N matrices of a stack, m rows, n columns, m <= n.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist


def orthogonalize(g, steps=5):
    """The nearest semi-orthogonal matrix of each matrix of g (N, m, n), roughly.

    All singular values go to 0.7..1.2. Quintic Newton-Schulz iteration, with the coefficients of
    kellerjordan.github.io/posts/muon. m may be larger than n.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = wide(g)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if x.shape == g.shape else x.mT


def wide(x):
    """x (..., m, n), or its transpose if it has more rows than columns."""
    return x if x.size(-2) <= x.size(-1) else x.mT


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum, dtype):
        defaults = dict(lr=lr, momentum=momentum, initial_lr=lr, weight_decay=0.0)
        super().__init__(params, defaults)
        self.dtype = dtype  # of the iteration
        self.squares = 0.0  # the last step's squared gradients of this rank's parts, added up
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(wide(p).shape, []).append(p)
            group["stacks"] = list(shapes.values())

    @torch.no_grad()
    def step(self):
        """Sum the ranks' gradients, and update every matrix that has one."""
        stacks = [
            (stack, group)
            for group in self.param_groups
            for stack in group["stacks"]
            if stack[0].grad is not None  # a predictor has none in a step without the term
        ]
        self.squares, updates = 0.0, []
        # The ranks exchange all gradients while the first part is worked on.
        sums = [sum_parts(torch.stack([wide(p.grad) for p in stack])) for stack, _ in stacks]
        # They exchange the updates of a part while the next one is worked on.
        for (stack, group), grad in zip(stacks, sums, strict=True):
            updates.append(all_parts(self.own_update(stack, group["momentum"], grad.wait())))
        for (stack, group), update in zip(stacks, updates, strict=True):
            for p, u in zip(stack, update.wait(), strict=False):  # what is left is padding
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                # An update's root mean square is 1 / sqrt(fan-in) at every shape.
                scale = max(1.0, p.size(0) / p.size(1)) ** 0.5
                p.add_(u if u.shape == p.shape else u.mT, alpha=-group["lr"] * scale)

    def own_update(self, stack, momentum, grad):
        """The updates of this rank's part of a stack; grad: the sums of its gradients there."""
        state = self.state[stack[0]]
        if "momentum" not in state:  # it has the whole stack, but a rank updates its part alone
            state["momentum"] = grad.new_zeros(len(stack), *grad.shape[1:])
        self.squares = self.squares + grad.square().sum()
        own = state["momentum"][own_part(len(stack))]
        known = grad[: len(own)]  # what is left is padding
        own.lerp_(known, 1 - momentum)
        known.lerp_(own, momentum)  # Nesterov
        return orthogonalize(grad.to(self.dtype))

    @torch.no_grad()
    def gather_momentum(self):
        """Bring the momentum of all parts up to date on all ranks, as a checkpoint has it."""
        for state in self.state.values():
            whole = state["momentum"]
            own = pad(whole[own_part(len(whole))], part_size(len(whole)))
            whole.copy_(all_parts(own).wait()[: len(whole)])


# ---- a stack in parts, one a rank


class Message(NamedTuple):
    """A tensor that is complete when the other ranks have sent their part.

    work: a torch.distributed.Work, None with one rank.
    """

    tensor: torch.Tensor
    work: Any = None

    def wait(self):
        if self.work:
            self.work.wait()
        return self.tensor


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def part_size(count):
    """Matrices of a rank's part, padding included; the last ranks may have only padding."""
    return -(-count // ranks())


def own_part(count):
    rank = dist.get_rank() if dist.is_initialized() else 0
    return slice(rank * part_size(count), (rank + 1) * part_size(count))


def pad(x, count):
    """x with zeros behind it, so that it has `count` matrices."""
    return x if len(x) == count else torch.cat((x, x.new_zeros(count - len(x), *x.shape[1:])))


def sum_parts(stack):
    """This rank's part of the sum over the ranks of a stack (N, m, n), on its way."""
    if ranks() == 1:
        return Message(stack)
    own = stack.new_empty(part_size(len(stack)), *stack.shape[1:])
    # torch 2.13 renamed both collectives.
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return Message(own, scatter(own, pad(stack, len(own) * ranks()), async_op=True))


def all_parts(own):
    """The parts of all ranks, on their way."""
    if ranks() == 1:
        return Message(own)
    whole = own.new_empty(len(own) * ranks(), *own.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return Message(whole, gather(whole, own.contiguous(), async_op=True))
