"""Pretrain a GPT with next-token cross entropy and one JEPA term: `JEPA_LAMBDA=0.1 torchrun --standalone train_gpt.py`.

One process on a CPU or a GPU, or torchrun on many. Read from top to bottom: config, optimizer, the training step,
evaluation, logs, the loop. The term itself is in jepa.py, the network in model.py, the data in loader.py.
Shapes: B rows, T tokens, D width, S spans a row, V vocabulary; G rows of the global batch (all ranks, all micro-batches).
"""
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

import numpy as np
import torch
import torch.distributed as dist
import yaml

import jepa
from checkpoint import Checkpoints, newest_checkpoint
from config import check_ranges, knob, load_config
from data.shards import write_whole
from loader import open_data
from model import GPT, GPTConfig, Linear, norm, tree_mask
from weights import dequantize, load_weights, quantize, to_safetensors

ROOT = Path(__file__).resolve().parent
DIAG_STEPS = 8  # steps whose first micro-batches the diagnostics look at
SPIKE_STEPS = 128  # steps that SKIP_SIGMA compares with, as OLMo-core's SkipStepOptimizer
MAY_CHANGE = ("data_path", "grad_accum_steps", "nan_policy", "wandb", "checkpoint_every", "checkpoint_seconds")  # on resuming: none changes more than rounding
SOURCES = ("train_gpt.py", "model.py", "jepa.py", "loader.py", "config.py", "weights.py", "checkpoint.py", "data/shards.py")  # logged, and counted in the artifact

# ----------------------------------------------------------------------------------------------------------- config


@dataclass
class Config:
    """Every setting: default, what it does, range. config.py says where else a value may come from."""
    # data
    data_path: str = knob("data/stdlib", "folder with *_train_*.bin and *_val_*.bin; data/stdlib, data/nlregex and data/nlregex_groups are made where they are missing")
    tokenizer: str = knob("", "for shards without meta.json: a tiktoken name or a file of ranks, which gives the bytes per token")
    doc_token: int = knob(50256, "for shards without meta.json: the token id that begins a document")
    vocab_size: int = knob(0, "rows of the embedding; 0: the tokenizer's size. A multiple of 64 is faster on a GPU", 0)
    val_tokens: int = knob(0, "tokens of the val split that are evaluated, off the clock; 0: all", 0)
    loss_on: str = knob("all", "pairs: all, cross entropy on every token; target, on the second text and its end token only", choices=("all", "target"))
    long_examples: str = knob("stop", "pairs and groups that a row can't hold: stop; skip, they are counted; truncate, the longer text's tail goes", choices=("stop", "skip", "truncate"))
    # length of the run
    iterations: int = knob(10_000, "steps at most", 1)
    max_wallclock_seconds: float = knob(150.0, "training time at most, s, without compilation and validation; 0: no cap", 0)
    train_flops: float = knob(0.0, "stop at the step that reaches so many FLOPs, forward and backward, padding counted; 0: no cap", 0)
    target_val_loss: float = knob(0.0, "stop at the first validation at or below this, nats per token; 0: never", 0)
    train_batch_tokens: int = knob(4096, "tokens per step over all ranks and micro-batches; of pairs data, those of the trunks", 1)
    train_seq_len: int = knob(256, "tokens per row; attention costs its square", 1)
    grad_accum_steps: int = knob(0, "micro-batches per step and rank, less memory and the same step; 0: as few as keep one at 65,536 tokens. "
                                 "Of pairs data, how many the trunks alone would fill: a step has as many of that size as its layout needs; 0: at least 8", 0)
    # model
    num_layers: int = knob(6, "blocks; time, memory and parameters grow with it")
    model_dim: int = knob(256, "width of the residual stream; the matrices grow with its square")
    num_heads: int = knob(4, "query heads; model_dim / num_heads must be even")
    num_kv_heads: int = knob(4, "key/value heads, shared by num_heads / num_kv_heads query heads each")
    mlp_mult: int = knob(4, "width of the MLP over model_dim; at 4 it is two thirds of a block's parameters")
    tie_embeddings: bool = knob(False, "1: the output head is the embedding; saves vocab_size x model_dim parameters")
    value_embed: bool = knob(True, "1: the values of every block add a second embedding of the token; vocab_size x key/value width parameters, up to 7% of a step")
    # optimizer
    optimizer: str = knob("muon", "muon: Muon for the blocks' matrices, Adam for the rest; adamw: AdamW for the matrices too", choices=("muon", "adamw"))
    adamw_lr: float = knob(0.003, "AdamW learning rate of the blocks' matrices where OPTIMIZER=adamw", 0)
    matrix_lr: float = knob(0.04, "Muon learning rate of the blocks' matrices", 0)
    embed_lr: float = knob(0.6, "Adam learning rate of the embeddings", 0)
    head_lr: float = knob(0.008, "Adam learning rate of the output head", 0)
    tied_embed_lr: float = knob(0.05, "Adam learning rate of the embedding where it is tied to the head", 0)
    scalar_lr: float = knob(0.04, "Adam learning rate of gains and mixing weights", 0)
    muon_momentum: float = knob(0.95, "momentum of Muon (Nesterov)", 0, 1)
    warmdown_frac: float = knob(0.5, "the last fraction of the run, over which learning rates fall to zero", 0, 1)
    nan_policy: str = knob("stop", "what follows a non-finite loss or gradient, which never reaches the weights: stop; skip, the step is left out and counted", choices=("stop", "skip"))
    skip_sigma: float = knob(0.0, f"leave out a step whose loss or gradient norm is so many standard deviations above the mean of the last {SPIKE_STEPS} steps; 0: never", 0)
    # JEPA
    jepa_lambda: float = knob(0.0, "weight of the JEPA term; 0: off, and the step is the baseline's, graph, numbers and time", 0)
    jepa_update: str = knob("coupled", "coupled: the term is added to the loss; decoupled: its gradient has an optimizer of its own, and lambda is the size of "
                            "its update relative to the cross entropy's; costs a second graph, optimizer state and pass over JEPA_ROWS_FRAC of the rows", choices=("coupled", "decoupled"))
    jepa_rows_frac: float = knob(0.25, "JEPA_UPDATE=decoupled: fraction of the rows, at least one a micro-batch, that the term's own pass encodes (of pairs data, of the examples); time grows with it", 0, 1)
    jepa_objective: str = knob("span", "span: inside a row or document; pair: the two texts of a pair, or neighbours in a group", choices=("span", "pair"))
    jepa_gamma: float = knob(1.0, "weight of the cross entropy where JEPA_LAMBDA is above 0", 0)
    jepa_ratio: float = knob(1.0, "chance that a step computes the term; a step without it costs a plain one. Below 1 costs a second training graph", 0, 1)
    jepa_max_span_frac: float = knob(0.5, "longest span over the length of its document fragment (or row)", 0, 1)
    jepa_start_frac: float = knob(0.0, "fraction of the run after which the term starts; costs a second training graph", 0, 1)
    jepa_end_frac: float = knob(1.0, "fraction of the run after which it goes off again; below 1 costs a second training graph", 0, 1)
    jepa_warmup_frac: float = knob(0.0, "fraction of the run over which lambda ramps up after the start; costs nothing", 0, 1)
    jepa_layer: int = knob(-1, "states compared: -1 the stream into the final norm, k the stream after block k; costs nothing")
    jepa_norm: int = knob(-1, "1: compare states after the final norm, 0: before it; -1: 1 for pair, 0 for span", -1, 1)
    jepa_distance: str = knob("cosine", "cosine, l2, mse or infonce, which costs one more forward pass, and a graph for it", choices=jepa.DISTANCES)
    jepa_spans: int = knob(1, "spans per row, of pairs data per document; each costs four gathered states", 1)
    jepa_doc: bool = knob(True, "1: a span stays inside one document fragment; 0: anywhere in the row; in pairs data always inside")
    jepa_pred_tokens: int = knob(1, "pair: [PRED] tokens behind view A, which they encode; each costs a token", 0, jepa.MAX_PRED_TOKENS)
    jepa_pred_position: str = knob("end", "pair: end, [PRED] behind view A; front, before it, which encodes that view once more", choices=("end", "front"))
    jepa_reverse: bool = knob(False, "pair: 1: the second text predicts the first")
    jepa_predictor: str = knob("identity", "pair: linear: a trained model_dim x model_dim matrix on view A", choices=("identity", "linear"))
    # evaluation and logs
    diag_every: int = knob(0, "steps between diagnostics of the term, off the clock: gradients, rank of the states, shuffled views; each costs about ten steps, and memory for two gradients; 0: none", 0)
    val_loss_every: int = knob(0, "steps between validations, off the clock; 0: only at the end", 0)
    eval_stride: int = knob(0, "0: rows side by side; n: windows that advance by n tokens, train_seq_len / n times the cost", 0)
    train_log_every: int = knob(20, "steps between train_loss lines; costs nothing", 1)
    checkpoint_every: int = knob(0, "steps between checkpoints, which hold weights and optimizer state; copied off the clock, written by a thread, two are kept; 0: only where SIGTERM or SIGINT stops the run", 0)
    checkpoint_seconds: float = knob(0.0, "seconds between checkpoints; 0: none by time", 0)
    resume: str = knob("", "logs/<run>: go on with that run, from its newest checkpoint and with its settings; auto: with the run of RUN_ID, or begin it")
    run_id: str = knob("", "name of the folder in logs/; default: date, time and seed")
    wandb: bool = knob(False, "1: log to Weights & Biases too (WANDB_MODE=offline needs no login)")
    # machine
    seed: int = knob(1337, "of weights, data order and spans", 0, 2**31)
    init_from: str = knob("", "logs/<run>: start from the weights of that run")
    dtype: str = knob("auto", "bfloat16 or float32; auto: bfloat16 where the hardware multiplies it", choices=("auto", "bfloat16", "float32"))
    compile: bool = knob(True, "0: no torch.compile; slower, starts at once")

    def __post_init__(self):
        """Raise ValueError naming the knob, where a value makes no sense by itself."""
        check_ranges(self)
        for name, wrong, rule in (
                ("jepa_max_span_frac", self.jepa_max_span_frac == 0, "must be above 0"),
                ("jepa_ratio", self.jepa_ratio == 0, "must be above 0; without the term at all it is JEPA_LAMBDA=0"),
                ("jepa_rows_frac", self.jepa_rows_frac == 0, "must be above 0"),
                ("jepa_predictor", self.jepa_lambda and self.jepa_predictor == "linear" and self.jepa_objective == "span", "needs JEPA_OBJECTIVE=pair"),
                ("jepa_layer", not -1 <= self.jepa_layer < self.num_layers, f"must be -1, or a block from 0 to {self.num_layers - 1}"),
                ("jepa_start_frac", self.jepa_lambda and self.jepa_start_frac >= min(1, self.jepa_end_frac),
                 f"with JEPA_LAMBDA above 0 it must be below JEPA_END_FRAC={self.jepa_end_frac}, or the term never runs"),
                ("jepa_gamma", self.jepa_lambda and self.jepa_update == "decoupled" and self.jepa_gamma != 1,
                 "does nothing with JEPA_UPDATE=decoupled, whose optimizers take out the scale of a gradient; set JEPA_LAMBDA"),
                ("train_seq_len", (self.jepa_lambda or self.diag_every) and self.train_seq_len < 3, "a span needs rows of at least 3 tokens"),
                ("resume", self.resume == "auto" and not self.run_id, "needs RUN_ID, the run to go on with or to begin"),
                ("eval_stride", self.eval_stride > self.train_seq_len, f"must not exceed TRAIN_SEQ_LEN={self.train_seq_len}"),
                ("run_id", not re.fullmatch(r"(\w[\w.-]*)?", self.run_id), "may hold letters, digits, '_', '.' and '-' only, and begins with none of the last two")):
            if wrong:
                raise ValueError(f"{name.upper()}={getattr(self, name)}: {rule}")


# -------------------------------------------------------------------------------------------------------- optimizer


def orthogonalize(g, steps=5):
    """The nearest semi-orthogonal matrix of each matrix of g (N, m, n), roughly: all singular values go to 0.7..1.2.

    Quintic Newton-Schulz iteration, coefficients of Muon (Keller Jordan, 2024, kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if g.size(-2) > g.size(-1) else x


class Muon(torch.optim.Optimizer):
    """Momentum, then the orthogonalised update, for matrices. Those of one shape are stacked and treated as one batch,
    shared between the ranks; every rank keeps all momentum.
    found_inf: as in torch's fused Adam, a 0-dim tensor on the device; where it is 1 the step changes nothing."""

    found_inf = None

    def __init__(self, params, lr, momentum, dtype):
        super().__init__(params, dict(lr=lr, momentum=momentum, initial_lr=lr))
        self.dtype = dtype  # of the iteration
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            group["stacks"] = list(shapes.values())

    @torch.no_grad()
    def step(self):
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            for params in group["stacks"]:
                if all(p.grad is None for p in params):  # the predictor's, in a step without the term
                    continue
                grad = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in params])  # none behind a tapped layer
                state = self.state[params[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(grad)
                if self.found_inf is not None:
                    grad = torch.where(self.found_inf > 0, state["momentum"], grad)  # the average with itself is itself
                momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
                update = grad.lerp_(momentum, group["momentum"]).to(self.dtype)  # Nesterov
                share = -(-len(params) // world_size)  # matrices a rank; the last ranks may have only padding
                update = torch.nn.functional.pad(update, (0, 0, 0, 0, 0, share * world_size - len(params)))
                mine = orthogonalize(update[rank * share:(rank + 1) * share])
                if world_size > 1:
                    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on
                    gather(update, mine.contiguous())
                else:
                    update = mine
                if self.found_inf is not None:
                    update = update * (1 - self.found_inf)
                scale = max(1.0, params[0].size(0) / params[0].size(1)) ** 0.5  # root mean square 1 / sqrt(fan-in) at every shape
                torch._foreach_add_(params, list(update[:len(params)].float().unbind()), alpha=-group["lr"] * scale)


def build_optimizers(model, cfg, decay=0.1):
    """The optimizers of one gradient: [Muon for the matrices of blocks and predictor, Adam for the rest], or [AdamW]; every parameter
    of the model is in exactly one group. term_only: its learning rate doesn't fall with lambda, since no other update trains it.
    decay: AdamW's weight decay of the blocks' matrices."""
    matrices = [m.weight for m in model.blocks.modules() if isinstance(m, Linear)]
    predictor = [] if model.predictor is None else [model.predictor.weight]
    embeds, heads, values = ([] if m is None else [m.weight] for m in (model.embed, model.head, model.value_embed))
    taken = set(map(id, matrices + predictor + embeds + heads + values))
    scalars = [p for p in model.parameters() if id(p) not in taken]
    # Rare tokens have tiny gradients, hence an eps of 1e-10 (modded-nanogpt). Where the gradient of a gain is zero but for
    # rounding (a cosine doesn't change with the length of the states), that eps would turn the noise into full steps.
    groups = [dict(params=params, lr=lr, initial_lr=lr, eps=eps) for params, lr, eps in (
        (embeds, cfg.embed_lr if heads else cfg.tied_embed_lr, 1e-10), (values, cfg.embed_lr, 1e-10), (heads, cfg.head_lr, 1e-10),
        (scalars, cfg.scalar_lr, 1e-6)) if params]
    blocks = [dict(params=params, term_only=params is predictor) for params in (matrices, predictor) if params]
    if cfg.optimizer == "adamw":  # weight decay and betas of nanoGPT
        blocks = [group | dict(lr=cfg.adamw_lr, initial_lr=cfg.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0 if group["term_only"] else decay) for group in blocks]
        return [torch.optim.AdamW(groups + blocks, betas=(0.8, 0.95), weight_decay=0.0, fused=True)]
    return [Muon(blocks, cfg.matrix_lr, cfg.muon_momentum, model.config.dtype), torch.optim.Adam(groups, betas=(0.8, 0.95), fused=True)]


# ---------------------------------------------------------------------------------------------------- training step


@dataclass
class Share:
    """Who does what: this rank holds local_rows of the global batch's rows, from first_row on, micro_rows at a time. (Of
    pairs data only micro_rows counts: examples fill as many micro-batches as they need, one of the ranks in turn.)"""
    rank: int
    world_size: int
    device: torch.device
    rows: int
    local_rows: int
    first_row: int
    micro_rows: int


def divide_batch(cfg, rank, world_size, device, least=1):
    """The Share of this rank; ValueError where TRAIN_BATCH_TOKENS doesn't come out even. least: micro-batches per step and
    rank, where the config leaves their number open."""
    T, rows = cfg.train_seq_len, cfg.train_batch_tokens // cfg.train_seq_len
    fits = [n for n in range(1, rows + 1) if rows % (n * world_size) == 0 and rows * T <= 65_536 * n * world_size]
    accum = cfg.grad_accum_steps or next((n for n in fits if n >= least), max(fits, default=1))
    if cfg.train_batch_tokens % (world_size * accum * T):
        raise ValueError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} must be a multiple of ranks x GRAD_ACCUM_STEPS x TRAIN_SEQ_LEN = "
                         f"{world_size} x {accum} x {T}")
    local = rows // world_size
    return Share(rank, world_size, device, rows, local, rank * local, local // accum)


def training_loss(model, cfg, batch, jepa_lambda=None, part="all"):
    """gamma * CE + lambda * JEPA of one micro-batch: what is compiled, one graph without the term and one with it.

    batch: a loader.Batch. Its num_targets and the weights in its views are of the global batch, so that micro-batches and
    ranks add up to its means. jepa_lambda: 0-dim tensor; views None: no term, and not a trace of it in the graph.
    Returns (CE,), or (gamma * CE + lambda * JEPA, CE, JEPA), the last two detached; without the term CE times gamma too.
    part: "term": (JEPA,) alone, for the decoupled update; "views": what jepa_views returns, for share_infonce; "states": (h,).
    """
    mask = None if batch.ends is None else tree_mask(batch.ends)
    x, h = model._run_blocks(batch.idx, cfg.jepa_layer, batch.positions, mask)
    if part == "states":
        return (h,)
    if part == "views":
        return jepa_views(model, cfg, h, batch.views)
    if part == "term":
        return (jepa_term(model, cfg, h, batch),)
    ce = model.cross_entropy(x, batch.targets) / batch.num_targets
    gamma = cfg.jepa_gamma if cfg.jepa_lambda else 1.0
    loss = ce if gamma == 1 else gamma * ce
    if batch.views is None:
        return (loss,) if gamma == 1 else (loss, ce.detach())
    term = jepa_term(model, cfg, h, batch)
    return loss + jepa_lambda * term, ce.detach(), term.detach()


def jepa_term(model, cfg, h, batch):
    """The JEPA term of one micro-batch with the tapped states h (B, T, D)."""
    u, v, weight, floor, _ = jepa_views(model, cfg, h, batch.views)
    if batch.pull is None:
        return jepa.distance(u, v, cfg.jepa_distance, weight, floor)
    return (u * batch.pull[0] + v * batch.pull[1]).sum()  # its gradient is that of the whole step's term, its value means nothing


def compares_normed(cfg):
    """Whether the states that are compared are those after the final norm."""
    return cfg.jepa_norm == 1 or cfg.jepa_norm == -1 and cfg.jepa_objective == "pair"


def jepa_views(model, cfg, h, views):
    """What jepa.distance compares of the tapped states h (B, T, D), where a Batch's views say: (view A, view B, weight, floor, group)."""
    if cfg.jepa_objective == "span":
        a, b, start, end, weight = views
        h = norm(h) if compares_normed(cfg) else h
        return *jepa.span_views(h, a, b, start, end), weight, jepa.noise_floor(h, b), None
    a, b, weight, group = views
    u, v = jepa.pair_views(h, a, b)
    if compares_normed(cfg):
        u, v = norm(u), norm(v)
    return u if model.predictor is None else model.predictor(u), v, weight, None, group


def share_infonce(model, loss_fn, cfg, batches, share):
    """InfoNCE over all pairs of the step: its value, and in every batch the gradient with respect to its views as `pull`.

    A first pass without gradients collects the views of all micro-batches and ranks, so that the negatives are the step's
    however it is divided; it costs one more forward pass. Source: gradient caching, arXiv 2101.06983.
    """
    with torch.no_grad():
        collected = zip(*(loss_fn(model, cfg, batch, part="views") for batch in batches))
        own = [None if parts[0] is None else torch.stack(parts) for parts in collected]
        u, v, *others = (None if t is None else t[None] if share.world_size == 1 else torch.stack(gather_ranks(t)) for t in own)
        kept = others[0].flatten().nonzero()[:, 0]  # most places are empty, and the matrix of cosines is their square
        weight, floor, group = (None if t is None else t.flatten()[kept] for t in others)
        kept_views = [t.flatten(0, -2)[kept].requires_grad_() for t in (u, v)]
    value = jepa.distance(*kept_views, "infonce", weight, floor, group)
    value.backward()
    pulls = [torch.zeros_like(t).flatten(0, -2).index_copy(0, kept, x.grad).view_as(t)[share.rank] for t, x in zip((u, v), kept_views)]
    for batch, *pull in zip(batches, *pulls):
        batch.pull = tuple(pull)
    return value.detach()


def gather_ranks(tensor):
    """The tensors of all ranks, a list."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def accumulate_gradients(model, loss_fn, cfg, data, share, step, jepa_lambda, part="all", fraction=1.0, ahead=True):
    """Forward and backward of this rank's share of a step; gradients are left in .grad, for sum_gradients.

    loss_fn: training_loss, compiled or not. jepa_lambda: float, or None for no term. part: "all", or "term" for the term
    alone, of weight 1, on this fraction of the rows. ahead=False: a look, not a step of the run. Returns the global mean
    losses, a tensor (CE,), (CE, JEPA) or (JEPA,) on the device, and the FLOPs over all ranks.
    """
    term = jepa_lambda is not None
    batches, cost = (data.load if ahead else data.read)(step, share, term, fraction)
    batches = [batch.to(share.device) for batch in batches]
    weight = torch.full((), jepa_lambda, device=share.device) if term else None  # a fill: a copy from the host would wait for the GPU
    infonce = share_infonce(model, loss_fn, cfg, batches, share) if term and cfg.jepa_distance == "infonce" else None
    losses = 0
    for batch in batches:
        loss, *terms = loss_fn(model, cfg, batch, weight, part)
        loss.backward()
        losses += torch.stack(terms or [loss.detach()])
    if share.world_size > 1:
        dist.all_reduce(losses)
    if infonce is not None:
        losses[-1] = infonce
    flops = model.flops(*cost) if part == "all" else model.flops(*cost, tap=cfg.jepa_layer)
    return losses, flops + (model.flops(*cost, tap=cfg.jepa_layer) / 3 if infonce is not None else 0)


def sum_gradients(model, share):
    """Add up the ranks' gradients, in one message; the norm of their sum, a 0-dim tensor, not finite where a gradient isn't."""
    params = [p for p in model.parameters() if p.grad is not None]
    if share.world_size > 1:
        flat = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(flat)
        for p, own in zip(params, flat.split([p.numel() for p in params])):
            p.grad = own.view_as(p)
    return torch.stack(torch._foreach_norm([p.grad for p in params])).norm()


def unsound(losses, norm, cfg, step, history):
    """1 where a step must not reach the weights, else 0: a 0-dim tensor, so that the GPU is not waited for, the same on all ranks.

    Non-finite losses (any number,) or gradient norm, or with SKIP_SIGMA a spike of the first loss or the norm over the last steps, whose
    finite ones are in history (SPIKE_STEPS, 2), which this one is added to: a level that lasts is soon no spike.
    """
    finite = torch.isfinite(losses).all() & torch.isfinite(norm)
    if not cfg.skip_sigma or history is None:
        return (~finite).float()
    now, place = torch.stack((losses[0], norm)), step % len(history)
    std, mean = torch.std_mean(history, dim=0)
    spike = (now > mean + cfg.skip_sigma * std).any() if step >= len(history) else ~finite
    history[place] = torch.where(finite, now, history[place])
    return (~finite | spike).float()


def apply_gradients(optimizers, progress, cfg, weight=1.0, bad=None):
    """One step of the optimizers of a gradient, with weight times the learning rates of this moment of the run; clears it.
    bad: 0-dim tensor; where it is 1, weights and optimizers stay as they are."""
    warmdown = min(1.0, (1 - progress) / cfg.warmdown_frac) if cfg.warmdown_frac else 1.0
    if bad is not None and not bad.is_cuda:  # known already; a GPU would have to be waited for
        if bad:
            for optimizer in optimizers:
                optimizer.zero_grad()
            return
        bad = None
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * warmdown * (1.0 if group.get("term_only") else weight)
        optimizer.found_inf = bad  # the GradScaler's way in; read by torch's fused Adam and by Muon
        optimizer.step()
        optimizer.zero_grad()


def build_updates(model, cfg):
    """What training_step moves the weights by: the optimizers of the loss, and with JEPA_UPDATE=decoupled those of the term, which decay nothing."""
    return [build_optimizers(model, cfg)] + ([build_optimizers(model, cfg, decay=0.0)] if cfg.jepa_lambda and cfg.jepa_update == "decoupled" else [])


def training_step(model, loss_fn, updates, cfg, data, share, step, progress, jepa_lambda, history=None):
    """One step of the run: losses and FLOPs as accumulate_gradients returns them, the losses with two more numbers behind them: the
    gradient's norm, and 1 where the step was left out (unsound, whose history it takes), else 0. Of a decoupled step the term's half
    may be left out alone; the norm, that of the plain half, is then nan.

    Decoupled: the step of a run without the term, and then one of the term alone, with momentum and normalisation of its
    own. In Muon's buffer even a weak gradient could become a full-size update, since orthogonalising lifts every direction
    to the same length (records/studies/span_text didn't find that); here its size is lambda's. Like AdamW's weight decay, but one after the other, so that one gradient is held.
    """
    decoupled = cfg.jepa_update == "decoupled" and jepa_lambda is not None
    losses, flops = accumulate_gradients(model, loss_fn, cfg, data, share, step, None if decoupled else jepa_lambda)
    norm = sum_gradients(model, share)
    bad = unsound(losses, norm, cfg, step, history)
    apply_gradients(updates[0], progress, cfg, bad=bad)
    if decoupled:
        term, more = accumulate_gradients(model, loss_fn, cfg, data, share, step, jepa_lambda, "term", cfg.jepa_rows_frac)
        finite = torch.isfinite(term).all() & torch.isfinite(sum_gradients(model, share))
        norm, bad = torch.where(finite, norm, torch.nan), torch.maximum(bad, (~finite).float())
        apply_gradients(updates[1], progress, cfg, jepa_lambda, bad)
        losses, flops = torch.cat((losses, term)), flops + more
    return torch.cat((losses, norm[None], bad[None])), flops


# ------------------------------------------------------------------------------------------------------ diagnostics


def diagnose(model, loss_fn, cfg, data, share, step):
    """What the term does at these weights, a dict of numbers; the run goes on as if it had not been asked.

    grad_ratio, grad_cosine: norm of JEPA_LAMBDA times the term's gradient over that of JEPA_GAMMA times the cross entropy's, and
    their cosine, over the whole step; None where one is zero. Of the first micro-batches of DIAG_STEPS steps: jepa_matched,
    jepa_shuffled (each view with that of another pair or span), jepa_independent (the term of random states), and of the first
    of them jepa.state_statistics. ValueError where states are not finite.
    """
    gradients = []
    for part, weight in (("all", None), ("term", cfg.jepa_lambda)):
        accumulate_gradients(model, loss_fn, cfg, data, share, step, weight, part, ahead=False)
        sum_gradients(model, share)
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])
        model.zero_grad()
    dot = lambda a, b: sum((x.double() * y.double()).sum().item() for x, y in zip(a, b))
    ce, term = gradients
    a, b = dot(ce, ce) ** 0.5, dot(term, term) ** 0.5
    found = {"grad_ratio": cfg.jepa_lambda * b / a if a else None, "grad_cosine": dot(ce, term) / a / b if a and b else None}

    own, independent, generator = [], [], torch.Generator(share.device).manual_seed(cfg.seed)
    with torch.no_grad():
        for n in range(DIAG_STEPS):
            batch = data.read(step + n, share, True)[0][0].to(share.device)
            (h,) = loss_fn(model, cfg, batch, None, "states")
            if not h.isfinite().all():
                raise ValueError(f"non-finite states at step {step}: lower the learning rates or JEPA_LAMBDA")
            if n == 0:
                found |= jepa.state_statistics(norm(h) if compares_normed(cfg) else h, batch.idx != data.doc_token, batch.positions)
            noise = torch.randn(h.shape, generator=generator, device=h.device, dtype=h.dtype) * h.float().square().mean().sqrt().to(h)
            for views, states in ((own, h), (independent, noise)):
                u, v, weight, floor, group = jepa_views(model, cfg, states, batch.views)
                kept = weight.flatten() > 0
                views.append([None if t is None else t[kept] for t in (u.flatten(0, -2), v.flatten(0, -2), floor if floor is None else floor.flatten(), group)])
    join = lambda parts: [None if x[0] is None else torch.cat(x) for x in zip(*parts)]
    (u, v, floor, group), random_states = join(own), join(independent)
    for name, (x, y, floor, group) in {"matched": (u, v, floor, group), "shuffled": (u, v.roll(len(v) // 2, 0), floor, None), "independent": random_states}.items():
        found[f"jepa_{name}"] = jepa.distance(x, y, cfg.jepa_distance, floor=floor, group=group).item()
    return found


# ------------------------------------------------------------------------------------------------------- evaluation


def row_losses(model, batch):
    """Cross entropy in nats summed over each row's targets: (B,)."""
    x, _ = model._run_blocks(batch.idx, -1, batch.positions, None if batch.ends is None else tree_mask(batch.ends))
    return model.cross_entropy(x, batch.targets, reduction="none").view(batch.idx.shape).sum(1)


@torch.no_grad()
def evaluate(model, eval_fn, data, share, log, checkpoints=None):
    """(val_loss in nats per target, val_bpb in bits per UTF-8 byte of text or None) over the val split, the same at any rank count;
    None where one of the ranks' checkpoints has received a signal: it may leave no time for the rest."""
    total = torch.zeros(4, dtype=torch.float64)  # nats, targets, bytes of text, signals
    began = said = None
    for done, batch in data.val_batches(share):
        if checkpoints and checkpoints.signal:
            total[3] = 1
            break
        nats = eval_fn(model, batch.to(share.device)).double().sum()
        scored = batch.targets[batch.targets >= 0].numpy()
        total += torch.tensor([nats.item(), len(scored), data.bytes_per_token[scored].sum() if data.bytes_per_token is not None else 0, 0],
                              dtype=torch.float64)
        if began is None:  # the first batch has compiled
            began, said, first = time.perf_counter(), time.perf_counter(), done
        elif time.perf_counter() - said > 20:
            said = time.perf_counter()
            log.line(f"evaluating: {done:.0%}, {(said - began) * (1 - done) / (done - first):.0f} s left")
    if share.world_size > 1:
        dist.all_reduce(total)
    nats, tokens, text_bytes, signals = total.tolist()
    return None if signals else (nats / tokens, nats / math.log(2) / text_bytes if text_bytes else None)


# ------------------------------------------------------------------------------------------------------------- logs


class RunLog:
    """Console, logs/<run_id>/log.txt and metrics.jsonl, and wandb where asked for; silent on all ranks but the first.

    resumed: the manifest of the checkpoint that the run goes on from, {} where it has none; None: a new run. What was logged behind the checkpoint stays in
    log.txt and goes from metrics.jsonl. What a full disk doesn't take is kept and tried again with the next line.
    """

    def __init__(self, cfg, origin, rank, resumed=None):
        self.folder, self.iterations, self.rank, self.wandb, self.unwritten = ROOT / "logs" / cfg.run_id, cfg.iterations, rank, None, {}
        if rank:
            return
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            if resumed is None and not cfg.resume:
                raise ValueError(f"RUN_ID={cfg.run_id}: {self.folder} exists and is never overwritten; choose another RUN_ID, or RESUME=logs/{cfg.run_id}") from None
        self.held = open(self.folder / "log.txt", "ab")
        try:  # one process at a time: a rank may outlive its torchrun
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"RUN_ID={cfg.run_id}: another process is training this run; end it first") from None
        except OSError:
            pass  # some network file systems have no locks
        if resumed is None:
            os.truncate(self.held.fileno(), 0)  # of a process that was killed before its first step
            for name in SOURCES:
                self.note(f"{'=' * 40} {name}\n{(ROOT / name).read_text(encoding='utf-8')}")
        self.note(f"{'=' * 40} environment\n{describe_machine()}\n{'=' * 40} run")
        for name, value in dataclasses.asdict(cfg).items():
            self.line(f"config {name}: {value!r} ({origin[name]})")
        if resumed is None:
            settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in ("run_id", "resume")}  # to be used again
            write_whole(self.folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False).encode())  # from here on there is a run to resume
        else:
            self.go_on(resumed)
        if cfg.wandb:
            import wandb
            again = {"id": resumed["wandb"], "resume": "allow"} if resumed and resumed["wandb"] else {}
            self.wandb = wandb.init(project="nanojepa", name=cfg.run_id, config=dataclasses.asdict(cfg), dir=str(self.folder), **again)

    def go_on(self, manifest):
        """Take up the files of a run at its checkpoint."""
        self.line(f"resumed at step {manifest.get('step', 0)}{', not bit for bit on a GPU, whose embedding backward uses atomic adds' * torch.cuda.is_available()}")
        metrics, kept = self.folder / "metrics.jsonl", manifest.get("metrics_bytes", 0)
        size = metrics.stat().st_size if metrics.exists() else 0
        if size < kept:
            self.line(f"warning: {metrics} has lost its last lines: {size} bytes, {kept} when the checkpoint was written")
        elif size > kept:
            os.truncate(metrics, kept)
        for name, sha256 in manifest.get("sources", {}).items():
            if sha256 != source_hashes().get(name):
                text = (ROOT / name).read_text(encoding="utf-8") if name in SOURCES else ""
                self.note(f"{'=' * 40} {name}, changed\n{text}\n{'=' * 40} run")
                self.line(f"warning: {name} is not what it was before step {manifest['step']}: from here on this is another run; its source is in the log")

    def append(self, name, text):
        """Append text to a file of the run, whole or not at all."""
        data = self.unwritten.get(name, b"") + text.encode()
        try:
            with open(self.folder / name, "ab", buffering=0) as f:
                size = f.seek(0, os.SEEK_END)
                if (written := f.write(data)) < len(data):
                    f.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            if name not in self.unwritten:
                say(f"warning: {self.folder / name}: {e.strerror}; the run goes on, its lines are kept until they can be written")
            self.unwritten[name] = data
        else:
            if self.unwritten.pop(name, None):
                say(f"{self.folder / name} is written again, no line is lost")

    def size(self, name):
        """Bytes of a file with all that belongs to it, 0 where it doesn't exist."""
        file = self.folder / name
        return (file.stat().st_size if file.exists() else 0) + len(self.unwritten.get(name, b""))

    def note(self, text):
        """Append a line to log.txt."""
        if self.rank == 0:
            self.append("log.txt", text + "\n")

    def line(self, text):
        """Print a line and append it to log.txt."""
        if self.rank == 0:
            say(text)
            self.note(text)

    def metrics(self, step, train_time, values, more={}):
        """Write a log line `step:.. name:value .. train_time:..ms step_avg:..ms`, a line of metrics.jsonl, and to wandb;
        more: values for the latter two only."""
        if self.rank:
            return
        ms = 1000 * train_time
        shown = " ".join(f"{k}:{v:.4f}" if abs(v) >= 0.01 else f"{k}:{v:.3g}" for k, v in values.items() if v is not None)
        self.line(f"step:{step}/{self.iterations} {shown} train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms")
        row = {"step": step, **values, **more, "train_time": train_time}
        self.append("metrics.jsonl", json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(row, step=step)


def say(text):
    """Print a line, where the console takes it: nobody may be listening any more, or its file lies on a full disk."""
    try:
        print(text, flush=True)
    except OSError:
        pass


def source_hashes():
    """{file: sha256} of SOURCES."""
    return {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in SOURCES}


def describe_machine():
    """Versions, commit and hardware, as text for the log."""
    def run(*command):
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""
    commit = run("git", "rev-parse", "HEAD") or "unknown"
    if run("git", "status", "--porcelain", "--untracked-files=no"):
        commit += " with uncommitted changes"
    lines = [f"git commit: {commit}", f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, {platform.platform()}",
             f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {run('sh', '-c', 'lscpu | grep -i model.name')}"]
    return "\n".join(lines + ([run("nvidia-smi")] if torch.cuda.is_available() else []))


# --------------------------------------------------------------------------------------------------------- the loop


class Clock:
    """Training time in s: runs between start and stop, which wait for the device; nothing else is counted. passed: before a checkpoint."""

    def __init__(self, device, passed=0.0):
        self.synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.passed, self.since = passed, None

    def start(self):
        self.synchronize()
        self.since = time.perf_counter()

    def stop(self):
        self.synchronize()
        self.passed, self.since = self.now(), None

    def now(self):
        return self.passed + (time.perf_counter() - self.since if self.since is not None else 0.0)


def run_progress(cfg, step, flops, clock, share, checkpoints=None):
    """(fraction of the run that is done, as rank 0 sees it: the largest of steps, FLOPs and seconds, 1 or more: stop; the signal
    that any rank has received, 0 for none; whether rank 0 has a checkpoint to write): the same on all ranks."""
    progress = max(step / cfg.iterations, flops / cfg.train_flops if cfg.train_flops else 0)
    if cfg.max_wallclock_seconds:
        progress = max(progress, clock.now() / cfg.max_wallclock_seconds)
    due, signal = (checkpoints.due(step, progress >= 1), checkpoints.signal) if checkpoints else (False, 0)
    if share.world_size > 1:
        shared = torch.tensor([0.0 if share.rank else progress, signal, due], dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)  # a CPU tensor: over gloo, so the GPU is not waited for
        progress, signal, due = shared.tolist()
    return progress, int(signal), bool(due)


def jepa_schedule(cfg, progress, step):
    """Lambda in this step, or None where it has no term."""
    if not jepa.keeps_term(cfg.seed, step, cfg.jepa_ratio):
        return None
    return jepa.jepa_weight(progress, cfg.jepa_lambda, cfg.jepa_start_frac, cfg.jepa_end_frac, cfg.jepa_warmup_frac)


def needed_graphs(cfg):
    """The training graphs a run will need, as values of jepa_lambda: None for plain, and lambda with the term; in one order on all ranks."""
    on = {jepa.jepa_weight(p, cfg.jepa_lambda, cfg.jepa_start_frac, cfg.jepa_end_frac) is not None
          for p in (0.0, cfg.jepa_start_frac, cfg.jepa_end_frac) if p < 1} | ({False} if cfg.jepa_ratio < 1 else set())
    if cfg.jepa_update == "decoupled" and True in on:
        on.add(False)
    return [cfg.jepa_lambda if term else None for term in sorted(on)]


def warm_up(model, loss_fn, cfg, data, share):
    """Compile every graph of the training step and load the kernels, then put the weights back. The loader and the span
    generator have no state; the optimizers used here are thrown away."""
    before = {name: w.clone() for name, w in model.state_dict().items()}
    try:
        for weight in needed_graphs(cfg):
            training_step(model, loss_fn, build_updates(model, cfg), cfg, data, share, 0, 0.0, weight)
        if cfg.diag_every:
            diagnose(model, loss_fn, cfg, data, share, 0)
    finally:
        model.load_state_dict(before)
        model.zero_grad()


def run_tensors(model, updates, history):
    """{name: tensor} of all that a step reads and writes; every rank has the same."""
    held = {f"model.{name}": w for name, w in model.state_dict().items()}
    for u, optimizers in enumerate(updates):
        for o, optimizer in enumerate(optimizers):
            for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                held |= {f"optimizer.{u}.{o}.{i}.{key}": value for key, value in optimizer.state.get(p, {}).items()}
    return held | {"history": history}


def restore(model, updates, history, tensors):
    """Put the tensors of a checkpoint, as run_tensors names them, where they were; ValueError where they don't fit."""
    try:
        model.load_state_dict({name.removeprefix("model."): w for name, w in tensors.items() if name.startswith("model.")})
        history.copy_(tensors["history"])
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                u, o, i, key = name.split(".")[1:]
                optimizer = updates[int(u)][int(o)]
                p = [p for group in optimizer.param_groups for p in group["params"]][int(i)]
                optimizer.state[p][key] = value.to(p.device)
    except (RuntimeError, LookupError) as e:
        raise ValueError(f"the checkpoint doesn't fit this code: {' '.join(str(e).split())[:200]}") from None


def train(model, loss_fn, eval_fn, cfg, data, share, log, checkpoints=None, resumed=None):
    """Train to the end of the run and return its results: steps, skipped_steps, train_seconds, val_loss, val_bpb and, with
    TARGET_VAL_LOSS, time_to_target, with DIAG_EVERY the last diagnostics. checkpoints: the Checkpoints to write, and who knows of
    signals; resumed: (manifest, tensors) to go on from. ValueError where the loss is no longer finite; SystemExit by a signal."""
    updates, history = build_updates(model, cfg), torch.zeros(SPIKE_STEPS, 2, device=share.device)
    manifest, tensors = resumed or ({"step": 0, "train_flops": 0.0, "train_seconds": 0.0, "skipped_steps": 0, "result": {"time_to_target": None}}, None)
    if tensors:
        restore(model, updates, history, tensors)
        if checkpoints:
            checkpoints.saved = manifest["step"]
    clock, step, flops, pending, reported = Clock(share.device, manifest["train_seconds"]), manifest["step"], manifest["train_flops"], None, 0
    skipped, result, begun = manifest["skipped_steps"], manifest["result"], manifest["step"]
    if share.world_size > 1:
        dist.barrier()  # all have compiled: the clock is nobody's waiting
    clock.start()

    def settle(pending):
        """Log the losses of the step before: reading them one step late keeps the device busy."""
        nonlocal skipped
        number, losses, copied, train_time, cost = pending
        if copied is not None:
            copied.synchronize()
        *losses, norm, bad = losses.tolist()
        cost["grad_norm"] = norm
        if bad:
            finite, skipped = all(map(math.isfinite, (*losses, norm))), skipped + 1
            what = f"{'a spike' if finite else 'non-finite loss or gradient'} at step {number} (losses {losses}, gradient norm {norm})"
            if not finite and cfg.nan_policy == "stop":
                raise ValueError(f"{what}: lower the learning rates or JEPA_LAMBDA, or NAN_POLICY=skip; the log is in {log.folder}")
            log.line(f"skipped: {what}; {skipped} so far")
        elif number <= 5 or number % cfg.train_log_every == 0:
            log.metrics(number, train_time, dict(zip(("train_loss", "jepa_loss"), losses)), cost)

    while True:
        progress, signal, due = run_progress(cfg, step, flops, clock, share, checkpoints)
        done, saved = progress >= 1, step > begun and (signal or due)
        diagnosed = cfg.diag_every and (done or step % cfg.diag_every == 0)
        validated = done or (cfg.val_loss_every and step and step % cfg.val_loss_every == 0)
        if pending and (diagnosed or validated or saved):
            settle(pending)
            pending = None
        if saved and share.rank == 0:
            clock.stop()
            checkpoints.save(step, run_tensors(model, updates, history), {
                "train_flops": flops, "train_seconds": clock.passed, "skipped_steps": skipped, "result": dict(result), "metrics_bytes": log.size("metrics.jsonl"),
                "config": dataclasses.asdict(cfg), "data": identity(cfg, data), "sources": source_hashes(), "torch": torch.__version__,
                "wandb": log.wandb and log.wandb.id})
            clock.start()
        if signal:
            checkpoints.wait()
            log.line(f"stopped by {Signals(signal).name} at step {step}; go on with RESUME=logs/{cfg.run_id}")
            if share.world_size > 1:
                dist.barrier()  # a rank that ends makes torchrun end the others
                dist.destroy_process_group()
            raise SystemExit(128 + signal)
        if validated or diagnosed:
            clock.stop()
        if validated:
            if (scores := evaluate(model, eval_fn, data, share, log, checkpoints)) is None:
                clock.start()
                continue  # to save and stop; the run that goes on from there evaluates again
            val_loss, val_bpb = scores
            log.metrics(step, clock.passed, {"val_loss": val_loss, "val_bpb": val_bpb})
            if not math.isfinite(val_loss):
                raise ValueError(f"non-finite val_loss at step {step}: lower the learning rates or JEPA_LAMBDA; the log is in {log.folder}")
            if val_loss <= cfg.target_val_loss:
                log.line(f"target_val_loss:{cfg.target_val_loss} reached at step {step} after train_time:{1000 * clock.passed:.0f}ms")
                result["time_to_target"], done = clock.passed, True
        if diagnosed:
            found = diagnose(model, loss_fn, cfg, data, share, step)
            log.metrics(step, clock.passed, found)
            result |= found  # those of the end stay
            for warning in jepa.diagnostic_warnings(found, cfg.model_dim, bool(cfg.jepa_lambda)):
                log.line(f"warning: step {step}: {warning}")
        if done:
            return result | {"steps": step, "skipped_steps": skipped, "train_seconds": clock.passed, "train_flops": flops, "val_loss": val_loss, "val_bpb": val_bpb}
        if validated or diagnosed:
            if share.world_size > 1:
                dist.barrier()  # as before the first step
            clock.start()
        losses, step_flops = training_step(model, loss_fn, updates, cfg, data, share, step, progress, jepa_schedule(cfg, progress, step), history)
        copied = None
        if share.device.type == "cuda":
            losses = torch.empty(losses.shape, pin_memory=True).copy_(losses, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        step, flops = step + 1, flops + step_flops
        if pending:
            settle(pending)
        pending = step, losses, copied, clock.now(), {"step_flops": step_flops, "train_flops": flops}
        if int(10 * progress) > reported:
            reported = int(10 * progress)
            log.line(f"progress: {progress:.0%}, {clock.now() / progress * (1 - progress):.0f} s of training left")


def identity(cfg, data):
    """What data a run is fed, for JSON: the sha256 of meta.json's shards, or the place of foreign ones, which are held to their first use, and their sizes."""
    return data.sha256 or [str(Path(cfg.data_path).resolve()), *map(len, data.train), *map(len, data.val)]


def find_run(cfg, origin, warnings, rank):
    """What RESUME asks for: (cfg, origin, manifest, tensors) to go on with, cfg and origin being those the run began with. The manifest is {}
    where it has no checkpoint yet, and None for a new run. A finished one says its result again: SystemExit. ValueError: why it can't go on."""
    if not cfg.resume:
        return cfg, origin, None, None
    folder = ROOT / "logs" / (cfg.run_id if cfg.resume == "auto" else Path(cfg.resume).name)
    if cfg.resume != "auto" and (Path(cfg.resume).resolve() != folder.resolve() or not folder.is_dir()):
        raise ValueError(f"RESUME={cfg.resume}: no such run; give the logs/<run> of one, or auto and its RUN_ID")
    if cfg.run_id not in ("", folder.name):
        raise ValueError(f"RUN_ID={cfg.run_id}: RESUME={cfg.resume} goes on as {folder.name}; leave RUN_ID out")
    if not (folder / "config.yaml").exists():  # killed before its first step, or new
        return dataclasses.replace(cfg, run_id=folder.name), origin, None, None
    finished = (folder / "result.json").exists()
    manifest, tensors = not finished and newest_checkpoint(folder, warnings) or ({}, None)
    saved = manifest.get("config") or dataclasses.asdict(load_config(Config, [f"--config={folder / 'config.yaml'}"], {})[0])
    if unknown := sorted(saved.keys() - origin.keys()):
        raise ValueError(f"RESUME={cfg.resume}: the run has settings that this code doesn't know: {', '.join(unknown)}; use the code in its log.txt")
    values, said = {"resume": manifest["config"]["resume"] if manifest else "auto" * (cfg.resume == "auto"), "run_id": folder.name}, {}
    for name, value in saved.items():
        if name in values:
            continue
        values[name], said[name] = (value, f"{folder.name}/config.yaml") if origin[name] == "default" else (getattr(cfg, name), origin[name])
        if values[name] != value and name not in MAY_CHANGE:
            raise ValueError(f"{name.upper()}={values[name]} ({origin[name]}): the run began with {value!r}, and a resumed run is the same run; leave it out, or begin a new one")
    if finished:
        if rank == 0:
            say((folder / "log.txt").read_text(encoding="utf-8").splitlines()[-1])
        raise SystemExit(0)
    return Config(**values), origin | said, manifest, tensors


def start_process():
    """(rank, world size, device) of this process, in torchrun's group where there is one."""
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:  # two runs on a CPU are the same bit for bit; inductor's embedding backward would use atomic adds otherwise
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world_size, device


def choose_dtype(name, device):
    """The torch dtype of DTYPE; auto is bfloat16 where the hardware multiplies it natively."""
    if name == "auto":
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
                  torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
        return torch.bfloat16 if native else torch.float32
    return getattr(torch, name)


def build_model(cfg, vocab_size, device):
    """The GPT of this config on the device, seeded, or with the weights of INIT_FROM; ValueError where they don't fit."""
    torch.manual_seed(cfg.seed)
    model = GPT(GPTConfig(vocab_size, cfg.num_layers, cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.mlp_mult,
                          cfg.tie_embeddings, cfg.value_embed,
                          bool(cfg.jepa_lambda) and cfg.jepa_predictor == "linear", dtype=choose_dtype(cfg.dtype, device))).to(device)
    if cfg.init_from:
        load_weights(model, cfg.init_from)
    if dist.is_initialized():
        for p in model.parameters():  # the same everywhere, whatever generators or files the nodes have
            dist.broadcast(p.data, 0)
    return model


def sample_text(model, data, cfg, tokens=120):
    """A text the model writes from the document marker on, temperature 0.8, or why there is none."""
    if data.token_table is None or not 0 <= data.doc_token < data.vocab_size:
        return "no text sample: the tokenizer or the document marker is unknown"
    generator = torch.Generator().manual_seed(cfg.seed)
    try:
        new = model.generate([[data.doc_token]], tokens, temperature=0.8, top_k=50, stop_token=data.doc_token, generator=generator)[0]
    except RuntimeError as e:  # a ruined model cannot be sampled from; its result stands all the same
        return f"no text sample: {e}"
    return b"".join(data.token_table[t] for t in new if t < len(data.token_table)).decode(errors="replace")


def finish(model, eval_fn, cfg, data, share, log, checkpoints, result, began):
    """Write the weights and the artifact, evaluate the latter, and write result.json with the rest of the result, which is added to it.
    began: time.perf_counter() of the process's start. ValueError where a file can't be written; the numbers are printed all the same."""
    checkpoints.wait()
    state = {name: w.detach().cpu() for name, w in model.state_dict().items()}
    artifact, lost = quantize(state), None
    try:
        if share.rank == 0:
            write_whole(log.folder / "model.safetensors", to_safetensors(state))
            write_whole(log.folder / "model.int8.zlib", artifact)
    except OSError as e:
        lost = e
    model.load_state_dict(dequantize(artifact))
    quantized_val_loss, quantized_val_bpb = evaluate(model, eval_fn, data, share, log)
    code_bytes = sum(len((ROOT / name).read_bytes()) for name in SOURCES)
    peak = torch.cuda.max_memory_allocated() if share.device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result |= {"quantized_val_loss": quantized_val_loss, "quantized_val_bpb": quantized_val_bpb,
               "artifact_bytes": len(artifact) + code_bytes, "fits_16mb": len(artifact) + code_bytes <= 16_000_000,
               "tokens": result["steps"] * cfg.train_batch_tokens, "peak_memory_bytes": peak, "total_seconds": time.perf_counter() - began}
    if share.rank:
        return
    model.load_state_dict(state)
    log.line(f"{'-' * 40} text sample\n{sample_text(model, data, cfg)}\n{'-' * 40}")
    log.line(f"artifact: {len(artifact):,} bytes of weights + {code_bytes:,} of source = {result['artifact_bytes']:,} "
             f"({'within' if result['fits_16mb'] else 'over'} 16,000,000)")
    shown = {k: result[k] for k in ("val_loss", "val_bpb", "quantized_val_bpb") if result[k] is not None}
    log.line(f"result: {' '.join(f'{k}:{v:.4f}' for k, v in shown.items())} artifact_bytes:{result['artifact_bytes']} steps:{result['steps']} "
             f"train_time:{1000 * result['train_seconds']:.0f}ms -> logs/{cfg.run_id}/result.json")
    try:  # last: what has a result is finished
        if lost:
            raise lost
        write_whole(log.folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    except OSError as e:
        way = {result["steps"]: "write them", None: "train again"}.get(checkpoints.saved, f"go on from step {checkpoints.saved}")
        raise ValueError(f"{e.filename or log.folder}: {e.strerror}, so this run's files are incomplete; make room and {way} with RESUME=logs/{cfg.run_id}") from None


def run(cfg, origin, warnings):
    """The main job: prepare, compile, train, evaluate, quantise, save. Returns the content of result.json."""
    began = time.perf_counter()
    rank, world_size, device = start_process()
    cfg, origin, manifest, tensors = find_run(cfg, origin, warnings, rank)
    cfg.run_id = cfg.run_id or time.strftime(f"%Y%m%d-%H%M%S-seed{cfg.seed}")
    data = open_data(cfg)  # the ranks meet there: all have looked for the run before the first one makes its folder
    if world_size > 1:
        steps = torch.tensor([1, -1]) * (-1 if manifest is None else manifest.get("step", 0))
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        if steps.sum():
            raise ValueError("RESUME: the ranks find different checkpoints; logs/ must be a disk that all nodes share")
    if manifest and manifest["data"] != identity(cfg, data):
        raise ValueError(f"DATA_PATH={cfg.data_path}: not the data that {cfg.run_id} began with; give it where that data is now")
    share = divide_batch(cfg, rank, world_size, device, data.least_micro_batches)
    data.check_micro_batch(share)
    model = build_model(dataclasses.replace(cfg, init_from="") if tensors else cfg, data.vocab_size, device)
    log = RunLog(cfg, origin, rank, manifest)
    parameters = sum(p.numel() for p in model.parameters())
    if data.no_bpb:
        warnings.append(f"no val_bpb: {data.no_bpb}")
    if data.meta and cfg.tokenizer:
        warnings.append(f"TOKENIZER={cfg.tokenizer} is not used: {data.folder} has a meta.json")
    for text in [*warnings, *data.warnings, f"{parameters:,} parameters, {model.config.dtype} on {world_size} x {device.type}, {cfg.train_batch_tokens} tokens a step, "
                 f"micro-batches of {share.micro_rows} rows of {cfg.train_seq_len}, {data.about}"]:
        log.line(text)

    loss_fn, eval_fn, compiled, compiling = training_loss, row_losses, cfg.compile, time.perf_counter()
    if compiled:
        try:
            loss_fn, eval_fn = (torch.compile(f, fullgraph=True, dynamic=False) for f in (loss_fn, eval_fn))
            warm_up(model, loss_fn, cfg, data, share)
        except torch._dynamo.exc.BackendCompilerFailed as e:  # a CPU without a C++ compiler
            log.line(f"torch.compile does not work here, going on without, slower: {' '.join(str(e).split())[:200]}")
            loss_fn, eval_fn, compiled = training_loss, row_losses, False
    if not compiled:
        warm_up(model, loss_fn, cfg, data, share)
    log.line(f"{len(needed_graphs(cfg))} training graph(s) warmed up in {time.perf_counter() - compiling:.0f} s")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    with Checkpoints(log.folder, cfg.checkpoint_every, cfg.checkpoint_seconds, rank, log) as checkpoints:
        try:
            result = train(model, loss_fn, eval_fn, cfg, data, share, log, checkpoints, tensors and (manifest, tensors))
        except ValueError as e:
            log.note(f"error: {e}")
            raise
        result |= {"data_sha256": data.sha256, "parameters": parameters, "compiled": compiled, "run_id": cfg.run_id, "seed": cfg.seed, "config": dataclasses.asdict(cfg)}
        finish(model, eval_fn, cfg, data, share, log, checkpoints, result, began)  # a signal now lets it end well
    if world_size > 1:
        dist.destroy_process_group()
    return result


def main():
    try:
        run(*load_config(Config, sys.argv[1:], os.environ, __doc__))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError, SystemExit, RuntimeError) as e:
        if isinstance(e, SystemExit) and not isinstance(e.code, str):
            raise  # --help, a signal
        if isinstance(e, RuntimeError):
            if not (isinstance(e, dist.DistError) or dist.is_initialized() and re.search(r"gloo|peer|socket", str(e), re.I)):
                raise
            e = f"lost contact with another rank, which has probably ended; its own message says why ({' '.join(str(e).split())[:150]})"
        message = f"error: {str(e).removeprefix('error: ')}"
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)  # what all ranks find wrong is said once, by the first, whose exit ends the others
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun repeats what it finds there as the cause
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}))
        raise SystemExit(message) from None


if __name__ == "__main__":
    main()
