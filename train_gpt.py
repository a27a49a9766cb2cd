"""Pretrain a GPT with next-token cross entropy and one JEPA term.

    JEPA_LAMBDA=0.1 torchrun --standalone train_gpt.py

One process on a CPU or a GPU, or torchrun on many. Read from top to bottom: settings, optimizer,
the training step, evaluation, the loop, a run. The term is in nanojepa/objectives/, the network in
model.py.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

import functools
import getpass
import json
import math
import os
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from signal import Signals
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from model import GPT, Block, GPTConfig, LanguageModel, Linear
from nanojepa.batches import PredTokens, divide_batch, draw_step, open_data
from nanojepa.checkpoint import Checkpoints, find_run, restore, run_tensors
from nanojepa.device import Clock, OnTheWay, all_ranks_max, choose_dtype, start_process
from nanojepa.diagnostics import diagnose, diagnostic_warnings
from nanojepa.files import one_line, one_line_errors, quoted
from nanojepa.muon import Muon
from nanojepa.objectives import Options, Terms, kinds, make_objective
from nanojepa.objectives.distance import DISTANCES
from nanojepa.objectives.schedule import jepa_weight, keeps_term
from nanojepa.packing import tree_mask
from nanojepa.results import finish
from nanojepa.runlog import RunLog, project_sources
from nanojepa.settings import (
    Fraction,
    Natural,
    NonNegative,
    OneOf,
    Positive,
    PositiveFraction,
    check_ranges,
    load_settings,
)
from nanojepa.show import show
from nanojepa.weights import OBJECTIVE_FILE, load_weights

ROOT = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------- settings
# The comment of a setting is its documentation, in --help and docs/settings.md too. Its type holds
# the range. `JEPA_LAMBDA=0.1`, `--jepa_lambda 0.1` and `jepa_lambda: 0.1` in a YAML file set it.


@dataclass
class Config:
    # ---- data
    # Folder with *_train_*.bin and *_val_*.bin. data/stdlib, data/nlregex and data/nlregex_groups
    # are made if they are missing.
    data_path: str = "data/stdlib"
    # Of shards without meta.json: a tiktoken name, a file of ranks, a tokenizer.json or a
    # SentencePiece .model.
    tokenizer: str = ""
    doc_token: int = 50256  # of shards without meta.json: the token that begins a document
    # Rows of the embedding; 0: the tokenizer's size. A multiple of 64 is faster on a GPU.
    vocab_size: Natural = 0
    val_tokens: Natural = 0  # tokens of the val split to evaluate, off the clock; 0: all
    # Of pairs: cross entropy on all tokens, or on the target: the second text and its end token.
    loss_on: Literal["all", "target"] = "all"
    # Pairs and groups that a row can't hold stop the run, or are skipped and counted, or lose the
    # tail of their longer text.
    long_examples: Literal["stop", "skip", "truncate"] = "stop"

    # ---- length of the run
    iterations: Positive = 10_000  # maximum number of steps
    # Maximum training time in s, without compilation and validation; 0: no cap.
    max_wallclock_seconds: NonNegative = 150.0
    train_flops: NonNegative = 0.0  # stop after so many FLOPs, padding counted; 0: no cap
    target_val_loss: NonNegative = 0.0  # stop at a validation at or below it, nats per token
    # Tokens a step, over all ranks and micro-batches. Of pairs, only trunk tokens count.
    train_batch_tokens: Positive = 4096
    train_seq_len: Positive = 256  # tokens a row; attention costs its square
    # Of text: a row's documents don't see each other. FLOPs are counted as if they did. A GPU skips
    # what is masked. Pairs and groups never see each other.
    mask_documents: bool = False
    # Micro-batches a step and rank: less memory, the same step; 0: the fewest that keep one within
    # 65,536 tokens, or within 60% of a GPU's memory. Of pairs: counted without what the term
    # encodes; 0: at least 8.
    grad_accum_steps: Natural = 0

    # ---- model
    num_layers: int = 6  # blocks; time, memory and parameters grow with it
    model_dim: int = 256  # width of the residual stream; the matrices grow with its square
    num_heads: int = 4  # query heads; model_dim / num_heads must be even
    num_kv_heads: int = 4  # key/value heads, shared by num_heads / num_kv_heads query heads each
    mlp_mult: int = 4  # width of the MLP over model_dim; at 4 it is two thirds of a block
    tie_embeddings: bool = False  # the head is the embedding: vocab_size x model_dim fewer weights
    # The values of every block add a second embedding of the token: vocab_size x key/value width
    # more weights, up to 7% of a step.
    value_embed: bool = True

    # ---- optimizer
    # Muon for the matrices of the blocks and Adam for the rest, or AdamW for the matrices too.
    optimizer: Literal["muon", "adamw"] = "muon"
    adamw_lr: NonNegative = 0.003  # AdamW learning rate of the blocks' matrices
    matrix_lr: NonNegative = 0.04  # Muon learning rate of the blocks' matrices
    embed_lr: NonNegative = 0.6  # Adam learning rate of the embeddings
    head_lr: NonNegative = 0.008  # Adam learning rate of the output head
    tied_embed_lr: NonNegative = 0.05  # Adam learning rate of an embedding that is the head
    scalar_lr: NonNegative = 0.04  # Adam learning rate of gains and mixing weights
    muon_momentum: Fraction = 0.95  # momentum of Muon (Nesterov)
    # Weight decay of the blocks' matrices under Muon: each step shrinks them by this times the
    # learning rate.
    muon_weight_decay: NonNegative = 0.0
    warmdown_frac: Fraction = 0.5  # the last part of the run, over which learning rates fall to 0

    # ---- JEPA
    jepa_lambda: NonNegative = 0.0  # weight of the term; 0: off, and the step is the baseline's
    # The term. span: a span of text with what surrounds it. pair: the two texts of a pair, or
    # neighbours in a group. step: the first two steps of a pair's second text. future: a state and
    # the mean of the next eight. masked: a state of a text with holes and that of the whole text.
    # next: a state with the next token, and the next state. mtp: the same logits on the tokens
    # after the next. masked_ce: the cross entropy of a text with holes. Several, each times a
    # factor: masked,mtp:0.5.
    jepa_objective: Terms = "span"
    jepa_gamma: NonNegative = 1.0  # weight of the cross entropy if JEPA_LAMBDA is above 0
    # Chance that a step computes the term. A step without it costs as much as the baseline's.
    # Below 1 costs a second graph if COMPILE_SCOPE is whole.
    jepa_ratio: PositiveFraction = 1.0
    jepa_start_frac: Fraction = 0.0  # the term starts there in the run; costs as JEPA_RATIO does
    jepa_end_frac: Fraction = 1.0  # the term ends there in the run; costs as JEPA_RATIO does
    jepa_warmup_frac: Fraction = 0.0  # part of the run over which lambda rises after the start
    jepa_warmdown_frac: Fraction = 0.0  # part of the run over which lambda falls before the end
    jepa_layer: int = -1  # states compared: -1 the stream into the final norm, k that after block k
    # Compare states after the final norm (1) or before it (0); -1: as the objective prefers.
    jepa_norm: Literal[-1, 0, 1] = -1
    # How far two views are apart. cosine: 1 - cos. The negatives of infonce are the micro-batch's.
    jepa_distance: OneOf(DISTANCES) = "cosine"
    # What view A goes through. linear: a trained model_dim x model_dim matrix.
    jepa_predictor: Literal["identity", "linear"] = "identity"
    jepa_max_span_frac: PositiveFraction = 0.5  # longest span over its document fragment or row
    jepa_spans: Positive = 1  # spans a row of text, or a document of pairs data
    jepa_doc: bool = True  # a span of a row of text lies inside one document fragment
    jepa_pred_tokens: PredTokens = 1  # [PRED] tokens that continue view A; each costs a token
    # Put them after view A, or in front of it, which encodes view A once more.
    jepa_pred_position: Literal["end", "front"] = "end"
    jepa_reverse: bool = False  # the second text predicts the first

    # ---- evaluation and logs
    # Steps between diagnostics of the term, off the clock; 0: none. Each costs about ten steps and
    # the memory of two gradients.
    diag_every: Natural = 0
    val_loss_every: Natural = 0  # steps between validations, off the clock; 0: at the end
    # Evaluation windows advance by this many tokens; 0: rows side by side. It costs
    # train_seq_len / eval_stride times as much.
    eval_stride: Natural = 0
    train_log_every: Positive = 20  # steps between train_loss lines
    # Steps between checkpoints; 0: only if SIGTERM or SIGINT stops the run. A thread writes them,
    # and the last two are kept.
    checkpoint_every: Natural = 0
    checkpoint_seconds: NonNegative = 0.0  # seconds between checkpoints; 0: none by time
    # Go on with logs/<run>, from its newest checkpoint and with its settings; auto: with the run
    # of RUN_ID, or begin it.
    resume: str = ""
    run_id: str = ""  # name of the folder in logs/; default: date, time and seed
    wandb: bool = False  # log to Weights & Biases too; WANDB_MODE=offline needs no login
    show: Natural = 0  # show so many rows or examples of the first step, then counts, and stop

    # ---- machine
    seed: Natural = 1337  # of weights, data order and draws
    init_from: str = ""  # start from the weights of logs/<run>
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 if the hardware has it
    compile: bool = True  # torch.compile; a run without it is slower but needn't wait for it
    # What is compiled. whole: the step, which saves a GPU traffic. blocks: a block and the head's
    # loss, each on its own, which takes 60% of the time, and a term needs no graph. auto: whole on
    # a GPU, blocks elsewhere.
    compile_scope: Literal["auto", "blocks", "whole"] = "auto"

    def __post_init__(self):
        """Raise ValueError naming the setting if a value makes no sense."""
        check_ranges(self)
        has_term, layers = self.jepa_lambda > 0, self.num_layers
        if not -1 <= self.jepa_layer < layers:
            raise ValueError(f"JEPA_LAYER={self.jepa_layer}: must be -1, or 0 to {layers - 1}")
        if has_term and self.jepa_start_frac >= min(1, self.jepa_end_frac):
            raise ValueError(
                f"JEPA_START_FRAC={self.jepa_start_frac}: must be below "
                f"JEPA_END_FRAC={self.jepa_end_frac}, or the term never runs"
            )
        terms = kinds(self.jepa_objective)
        least = max(kind.least_tokens for kind in terms)
        if (has_term or self.diag_every) and self.train_seq_len < least:
            raise ValueError(
                f"TRAIN_SEQ_LEN={self.train_seq_len}: the objective {self.jepa_objective} needs "
                f"rows of {least} tokens"
            )
        scores = any(kind.needs_last_layer for kind in terms)
        if scores and (self.jepa_layer, self.jepa_norm) != (-1, -1):
            raise ValueError(
                f"JEPA_OBJECTIVE={self.jepa_objective}: it scores the head's logits; leave "
                "JEPA_LAYER and JEPA_NORM out"
            )
        if self.eval_stride > self.train_seq_len:
            raise ValueError(f"EVAL_STRIDE={self.eval_stride}: must not exceed TRAIN_SEQ_LEN")
        if self.resume == "auto" and not self.run_id:
            raise ValueError("RESUME=auto: needs RUN_ID, the run to go on with or to begin")
        if not re.fullmatch(r"(\w[\w.-]*)?", self.run_id):
            raise ValueError(
                f"RUN_ID={self.run_id}: may hold letters, digits, '_', '.' and '-', and must not "
                "begin with '.' or '-'"
            )


# ----------------------------------------------------------------------------- optimizer


def build_optimizers(model, objective, cfg):
    """The optimizers of a run: Muon for matrices and Adam for the rest, or AdamW for all.

    Every parameter of the model and of the objective (None without a term) is in one group.
    """
    blocks = [m.weight for m in model.blocks.modules() if isinstance(m, Linear)]
    embeds = [model.embed.weight]
    values = [] if model.value_embed is None else [model.value_embed.weight]
    heads = [] if model.head is None else [model.head.weight]
    taken = {id(p) for p in blocks + embeds + values + heads}
    scalars = [p for p in model.parameters() if id(p) not in taken]
    own = [] if objective is None else list(objective.parameters())
    predictor = [p for p in own if p.dim() == 2]
    scalars += [p for p in own if p.dim() != 2]
    # Rare tokens have tiny gradients, so their eps is 1e-10 (modded-nanogpt). A gain whose length
    # a cosine ignores has only rounding noise as gradient. 1e-10 would turn that into full steps.
    rates = (
        (embeds, cfg.embed_lr if heads else cfg.tied_embed_lr, 1e-10),
        (values, cfg.embed_lr, 1e-10),
        (heads, cfg.head_lr, 1e-10),
        (scalars, cfg.scalar_lr, 1e-6),
    )
    groups = [dict(params=p, lr=lr, initial_lr=lr, eps=eps) for p, lr, eps in rates if p]
    matrices = [dict(params=params) for params in (blocks, predictor) if params]
    matrices[0]["weight_decay"] = cfg.muon_weight_decay
    if cfg.optimizer == "adamw":  # betas and weight decay of nanoGPT
        for group in matrices:
            decay = 0.0 if group["params"] is predictor else 0.1
            group |= dict(lr=cfg.adamw_lr, initial_lr=cfg.adamw_lr, weight_decay=decay)
            group["betas"] = (0.9, 0.95)
        groups += matrices
        return [torch.optim.AdamW(groups, betas=(0.8, 0.95), weight_decay=0.0, fused=True)]
    muon = Muon(matrices, cfg.matrix_lr, cfg.muon_momentum, model.config.dtype)
    return [muon, torch.optim.Adam(groups, betas=(0.8, 0.95), fused=True)]


def lr_scale(cfg, progress):
    """The factor of all learning rates at this fraction of the run: a linear warmdown to 0."""
    if cfg.warmdown_frac == 0:
        return 1.0
    return min(1.0, (1 - progress) / cfg.warmdown_frac)


# ----------------------------------------------------------------------------- training step


def eager(function):
    return function


@functools.cache
def compiled(function):
    """The function compiled; each input shape is compiled on its own."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def compile_parts(model):
    """Compile a block, for all blocks, and the head's losses, each on its own."""
    compiled_block = compiled(Block.forward)

    def forward(block, x, x0, v_token, rope, mask, cache):
        if cache is not None:  # generation, too short to wait for a compiler
            return Block.forward(block, x, x0, v_token, rope, mask, cache)
        # In the first block x is x0. Without a copy that would be compiled as a second graph.
        x = x.clone() if x is x0 else x
        return compiled_block(block, x, x0, v_token, rope, mask, None)

    for block in model.blocks:
        block.forward = functools.partial(forward, block)
    for name in ("cross_entropies", "token_losses"):
        setattr(model, name, functools.partial(compiled(getattr(GPT, name)), model))


def compile_run(run):
    """Let what the run calls be compiled, in the scope that COMPILE_SCOPE asks for."""
    scope = run.cfg.compile_scope
    if scope == "whole" or (scope == "auto" and run.share.device.type == "cuda"):
        run.compile = compiled
    else:
        compile_parts(run.model)
    run.is_compiled = True


@dataclass
class Run:
    """Everything that a step needs."""

    cfg: Config
    data: Any  # TokenData or PairData
    share: Any  # what this rank does of a step
    model: GPT
    objective: Any  # an Objective, None without a term
    optimizers: list
    compile: Any = eager  # compiled if whole functions are; eager if the model's parts are, or none
    is_compiled: bool = False  # in either scope
    began: float = 0.0  # time.perf_counter() of its start

    @property
    def lm(self):
        return LanguageModel(self.model, self.cfg.jepa_layer)

    def modules(self):
        modules = {"model": self.model}
        return modules if self.objective is None else modules | {"objective": self.objective}

    def parameters(self):
        return [p for module in self.modules().values() for p in module.parameters()]


class Losses(NamedTuple):
    loss: torch.Tensor  # what is differentiated
    ce: torch.Tensor | None = None  # detached; None if the loss is the cross entropy
    term: torch.Tensor | None = None  # detached; None without a term


def training_loss(model, objective, cfg, batch, weight=None):
    """gamma * cross entropy + weight * term of one micro-batch, as Losses.

    This is what is compiled. Both parts are divided by counts of the whole step, so they add up
    over micro-batches and ranks to the step's means. If batch.drawn is None, the graph has no
    trace of a term. weight: lambda in this step, a 0-dim tensor.
    """
    mask = None if batch.ends is None else tree_mask(batch.ends)
    x, h = model._run_blocks(batch.idx, cfg.jepa_layer, batch.positions, mask)
    gamma = cfg.jepa_gamma if cfg.jepa_lambda else 1.0
    if batch.drawn is None:
        ce = model.cross_entropy(x, batch.targets) / batch.num_targets
        return Losses(ce) if gamma == 1 else Losses(gamma * ce, ce.detach())
    # One pass of the head scores the next tokens, and what else the term wants scored.
    more, factors = objective.more_targets(batch, batch.drawn)
    targets = torch.cat((batch.targets[None], more))
    share = (torch.ones_like(weight) / batch.num_targets)[None]
    scales = torch.cat((gamma * share, weight * factors))
    loss, sums = model.cross_entropies(x, targets, scales)
    term = objective.loss(LanguageModel(model, cfg.jepa_layer), batch, h, batch.drawn)
    ce, *others = sums * torch.cat((share, factors))
    return Losses(loss + weight * term, ce, sum(others, term.detach()))


class StepResult(NamedTuple):
    """0-dim tensors on the device, of the whole step; and its FLOPs."""

    ce: torch.Tensor
    term: torch.Tensor | None
    grad_norm: torch.Tensor
    flops: float


def training_step(run, step, progress, jepa_lambda):
    """One step of the run at this fraction of it; jepa_lambda None: without the term."""
    objective = None if jepa_lambda is None else run.objective
    batches, tokens, visible_pairs = run.data.load(step, run.share, objective)
    weight = None
    if objective is not None:
        draw_step(objective, batches, run.cfg.seed, step)
        # torch.full avoids a copy from the host, which would wait for the GPU.
        weight = torch.full((), jepa_lambda, device=run.share.device)
    loss_of = run.compile(training_loss)
    means = 0  # of the step: the cross entropy, and the term if there is one
    for batch in batches:
        batch = batch.to(run.share.device)
        loss, ce, term = loss_of(run.model, run.objective, run.cfg, batch, weight)
        loss.backward()
        ce = loss.detach() if ce is None else ce
        means += torch.stack([ce] if term is None else [ce, term])
    if run.share.world_size > 1:
        dist.all_reduce(means)
    grad_norm = update_weights(run, lr_scale(run.cfg, progress))
    term = None if objective is None else means[1]
    flops = count_flops(run.model, objective, tokens, visible_pairs)
    return StepResult(means[0], term, grad_norm, flops)


def count_flops(model, objective, tokens, visible_pairs):
    """Matrix FLOPs of a step; an objective's own matrices count as if every token met them."""
    if objective is None:
        return model.flops(tokens, visible_pairs)
    passes, heads = 1 + objective.more_passes, 1 + objective.more_heads
    own = sum(p.numel() for p in objective.parameters() if p.dim() == 2)
    return model.flops(tokens, visible_pairs, passes, heads) + 6 * own * tokens


def update_weights(run, scale):
    """Let the optimizers step; returns the norm of the gradients, which the ranks have summed.

    scale: what all learning rates are multiplied by. Muon sums the gradients of its own parameters.
    Those of the others are summed here, in one message.
    """
    *muon, other = run.optimizers  # AdamW has no Muon beside it
    params = [p for group in other.param_groups for p in group["params"] if p.grad is not None]
    if run.share.world_size > 1:
        flat = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(flat)
        for p, own in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = own.view_as(p)
    norms = torch.stack(torch._foreach_norm([p.grad for p in params]))
    squares = torch.zeros_like(norms[0])
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        optimizer.step()
    for optimizer in muon:
        squares += optimizer.squares
    if run.share.world_size > 1:
        dist.all_reduce(squares)
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    return (squares + norms.square().sum()).sqrt()


# ----------------------------------------------------------------------------- evaluation


def row_losses(model, batch):
    """Cross entropy in nats summed over each row's targets: (B,)."""
    mask = None if batch.ends is None else tree_mask(batch.ends)
    x, _ = model._run_blocks(batch.idx, -1, batch.positions, mask)
    return model.token_losses(x, batch.targets).sum(1)


class Scores(NamedTuple):
    val_loss: float  # nats per target
    val_bpb: float | None  # bits per UTF-8 byte of text


@torch.no_grad()
def evaluate(run, log, checkpoints=None):
    """The Scores over the val split, the same at any number of ranks.

    None if a rank has received a signal, which may leave no time for the rest.
    """
    total = torch.zeros(4, dtype=torch.float64)  # nats, targets, bytes of text, signals
    timer, nats_of = log.timer("evaluating"), run.compile(row_losses)
    for done, batch in run.data.val_batches(run.share):
        if checkpoints and checkpoints.signal:
            total[3] = 1
            break
        nats = nats_of(run.model, batch.to(run.share.device)).cpu().double().sum().item()
        scored = int((batch.targets >= 0).sum())
        text_bytes = run.data.text_bytes(batch.idx.numpy(), batch.targets.numpy())
        total += torch.tensor([nats, scored, text_bytes, 0], dtype=torch.float64)
        timer.report(done)
    if run.share.world_size > 1:
        dist.all_reduce(total)
    nats, targets, text_bytes, signals = total.tolist()
    if signals:
        return None
    return Scores(nats / targets, nats / math.log(2) / text_bytes if text_bytes else None)


# ----------------------------------------------------------------------------- the loop


class Pending(NamedTuple):
    """A step whose numbers aren't read yet: reading them one step late keeps the device busy."""

    step: int
    numbers: OnTheWay  # ce, term, grad_norm
    train_time: float
    more: dict  # for metrics.jsonl


class Trainer:
    """The loop of a run, and what happens between its steps."""

    def __init__(self, run, log, checkpoints, resumed=None):
        """resumed: (manifest, tensors) of the checkpoint to go on from, or None."""
        self.run, self.log, self.checkpoints = run, log, checkpoints
        self.step = 0
        self.flops = seconds = 0.0
        self.result = {"time_to_target": None}
        self.pending = None
        self.reported = 0  # tenths of the run that were said to be done
        if resumed is not None:
            manifest, tensors = resumed
            restore(run.modules(), run.optimizers, tensors)
            self.step = checkpoints.saved = manifest["step"]
            self.flops = manifest["train_flops"]
            self.result = manifest["result"]
            seconds = manifest["train_seconds"]
        self.first_step = self.step
        self.clock = Clock(run.share.device, seconds)

    def train(self):
        """Train to the end; returns the results, a dict for result.json.

        ValueError if the loss is no longer finite; SystemExit after a signal.
        """
        cfg = self.run.cfg
        self.clock.start()
        while True:
            progress, signal, due = self.look_around()
            if (signal or due) and self.step > self.first_step:
                self.save()
            if signal:
                self.stop(signal)
            done = progress >= 1
            if done or (self.step and is_multiple(self.step, cfg.val_loss_every)):
                scores = self.validate()
                if scores is None:
                    continue  # a signal came: look around again, save and stop
                done = done or scores.val_loss <= cfg.target_val_loss
            if is_multiple(self.step, cfg.diag_every) or (cfg.diag_every and done):
                self.diagnose()
            if done:
                return self.results(scores)
            self.clock.start()
            self.take_step(progress)

    def look_around(self):
        """(progress, signal, whether a checkpoint is due), the same on all ranks.

        progress is the fraction of the run that is done, by steps, FLOPs or seconds; 1 ends it.
        """
        cfg = self.run.cfg
        progress = self.step / cfg.iterations
        if cfg.train_flops:
            progress = max(progress, self.flops / cfg.train_flops)
        if cfg.max_wallclock_seconds:
            progress = max(progress, self.clock.now() / cfg.max_wallclock_seconds)
        due = self.checkpoints.due(self.step, progress >= 1)
        if self.run.share.rank:
            progress = 0.0  # rank 0's counts: it is the largest
        progress, signal, due = all_ranks_max(progress, self.checkpoints.signal, due)
        return progress, int(signal), bool(due)

    def take_step(self, progress):
        run = self.run
        jepa_lambda = jepa_schedule(run.cfg, progress, self.step)
        result = training_step(run, self.step, progress, jepa_lambda)
        numbers = OnTheWay(result.ce, result.term, result.grad_norm)
        self.step += 1
        self.flops += result.flops
        self.settle()
        more = {"step_flops": result.flops, "train_flops": self.flops}
        more |= {"lr_scale": lr_scale(run.cfg, progress), "jepa_lambda": jepa_lambda or 0.0}
        self.pending = Pending(self.step, numbers, self.clock.now(), more)
        if int(10 * progress) > self.reported:
            self.reported = int(10 * progress)
            left = self.clock.now() / progress * (1 - progress)
            self.log.line(f"progress: {progress:.0%}, {left:.0f} s of training left")

    def settle(self):
        """Log the pending step; ValueError if its numbers end the run."""
        if self.pending is None:
            return
        step, numbers, train_time, more = self.pending
        self.pending = None
        ce, term, grad_norm = numbers.read()
        values = {"train_loss": ce} if term is None else {"train_loss": ce, "jepa_loss": term}
        if not all(map(math.isfinite, (*values.values(), grad_norm))):
            raise ValueError(
                f"non-finite loss or gradient at step {step} (losses {[*values.values()]}, "
                f"gradient norm {grad_norm}): lower the learning rates or JEPA_LAMBDA; the log is "
                f"in {self.log.folder}"
            )
        if step <= 5 or step % self.run.cfg.train_log_every == 0:
            self.log.metrics(step, train_time, values, more | {"grad_norm": grad_norm})

    def validate(self):
        """The Scores; None if a signal ended the evaluation."""
        self.settle()
        self.clock.stop()
        scores, log = evaluate(self.run, self.log, self.checkpoints), self.log
        if scores is None:
            return None
        more = {"train_flops": self.flops}
        log.metrics(self.step, self.clock.passed, scores._asdict(), more)
        if not math.isfinite(scores.val_loss):
            raise ValueError(
                f"non-finite val_loss at step {self.step}: lower the learning rates or "
                f"JEPA_LAMBDA; the log is in {log.folder}"
            )
        target = self.run.cfg.target_val_loss
        if scores.val_loss <= target:
            self.result["time_to_target"] = seconds = self.clock.passed
            log.line(f"target_val_loss:{target} reached at step {self.step} after {seconds:.0f} s")
        return scores

    def diagnose(self):
        """Log the diagnostics; those of the end stay in the result."""
        self.settle()
        self.clock.stop()
        cfg, numbers = self.run.cfg, diagnose(self.run, self.step, training_loss)
        self.log.metrics(self.step, self.clock.passed, numbers)
        self.result |= numbers
        for warning in diagnostic_warnings(numbers, cfg.model_dim, cfg.jepa_lambda > 0):
            self.log.line(f"warning: step {self.step}: {warning}")

    def results(self, scores):
        return self.result | {
            "steps": self.step,
            "train_seconds": self.clock.passed,
            "train_flops": self.flops,
            **scores._asdict(),
        }

    def save(self):
        """Save a checkpoint; a thread writes it. The clock stands while tensors are copied."""
        run = self.run
        self.settle()
        running = self.clock.since is not None
        self.clock.stop()
        for optimizer in run.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.gather_momentum()
        if run.share.rank == 0:
            manifest = {
                "train_flops": self.flops,
                "train_seconds": self.clock.passed,
                "result": dict(self.result),
                "metrics_bytes": self.log.size("metrics.jsonl"),
                "config": asdict(run.cfg),
                "data": run.data.identity(),
                "sources": self.log.sources,
                "torch": torch.__version__,
                "wandb": self.log.wandb and self.log.wandb.id,
            }
            tensors = run_tensors(run.modules(), run.optimizers)
            self.checkpoints.save(self.step, tensors, manifest)
        if running:
            self.clock.resume()

    def stop(self, signal):
        """End the process after a signal, when the checkpoint is on the disk."""
        self.checkpoints.wait()
        name = Signals(signal).name
        resume = f"RESUME={quoted(self.log.folder)}"
        self.log.line(f"stopped by {name} at step {self.step}; go on with {resume}")
        if dist.is_initialized():
            dist.barrier()  # a rank that ends makes torchrun end the others
            dist.destroy_process_group()
        raise SystemExit(128 + signal)


def is_multiple(step, every):
    """Whether something is due that happens every so many steps; every 0: never."""
    return every > 0 and step % every == 0


def jepa_schedule(cfg, progress, step):
    """Lambda in this step, or None if it runs the plain graph, without the term."""
    if not keeps_term(cfg.seed, step, cfg.jepa_ratio):
        return None
    return jepa_weight(
        progress,
        cfg.jepa_lambda,
        cfg.jepa_start_frac,
        cfg.jepa_end_frac,
        cfg.jepa_warmup_frac,
        cfg.jepa_warmdown_frac,
    )


# ----------------------------------------------------------------------------- a run


def gpt_config(cfg, vocab_size, device):
    """The GPTConfig of this config on a device."""
    names = (f.name for f in fields(GPTConfig) if hasattr(cfg, f.name))
    shape = {name: getattr(cfg, name) for name in names}
    shape |= {"vocab_size": vocab_size, "dtype": choose_dtype(cfg.dtype, device)}
    return GPTConfig(**shape)


def build_model(cfg, vocab_size, device):
    """The seeded GPT of this config, with the weights of INIT_FROM if that is given."""
    torch.manual_seed(cfg.seed)
    model = GPT(gpt_config(cfg, vocab_size, device)).to(device)
    if cfg.init_from:
        load_weights(model, cfg.init_from)
    if dist.is_initialized():
        for p in model.parameters():  # those of rank 0, whatever files the nodes have
            dist.broadcast(p.data, 0)
    return model


def build_objective(cfg, data, device):
    """The Objective of this config, on the device."""
    options = Options(
        width=cfg.model_dim,
        distance=cfg.jepa_distance,
        normed=None if cfg.jepa_norm == -1 else bool(cfg.jepa_norm),
        predictor=cfg.jepa_predictor,
        preds=getattr(data, "preds", ()),
        front=cfg.jepa_pred_position == "front",
        reverse=cfg.jepa_reverse,
        spans=cfg.jepa_spans,
        max_span_frac=cfg.jepa_max_span_frac,
        in_documents=cfg.jepa_doc,
    )
    objective = make_objective(cfg.jepa_objective, options).to(device)
    has_weights = bool(objective.state_dict())
    if cfg.init_from and has_weights and (Path(cfg.init_from) / OBJECTIVE_FILE).exists():
        load_weights(objective, cfg.init_from, OBJECTIVE_FILE)
    return objective


def build_run(cfg, data, share, began=0.0):
    """The Run of this config, not compiled."""
    model, objective = build_model(cfg, data.vocab_size, share.device), None
    if cfg.jepa_lambda or cfg.diag_every:
        objective = build_objective(cfg, data, share.device)
    optimizers = build_optimizers(model, objective, cfg)
    return Run(cfg, data, share, model, objective, optimizers, began=began)


def needed_graphs(cfg):
    """A JEPA_LAMBDA for each training graph that the run needs; None stands for the plain one."""
    if not cfg.jepa_lambda:
        return [None]
    always = (cfg.jepa_start_frac, cfg.jepa_end_frac, cfg.jepa_ratio) == (0, 1, 1)
    return [cfg.jepa_lambda] if always else [None, cfg.jepa_lambda]


def warm_up(run):
    """Compile what a step and an evaluation run, load the kernels, and put the weights back.

    The optimizers that are used here are thrown away.
    """
    before = run_tensors(run.modules(), [])
    before = {name: tensor.clone() for name, tensor in before.items()}
    trial = replace(run, optimizers=build_optimizers(run.model, run.objective, run.cfg))
    try:
        for weight in needed_graphs(run.cfg):
            training_step(trial, 0, 0.0, weight)
        if run.cfg.diag_every:
            diagnose(trial, 0, training_loss)
        _, batch = next(iter(run.data.val_batches(run.share)))
        with torch.no_grad():
            run.compile(row_losses)(run.model, batch.to(run.share.device))
    finally:
        restore(run.modules(), [], before)
        run.model.zero_grad()


def prepare_graphs(run, log):
    """Warm the run up, compiled if COMPILE asks for it and there is a compiler."""
    began = time.perf_counter()
    if run.cfg.compile:
        compile_run(run)
        name_compile_cache()
        log.line("compiling: about 20 s on two cores, a few seconds if it was done before")
    try:
        warm_up(run)
    except torch._dynamo.exc.BackendCompilerFailed as e:  # a CPU without a C++ compiler
        log.line(f"torch.compile does not work here, going on without, slower: {one_line(e)}")
        torch.compiler.set_stance("force_eager")
        run.is_compiled = False
        warm_up(run)
    seconds = time.perf_counter() - began
    if run.is_compiled:
        log.line(f"step and evaluation compiled and warmed up in {seconds:.0f} s")


def name_compile_cache():
    """Name the compiler's cache where the user has no name, as in some containers."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        cache = Path(tempfile.gettempdir(), "torchinductor")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def train_gpt(cfg, origin, warnings):
    """A whole run: prepare, compile, train, evaluate, quantise, save. Returns result.json."""
    began = time.perf_counter()
    rank, world_size, device = start_process()
    cfg, origin, manifest, tensors = find_run(cfg, origin, ROOT / "logs", warnings, rank)
    cfg.run_id = cfg.run_id or time.strftime(f"%Y%m%d-%H%M%S-seed{cfg.seed}")
    data = open_data(cfg)  # the ranks meet here, before the first one makes the run's folder
    if manifest and manifest["data"] != data.identity():
        raise ValueError(
            f"DATA_PATH={cfg.data_path}: not the data that {cfg.run_id} began with; give it where "
            "that data is now"
        )
    share = divide_batch(cfg, rank, world_size, device, data.least_micro_batches)
    if tensors:  # what was loaded from INIT_FROM is in the checkpoint
        run = build_run(replace(cfg, init_from=""), data, share, began)
        run.cfg = cfg
    else:
        run = build_run(cfg, data, share, began)
    lines = [*warnings, *describe(run)]  # first: it refuses data that fits no micro-batch
    log = RunLog(ROOT / "logs" / cfg.run_id, cfg, origin, rank, project_sources(ROOT), manifest)
    for line in lines:
        log.line(line)
    prepare_graphs(run, log)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    folder, every, seconds = log.folder, cfg.checkpoint_every, cfg.checkpoint_seconds
    with Checkpoints(folder, every, seconds, rank, log) as checkpoints:
        try:
            resumed = (manifest, tensors) if tensors else None
            result = Trainer(run, log, checkpoints, resumed).train()
        except ValueError as e:
            log.note(f"error: {e}")
            raise
        result |= {
            "data_sha256": data.sha256,
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "compiled": run.is_compiled,
            "run_id": cfg.run_id,
            "seed": cfg.seed,
            "config": asdict(cfg),
        }
        finish(run, evaluate, log, checkpoints, result, ROOT)  # a signal now lets it end well
    if world_size > 1:
        dist.destroy_process_group()
    return result


def describe(run):
    """Lines for the log: what a reader wants to know of a run before it begins."""
    cfg, share = run.cfg, run.share
    parameters = sum(p.numel() for p in run.model.parameters())
    size = (
        f"{parameters:,} parameters, {run.model.config.dtype} on {share.world_size} x "
        f"{share.device.type}, {cfg.train_batch_tokens} tokens a step, micro-batches of "
        f"{share.micro_rows} rows of {cfg.train_seq_len}"
    )
    lines = [size, *run.data.report(share, run.objective)]
    if cfg.jepa_lambda:
        term = f"{cfg.jepa_objective}, {cfg.jepa_distance}, weight {cfg.jepa_lambda:g}"
        lines.append(f"the term (docs/objectives.md): {term}")
    return lines


def show_data(cfg):
    """Print what is trained and compared in the first rows or examples, and the counts."""
    rank, world_size, device = start_process()
    data = open_data(cfg)
    share = divide_batch(cfg, rank, world_size, device, data.least_micro_batches)
    objective = build_objective(cfg, data, "cpu") if cfg.jepa_lambda else None
    if rank == 0:
        for warning in data.warnings:
            print(warning, file=sys.stderr)
        show(data.first_examples(cfg.show, share, objective), data.spelling(), print)
        print(json.dumps(data.counts()))


@one_line_errors()
@record
def main():
    try:
        loaded = load_settings(Config, sys.argv[1:], os.environ, description=__doc__)
        if loaded.config.show:
            show_data(loaded.config)
        else:
            train_gpt(*loaded)
    except (ValueError, OSError):
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)  # all ranks fail here: let rank 0 say it, whose exit ends the others
        raise
    except RuntimeError:
        if dist.is_initialized():
            time.sleep(5)  # another rank may have died: torchrun must see that first
        raise


if __name__ == "__main__":
    main()
