"""What the term does at some moment of a run: gradients, geometry of states, shuffled views.

Shapes: B rows, T tokens, D width, N pairs of views.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanojepa.batches import draw_step
from nanojepa.objectives.distance import Views, distance

DIAG_STEPS = 8  # steps whose first micro-batches are looked at


def diagnose(run, step, training_loss):
    """A dict of numbers about the term at these weights; the run isn't changed by it.

    run: train_gpt.Run; training_loss: its function. grad_ratio: the norm of JEPA_LAMBDA times the
    term's gradient over that of the weighted cross entropy's. grad_cosine: the cosine of the two.
    Both are over a whole step, and None if a gradient is zero. For the rest see compare_views and
    state_statistics. ValueError if states are not finite.
    """

    def weighted_ce(batch):
        return run.compile(training_loss)(run.model, run.objective, run.cfg, batch).loss

    def term(batch):
        return run.compile(term_loss)(run.objective, run.lm, batch)

    ce_gradient = step_gradient(run, step, None, weighted_ce)
    term_gradient = step_gradient(run, step, run.objective, term)
    a, b = ce_gradient.norm().item(), term_gradient.norm().item()
    numbers = {"grad_ratio": None, "grad_cosine": None}
    if a:
        numbers["grad_ratio"] = run.cfg.jepa_lambda * b / a
    if a and b:
        numbers["grad_cosine"] = (ce_gradient @ term_gradient).item() / a / b
    return numbers | look_at_states(run, step)


def term_loss(objective, lm, batch):
    return objective.whole_loss(lm, batch, tapped_states(lm, batch), batch.drawn)


def tapped_states(lm, batch):
    return lm.states(batch.idx, batch.positions, batch.ends)


def step_gradient(run, step, objective, loss_of):
    """The gradient of loss_of(batch), summed over a whole step: one float64 vector."""
    batches = run.data.read(step, run.share, objective).batches
    if objective is not None:
        draw_step(objective, batches, run.cfg.seed, step)
    for batch in batches:
        loss_of(batch.to(run.share.device)).backward()
    parameters = [*run.model.parameters(), *run.objective.parameters()]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    if run.share.world_size > 1:
        dist.all_reduce(flat)
    for p in parameters:
        p.grad = None
    return flat.double()


@torch.no_grad()
def look_at_states(run, step):
    """The numbers of compare_views and state_statistics, from the first micro-batches of steps."""
    cfg, share = run.cfg, run.share
    generator = torch.Generator(share.device).manual_seed(cfg.seed)
    numbers, own, independent = {}, [], []
    for n in range(DIAG_STEPS):
        batches = run.data.read(step + n, share, run.objective).batches
        draw_step(run.objective, batches, cfg.seed, step + n)
        batch = batches[0].to(share.device)
        h = run.compile(tapped_states)(run.lm, batch)
        if not h.isfinite().all():
            raise ValueError(
                f"non-finite states at step {step}: lower the learning rates or JEPA_LAMBDA"
            )
        if n == 0:
            states = F.rms_norm(h, h.shape[-1:], eps=1e-6) if run.objective.normed else h
            counted = batch.idx != run.data.doc_token
            numbers |= state_statistics(states, counted, batch.positions)
        noise = torch.randn(h.shape, generator=generator, device=h.device, dtype=h.dtype)
        noise = noise * h.float().square().mean().sqrt().to(h)
        own.append(counted_views(run, batch, h))
        independent.append(counted_views(run, batch, noise))
    if own[0] is not None:
        numbers |= compare_views(cfg.jepa_distance, join_views(own), join_views(independent))
    return numbers


def counted_views(run, batch, states):
    """The Views of a micro-batch that count, (N, D), for these states; None if there are none."""
    views = run.objective.predicted_views(run.lm, batch, states, batch.drawn)
    if views is None:
        return None
    u, v, floor, group = views
    counted = batch.drawn["weight"].flatten() > 0

    def keep(x):
        return None if x is None else x.flatten()[counted]

    return Views(u.flatten(0, -2)[counted], v.flatten(0, -2)[counted], keep(floor), keep(group))


def join_views(parts):
    return Views(*(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True)))


def compare_views(kind, views, independent):
    """The mean distance of matched, shuffled and independent views.

    jepa_matched: the term as it is. jepa_shuffled: each view with that of another pair.
    jepa_independent: the term of random states.
    """

    def mean(views):
        weight = torch.full((len(views.u),), 1 / len(views.u), device=views.u.device)
        return distance(kind, views, weight).item()

    shuffled = views._replace(v=views.v.roll(len(views.v) // 2, 0), group=None)
    return {
        "jepa_matched": mean(views),
        "jepa_shuffled": mean(shuffled),
        "jepa_independent": mean(independent),
    }


def state_statistics(h, counted, positions=None):
    """Geometry of states h (B, T, D) whose `counted` (B, T) is True, a dict of floats.

    effective_rank: exp of the entropy of the normalised singular values, 1 to D (Roy & Vetterli
    2007; RankMe, arXiv 2210.02885). state_cosine: mean cosine of two different states. curvature:
    mean of 1 - cos of one step of the trajectory and the next, over tokens that follow one
    another: 0 on a straight line, 1.5 for independent states. positions (B, T): default 0..T-1.
    """
    x = h[counted][:4096].double()
    singular = torch.linalg.eigvalsh(x.mT @ x).clamp(min=0).sqrt()
    normalised = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
    rank = torch.special.entr(normalised).sum().exp().item()
    total, n = F.normalize(x, dim=-1).sum(0), len(x)
    state_cosine = ((total @ total - n) / max(1, n * (n - 1))).item()
    step = h.double().diff(dim=1)
    joined = counted[:, 1:] & counted[:, :-1]
    if positions is not None:
        joined = joined & (positions.diff(dim=1) == 1)
    turns = F.cosine_similarity(step[:, 1:], step[:, :-1], dim=-1)
    straight = turns[joined[:, 1:] & joined[:, :-1]]
    return {
        "effective_rank": rank,
        "state_cosine": state_cosine,
        "curvature": (1 - straight.mean()).item(),
    }


def diagnostic_warnings(numbers, width, has_term=True):
    """Yield plain words for diagnostics that look like a collapse."""
    rank = numbers["effective_rank"]
    if rank < 0.1 * width:
        yield (
            f"the compared states have effective rank {rank:.1f}, under 10% of the width {width}: "
            "they collapse"
        )
    if not has_term or "jepa_matched" not in numbers:
        return
    matched, shuffled = numbers["jepa_matched"], numbers["jepa_shuffled"]
    if abs(matched - shuffled) <= 0.01 * abs(shuffled):
        yield (
            f"the term is {matched:.4f} for matched views and {shuffled:.4f} for shuffled ones: "
            "it doesn't tell them apart"
        )
