"""Pretrain a GPT with next-token cross entropy and one JEPA term: `JEPA_LAMBDA=0.1 torchrun --standalone train_gpt.py`.

One process on a CPU or a GPU, or torchrun on many. Read from top to bottom: config, data, optimizer, the training
step, evaluation, artifact, logs, the loop. The term itself is in jepa.py, the network in model.py.
Shapes: B rows, T tokens, D width, S spans a row, V vocabulary; G rows of the global batch (all ranks, all micro-batches).
"""
import bisect
import dataclasses
import itertools
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml

import jepa
from config import check_ranges, knob, load_config
from data.shards import META_KEYS, check_shard, read_shard, token_table
from model import GPT, GPTConfig, Linear
from weights import dequantize, load_weights, quantize, to_safetensors

ROOT = Path(__file__).resolve().parent
EMBEDDED_DATA = "data/stdlib"
SOURCES = ("train_gpt.py", "model.py", "jepa.py", "config.py", "weights.py", "data/shards.py")  # logged, and counted in the artifact

# ----------------------------------------------------------------------------------------------------------- config


@dataclass
class Config:
    """Every setting: default, what it does, range. config.py says where else a value may come from."""
    # data
    data_path: str = knob(EMBEDDED_DATA, "folder with *_train_*.bin and *_val_*.bin; the default is prepared where it is missing")
    tokenizer: str = knob("", "for shards without meta.json: a tiktoken name or a file of ranks, which gives the bytes per token")
    doc_token: int = knob(50256, "for shards without meta.json: the token id that begins a document")
    vocab_size: int = knob(0, "rows of the embedding; 0: the tokenizer's size. A multiple of 64 is faster on a GPU", 0)
    val_tokens: int = knob(0, "tokens of the val split that are evaluated, off the clock; 0: all", 0)
    # length of the run
    iterations: int = knob(10_000, "steps at most", 1)
    max_wallclock_seconds: float = knob(150.0, "training time at most, s, without compilation and validation; 0: no cap", 0)
    target_val_loss: float = knob(0.0, "stop at the first validation at or below this, nats per token; 0: never", 0)
    train_batch_tokens: int = knob(4096, "tokens per step over all ranks and micro-batches", 1)
    train_seq_len: int = knob(256, "tokens per row; attention costs its square", 1)
    grad_accum_steps: int = knob(0, "micro-batches per step and rank, less memory and the same step; 0: as few as keep one at 65,536 tokens", 0)
    # model
    num_layers: int = knob(6, "blocks; time, memory and parameters grow with it")
    model_dim: int = knob(256, "width of the residual stream; the matrices grow with its square")
    num_heads: int = knob(4, "query heads; model_dim / num_heads must be even")
    num_kv_heads: int = knob(4, "key/value heads, shared by num_heads / num_kv_heads query heads each")
    mlp_mult: int = knob(4, "width of the MLP over model_dim; at 4 it is two thirds of a block's parameters")
    tie_embeddings: bool = knob(False, "1: the output head is the embedding; saves vocab_size x model_dim parameters")
    value_embed: bool = knob(True, "1: the values of every block add a second embedding of the token; vocab_size x key/value width parameters, up to 7% of a step")
    # optimizer
    matrix_lr: float = knob(0.04, "Muon learning rate of the blocks' matrices", 0)
    embed_lr: float = knob(0.6, "Adam learning rate of the embeddings", 0)
    head_lr: float = knob(0.008, "Adam learning rate of the output head", 0)
    tied_embed_lr: float = knob(0.05, "Adam learning rate of the embedding where it is tied to the head", 0)
    scalar_lr: float = knob(0.04, "Adam learning rate of gains and mixing weights", 0)
    muon_momentum: float = knob(0.95, "momentum of Muon (Nesterov)", 0, 1)
    warmdown_frac: float = knob(0.5, "the last fraction of the run, over which learning rates fall to zero", 0, 1)
    # JEPA
    jepa_lambda: float = knob(0.0, "weight of the JEPA term; 0: off, and the step is the baseline's, graph, numbers and time", 0)
    jepa_max_span_frac: float = knob(0.5, "longest span over the length of its document fragment (or row)", 0, 1)
    jepa_start_frac: float = knob(0.0, "fraction of the run after which the term starts; costs a second training graph", 0, 1)
    jepa_end_frac: float = knob(1.0, "fraction of the run after which it goes off again; below 1 costs a second training graph", 0, 1)
    jepa_warmup_frac: float = knob(0.0, "fraction of the run over which lambda ramps up after the start; costs nothing", 0, 1)
    jepa_layer: int = knob(-1, "states compared: -1 the stream into the final norm, k the stream after block k; costs nothing")
    jepa_distance: str = knob("cosine", "cosine, l2, mse or infonce")
    jepa_spans: int = knob(1, "spans per row; each costs four gathered states", 1)
    jepa_doc: bool = knob(True, "1: a span stays inside one document fragment; 0: anywhere in the row")
    # evaluation and logs
    val_loss_every: int = knob(0, "steps between validations, off the clock; 0: only at the end", 0)
    eval_stride: int = knob(0, "0: rows side by side; n: windows that advance by n tokens, train_seq_len / n times the cost", 0)
    train_log_every: int = knob(20, "steps between train_loss lines; costs nothing", 1)
    run_id: str = knob("", "name of the folder in logs/; default: date, time and seed")
    wandb: bool = knob(False, "1: log to Weights & Biases too (WANDB_MODE=offline needs no login)")
    # machine
    seed: int = knob(1337, "of weights, data order and spans", 0, 2**31)
    init_from: str = knob("", "logs/<run>: start from the weights of that run")
    dtype: str = knob("auto", "bfloat16 or float32; auto: bfloat16 where the hardware multiplies it")
    compile: bool = knob(True, "0: no torch.compile; slower, starts at once")

    def __post_init__(self):
        """Raise ValueError naming the knob, where a value makes no sense by itself."""
        check_ranges(self)
        for name, wrong, rule in (
                ("jepa_max_span_frac", self.jepa_max_span_frac == 0, "must be above 0"),
                ("jepa_distance", self.jepa_distance not in jepa.DISTANCES, f"must be one of {', '.join(jepa.DISTANCES)}"),
                ("jepa_layer", not -1 <= self.jepa_layer < self.num_layers, f"must be -1, or a block from 0 to {self.num_layers - 1}"),
                ("jepa_start_frac", self.jepa_lambda and self.jepa_start_frac >= min(1, self.jepa_end_frac),
                 f"with JEPA_LAMBDA above 0 it must be below JEPA_END_FRAC={self.jepa_end_frac}, or the term never runs"),
                ("train_seq_len", self.jepa_lambda and self.train_seq_len < 3, "a span needs rows of at least 3 tokens"),
                ("eval_stride", self.eval_stride > self.train_seq_len, f"must not exceed TRAIN_SEQ_LEN={self.train_seq_len}"),
                ("dtype", self.dtype not in ("auto", "bfloat16", "float32"), "must be auto, bfloat16 or float32"),
                ("run_id", not re.fullmatch(r"[\w.-]*", self.run_id), "may hold letters, digits, '_', '.' and '-' only")):
            if wrong:
                raise ValueError(f"{name.upper()}={getattr(self, name)}: {rule}")


# ------------------------------------------------------------------------------------------------------------- data


class TokenData:
    """The shards of DATA_PATH: training rows in a seeded order, the val split, and what is known of the tokens.

    This process checks one of `parts` parts of the shards, those of one node share them. The batch of a step is a function of seed and step
    alone, so the loader has no state. An epoch is a permutation of all rows; the tail of a shard that fills no row is
    left out.
    """

    def __init__(self, cfg, folder=None, part=0, parts=1):
        self.cfg, self.folder = cfg, Path(folder or cfg.data_path)
        if not self.folder.is_dir():
            raise ValueError(f"DATA_PATH={cfg.data_path}: no such folder; make one with a script in data/ (README, Data)")
        meta_file = self.folder / "meta.json"
        try:
            self.meta = json.loads(meta_file.read_text()) if meta_file.exists() else None
        except ValueError as e:
            raise ValueError(f"{meta_file}: not valid JSON ({e}); make the data again") from None
        if self.meta is not None and not (isinstance(self.meta, dict) and META_KEYS <= self.meta.keys()):
            raise ValueError(f"{meta_file}: not a meta.json of data/ (it has {', '.join(sorted(META_KEYS))}); remove it, or make the data again")
        files = {split: sorted(self.folder.glob(f"*_{split}_*.bin")) for split in ("train", "val")}
        for split, found in files.items():
            if not found:
                raise ValueError(f"DATA_PATH={cfg.data_path}: no *_{split}_*.bin in it; make shards with a script in data/ (README, Data)")
        if both := set(files["train"]) & set(files["val"]):
            raise ValueError(f"{min(both)}: both *_train_* and *_val_* fit its name; rename it")
        shards = self.meta["shards"] if self.meta else {}
        if self.meta and (odd := {f.name for found in files.values() for f in found} ^ set(shards)):
            raise ValueError(f"{meta_file} and the shards beside it disagree on {', '.join(sorted(odd))}; make the data again")
        self.train, self.val = ([read_shard(f) for f in files[split]] for split in ("train", "val"))

        mine = [(f, tokens) for split in files for f, tokens in zip(files[split], getattr(self, split))][part::parts]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            largest = list(pool.map(lambda m: check_shard(*m, shards.get(m[0].name, {}).get("sha256")), mine))
        self.load_vocabulary(max(largest, default=0))
        for (file, _), token in zip(mine, largest):
            if token >= self.known_size:
                raise ValueError(f"{file}: token {token} is outside the vocabulary of {self.known_size}; set VOCAB_SIZE or the right TOKENIZER")
        T = cfg.train_seq_len
        self.val_size = min(cfg.val_tokens or math.inf, sum(map(len, self.val)))
        if self.val_size < T + 1:
            raise ValueError(f"the val split of {cfg.data_path} has {self.val_size} tokens (VAL_TOKENS={cfg.val_tokens}), fewer than a row of "
                             f"TRAIN_SEQ_LEN={T} and its last target; lower TRAIN_SEQ_LEN or make a larger split")
        self.first_row = np.cumsum([0] + [(len(tokens) - 1) // T for tokens in self.train])  # of each shard; last: all rows
        if not self.first_row[-1]:
            raise ValueError(f"no train shard of {cfg.data_path} holds a row of TRAIN_SEQ_LEN={T} tokens; lower it")
        self.order = (None, None)  # (epoch, its permutation of rows)

    def load_vocabulary(self, largest):
        """Vocabulary size, document marker, bytes per token and the tokens' bytes, from meta.json or TOKENIZER; with
        neither, the size follows from the largest token, and no_bpb says why there is no val_bpb."""
        tokenizer = self.folder / self.meta["tokenizer"]["file"] if self.meta else self.cfg.tokenizer
        self.token_table = token_table(str(tokenizer)) if tokenizer else None
        self.bytes_per_token = np.array([len(token) for token in self.token_table], dtype=np.int64) if tokenizer else None
        self.doc_token = self.meta["doc_token"] if self.meta else self.cfg.doc_token
        self.no_bpb = None if tokenizer else f"{self.folder} has no meta.json and TOKENIZER is not set, so the bytes per token are unknown"
        if self.meta:
            self.bytes_per_token = np.array(self.meta["bytes_per_token"], dtype=np.int64)
        if dist.is_initialized():  # each rank has seen its part of the shards
            shared = torch.tensor(largest)
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            largest = shared.item()
        known = len(self.bytes_per_token) if tokenizer else self.cfg.vocab_size or -(-(largest + 1) // 64) * 64
        self.vocab_size = self.cfg.vocab_size or known
        self.known_size = min(known, self.vocab_size)  # ids from here on never occur

    def batch(self, step, rows, first_row, count):
        """Rows first_row.. of the `rows` rows of this step's global batch: idx and targets, int64 CPU tensors (count, T)."""
        T, total = self.cfg.train_seq_len, int(self.first_row[-1])
        out = np.empty((count, T + 1), dtype=np.int64)
        for i in range(count):
            epoch, n = divmod(step * rows + first_row + i, total)
            if self.order[0] != epoch:
                self.order = epoch, np.random.default_rng([self.cfg.seed, epoch]).permutation(total)
            row = int(self.order[1][n])
            shard = bisect.bisect_right(self.first_row, row) - 1
            start = (row - int(self.first_row[shard])) * T
            out[i] = self.train[shard][start:start + T + 1]
        out = torch.from_numpy(out)
        return out[:, :-1].contiguous(), out[:, 1:].contiguous()

    def val_windows(self):
        """Yield idx, targets (T,) that score every token of the val split but each shard's first exactly once.

        Rows lie side by side, or advance by EVAL_STRIDE tokens, so that a target sees at least T - EVAL_STRIDE tokens
        where there are so many. Targets are -1 where the window before has scored them, and behind the end.
        """
        T, left = self.cfg.train_seq_len, self.val_size
        for tokens in self.val:
            tokens = tokens[:left]
            left -= len(tokens)
            for done in range(0, len(tokens) - 1, self.cfg.eval_stride or T):
                end = min(done + (self.cfg.eval_stride or T), len(tokens) - 1)
                start = max(0, end - T)
                idx, targets = np.zeros(T, dtype=np.int64), np.full(T, -1, dtype=np.int64)
                idx[:end - start] = tokens[start:end]
                targets[done - start:end - start] = tokens[done + 1:end + 1]
                yield idx, targets


def open_data(cfg):
    """The TokenData of a run; prepares the embedded corpus where DATA_PATH is the default and missing, once a node."""
    folder = ROOT / EMBEDDED_DATA if cfg.data_path == EMBEDDED_DATA else Path(cfg.data_path)
    rank, local_rank, local_world_size = (int(os.environ.get(name, default)) for name, default in
                                          (("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    for first in (rank == 0, local_rank == 0):  # the nodes may share a disk: then the first rank has done it for all
        if cfg.data_path == EMBEDDED_DATA and first and not folder.exists():
            from data import stdlib
            print("no data on disk: preparing the embedded corpus, the Python standard library", flush=True)
            stdlib.main(folder)
        if dist.is_initialized():
            dist.barrier()
    return TokenData(cfg, folder, local_rank, local_world_size)


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
    shared between the ranks; every rank keeps all momentum. Also sums the gradients of its parameters over the ranks."""

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
                grad = torch.stack([p.grad for p in params])
                if world_size > 1:
                    dist.all_reduce(grad)
                state = self.state[params[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(grad)
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
                scale = max(1.0, params[0].size(0) / params[0].size(1)) ** 0.5  # root mean square 1 / sqrt(fan-in) at every shape
                torch._foreach_add_(params, list(update[:len(params)].float().unbind()), alpha=-group["lr"] * scale)


def build_optimizers(model, cfg):
    """[Muon for the blocks' matrices, Adam for the rest]; every parameter of the model is in exactly one group."""
    matrices = [m.weight for m in model.blocks.modules() if isinstance(m, Linear)]
    embeds, heads, values = ([] if m is None else [m.weight] for m in (model.embed, model.head, model.value_embed))
    taken = set(map(id, matrices + embeds + heads + values))
    scalars = [p for p in model.parameters() if id(p) not in taken]
    # Rare tokens have tiny gradients, hence an eps of 1e-10 (modded-nanogpt). Where the gradient of a gain is zero but for
    # rounding (a cosine doesn't change with the length of the states), that eps would turn the noise into full steps.
    groups = [dict(params=params, lr=lr, initial_lr=lr, eps=eps) for params, lr, eps in (
        (embeds, cfg.embed_lr if heads else cfg.tied_embed_lr, 1e-10), (values, cfg.embed_lr, 1e-10), (heads, cfg.head_lr, 1e-10),
        (scalars, cfg.scalar_lr, 1e-6)) if params]
    adam = torch.optim.Adam(groups, betas=(0.8, 0.95), fused=True)
    return [Muon(matrices, cfg.matrix_lr, cfg.muon_momentum, model.config.dtype), adam]


# ---------------------------------------------------------------------------------------------------- training step


@dataclass
class Layout:
    """Who does what: this rank holds local_rows of the global batch's rows, from first_row on, micro_rows at a time."""
    rank: int
    world_size: int
    device: torch.device
    rows: int
    local_rows: int
    first_row: int
    micro_rows: int


def divide_batch(cfg, rank, world_size, device):
    """The Layout of a run; ValueError where TRAIN_BATCH_TOKENS doesn't come out even."""
    T, rows = cfg.train_seq_len, cfg.train_batch_tokens // cfg.train_seq_len
    fits = (n for n in range(1, rows + 1) if rows % (n * world_size) == 0 and rows * T <= 65_536 * n * world_size)
    accum = cfg.grad_accum_steps or next(fits, 1)
    if cfg.train_batch_tokens % (world_size * accum * T):
        raise ValueError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} must be a multiple of ranks x GRAD_ACCUM_STEPS x TRAIN_SEQ_LEN = "
                         f"{world_size} x {accum} x {T}")
    local = rows // world_size
    return Layout(rank, world_size, device, rows, local, rank * local, local // accum)


def training_loss(model, idx, targets, num_targets, jepa_layer=-1, jepa_distance=None, spans=None, jepa_lambda=None):
    """CE + lambda * JEPA of one micro-batch: what is compiled, one graph without the term and one with it.

    num_targets: targets of the global batch, so that micro-batches and ranks add up to its mean. spans: (a, b, start,
    end, weight), weight being 1 / spans of the global batch, or 0; None: no term, and not a trace of it in the graph.
    jepa_lambda: 0-dim tensor. Returns (CE,), or (CE + lambda * JEPA, CE, JEPA), the last two detached.
    """
    x, h = model._run_blocks(idx, jepa_layer)
    ce = model.cross_entropy(x, targets) / num_targets
    if spans is None:
        return (ce,)
    a, b, start, end, weight = spans
    term = jepa.distance(*jepa.span_views(h, a, b, start, end), jepa_distance, weight, jepa.noise_floor(h, b))
    return ce + jepa_lambda * term, ce.detach(), term.detach()


def draw_spans(cfg, data, layout, step, idx):
    """Spans of this rank's rows idx: a, b, start, end and weight, each (local rows, S), as training_loss wants them.

    Their generator is seeded by seed and step alone, so a run that starts the term late draws the same.
    """
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    *positions, weight = jepa.sample_spans(
        idx, generator, spans=cfg.jepa_spans, max_span_frac=cfg.jepa_max_span_frac,
        doc_token=data.doc_token if cfg.jepa_doc else None, total_rows=layout.rows, first_row=layout.first_row)
    count = weight.sum()
    if layout.world_size > 1:
        dist.all_reduce(count)  # a CPU tensor: over gloo, so the GPU is not waited for
    return *positions, weight / count.clamp(min=1)


def accumulate_gradients(model, loss_fn, cfg, data, layout, step, jepa_lambda):
    """Forward and backward of this rank's share of a step; gradients are left in .grad, to be summed over the ranks.

    loss_fn: training_loss, compiled or not. jepa_lambda: float, or None for no term. Returns the global mean losses,
    a tensor (CE,) or (CE, JEPA) on the device.
    """
    batch = data.batch(step, layout.rows, layout.first_row, layout.local_rows)
    weight = None
    if jepa_lambda is not None:
        batch += draw_spans(cfg, data, layout, step, batch[0])
        weight = torch.full((), jepa_lambda, device=layout.device)  # a fill: a copy from the host would wait for the GPU
    if layout.device.type == "cuda":
        batch = [t.pin_memory().to(layout.device, non_blocking=True) for t in batch]
    losses = 0
    for idx, targets, *spans in zip(*(t.split(layout.micro_rows) for t in batch)):
        loss, *terms = loss_fn(model, idx, targets, layout.rows * cfg.train_seq_len, cfg.jepa_layer, cfg.jepa_distance,
                               tuple(spans) or None, weight)
        loss.backward()
        losses += torch.stack(terms or [loss.detach()])
    if layout.world_size > 1:
        dist.all_reduce(losses)
    return losses


def apply_gradients(optimizers, progress, cfg):
    """One optimizer step with the learning rates of this moment of the run; clears the gradients."""
    muon, adam = optimizers
    if dist.is_initialized():
        for group in adam.param_groups:
            for p in group["params"]:
                dist.all_reduce(p.grad)
    warmdown = min(1.0, (1 - progress) / cfg.warmdown_frac) if cfg.warmdown_frac else 1.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * warmdown
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------------- evaluation


def row_losses(model, idx, targets):
    """Cross entropy in nats summed over each row's targets: (B,)."""
    x, _ = model._run_blocks(idx, -1)
    return model.cross_entropy(x, targets, reduction="none").view(idx.shape).sum(1)


@torch.no_grad()
def evaluate(model, eval_fn, data, layout, log):
    """(val_loss in nats per token, val_bpb in bits per UTF-8 byte of text or None) over the val split, the same at any rank count."""
    total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes of text
    windows = itertools.islice(data.val_windows(), layout.rank, None, layout.world_size)
    count = data.val_size / (data.cfg.eval_stride or data.cfg.train_seq_len)
    began = said = time.perf_counter()
    for n in itertools.count(1):
        batch = list(itertools.islice(windows, layout.micro_rows))
        if not batch:
            break
        idx, targets = (torch.from_numpy(np.stack(t)) for t in zip(*batch))
        missing = layout.micro_rows - len(batch)  # one shape, one graph
        idx, targets = torch.nn.functional.pad(idx, (0, 0, 0, missing)), torch.nn.functional.pad(targets, (0, 0, 0, missing), value=-1)
        nats = eval_fn(model, idx.to(layout.device), targets.to(layout.device)).double().sum()
        scored = targets[targets >= 0].numpy()
        total += torch.tensor([nats.item(), len(scored), data.bytes_per_token[scored].sum() if data.bytes_per_token is not None else 0],
                              dtype=torch.float64)
        if time.perf_counter() - said > 20:
            said, part = time.perf_counter(), n * layout.micro_rows * layout.world_size / count
            log.line(f"evaluating: {part:.0%}, {(said - began) * (1 / part - 1):.0f} s left")
    if layout.world_size > 1:
        dist.all_reduce(total)
    nats, tokens, text_bytes = total.tolist()
    return nats / tokens, nats / math.log(2) / text_bytes if text_bytes else None


# ------------------------------------------------------------------------------------------------------------- logs


class RunLog:
    """Console, logs/<run_id>/log.txt and metrics.jsonl, and wandb where asked for; silent on all ranks but the first."""

    def __init__(self, cfg, origin, rank):
        self.folder, self.iterations, self.rank, self.wandb = ROOT / "logs" / cfg.run_id, cfg.iterations, rank, None
        if rank:
            return
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            raise ValueError(f"RUN_ID={cfg.run_id}: {self.folder} exists and is never overwritten; choose another RUN_ID") from None
        settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name != "run_id"}  # to be used again
        (self.folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        with open(self.folder / "log.txt", "w", encoding="utf-8") as f:
            for name in SOURCES:
                f.write(f"{'=' * 40} {name}\n{(ROOT / name).read_text(encoding='utf-8')}\n")
            f.write(f"{'=' * 40} environment\n{describe_machine()}\n{'=' * 40} run\n")
        for name, value in dataclasses.asdict(cfg).items():
            self.line(f"config {name}: {value!r} ({origin[name]})")
        if cfg.wandb:
            import wandb
            self.wandb = wandb.init(project="nanojepa", name=cfg.run_id, config=dataclasses.asdict(cfg), dir=str(self.folder))

    def note(self, text):
        """Append a line to log.txt."""
        if self.rank == 0:
            with open(self.folder / "log.txt", "a", encoding="utf-8") as f:
                f.write(text + "\n")

    def line(self, text):
        """Print a line and append it to log.txt."""
        if self.rank == 0:
            print(text, flush=True)
            self.note(text)

    def metrics(self, step, train_time, values):
        """Write a log line `step:.. name:value .. train_time:..ms step_avg:..ms`, a line of metrics.jsonl, and to wandb."""
        if self.rank:
            return
        ms = 1000 * train_time
        shown = " ".join(f"{k}:{v:.4f}" for k, v in values.items() if v is not None)
        self.line(f"step:{step}/{self.iterations} {shown} train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms")
        row = {"step": step, **values, "train_time": train_time}
        with open(self.folder / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(row, step=step)


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
    """Training time in s: runs between start and stop, which wait for the device; nothing else is counted."""

    def __init__(self, device):
        self.synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.passed, self.since = 0.0, None

    def start(self):
        self.synchronize()
        self.since = time.perf_counter()

    def stop(self):
        self.synchronize()
        self.passed, self.since = self.now(), None

    def now(self):
        return self.passed + (time.perf_counter() - self.since if self.since is not None else 0.0)


def run_progress(cfg, step, clock, layout):
    """Fraction of the run that is done, as rank 0 sees it: the larger of steps and seconds. 1 or more: stop."""
    progress = step / cfg.iterations
    if cfg.max_wallclock_seconds:
        progress = max(progress, clock.now() / cfg.max_wallclock_seconds)
    if layout.world_size > 1:
        shared = torch.tensor(progress, dtype=torch.float64)
        dist.broadcast(shared, 0)  # a CPU tensor: over gloo, so the GPU is not waited for
        progress = shared.item()
    return progress


def jepa_schedule(cfg, progress):
    return jepa.jepa_weight(progress, cfg.jepa_lambda, cfg.jepa_start_frac, cfg.jepa_end_frac, cfg.jepa_warmup_frac)


def needed_graphs(cfg):
    """The training graphs a run will need, as values of jepa_lambda: None for plain, and lambda with the term; in one order on all ranks."""
    on = {jepa_schedule(cfg, p) is not None for p in (0.0, cfg.jepa_start_frac, cfg.jepa_end_frac) if p < 1}
    return [cfg.jepa_lambda if term else None for term in sorted(on)]


def warm_up(model, loss_fn, cfg, data, layout):
    """Compile every graph of the training step and load the kernels, then put the weights back. The loader and the span
    generator have no state; the optimizers used here are thrown away."""
    before = {name: w.clone() for name, w in model.state_dict().items()}
    try:
        for weight in needed_graphs(cfg):
            accumulate_gradients(model, loss_fn, cfg, data, layout, 0, weight)
            apply_gradients(build_optimizers(model, cfg), 0.0, cfg)
    finally:
        model.load_state_dict(before)
        model.zero_grad()


def train(model, loss_fn, eval_fn, cfg, data, layout, log):
    """Train to the end of the run and return its results: steps, train_seconds, val_loss, val_bpb and, with
    TARGET_VAL_LOSS, time_to_target. ValueError where the loss is no longer finite."""
    optimizers = build_optimizers(model, cfg)
    clock, step, pending, reported, result = Clock(layout.device), 0, None, 0, {"time_to_target": None}
    if layout.world_size > 1:
        dist.barrier()  # all have compiled: the clock is nobody's waiting
    clock.start()

    def settle(pending):
        """Log the losses of the step before: reading them one step late keeps the device busy."""
        number, losses, copied, train_time = pending
        if copied is not None:
            copied.synchronize()
        losses = losses.tolist()
        if not all(map(math.isfinite, losses)):
            raise ValueError(f"non-finite loss at step {number} ({losses}): lower the learning rates or JEPA_LAMBDA; the log is in {log.folder}")
        if number <= 5 or number % cfg.train_log_every == 0:
            log.metrics(number, train_time, dict(zip(("train_loss", "jepa_loss"), losses)))

    while True:
        progress = run_progress(cfg, step, clock, layout)
        done = progress >= 1
        if done or (cfg.val_loss_every and step and step % cfg.val_loss_every == 0):
            if pending:
                settle(pending)
                pending = None
            clock.stop()
            val_loss, val_bpb = evaluate(model, eval_fn, data, layout, log)
            log.metrics(step, clock.passed, {"val_loss": val_loss, "val_bpb": val_bpb})
            if not math.isfinite(val_loss):
                raise ValueError(f"non-finite val_loss at step {step}: lower the learning rates or JEPA_LAMBDA; the log is in {log.folder}")
            if val_loss <= cfg.target_val_loss:
                log.line(f"target_val_loss:{cfg.target_val_loss} reached at step {step} after train_time:{1000 * clock.passed:.0f}ms")
                result["time_to_target"], done = clock.passed, True
            if done:
                return result | {"steps": step, "train_seconds": clock.passed, "val_loss": val_loss, "val_bpb": val_bpb}
            clock.start()
        losses, copied = accumulate_gradients(model, loss_fn, cfg, data, layout, step, jepa_schedule(cfg, progress)), None
        if layout.device.type == "cuda":
            losses = torch.empty(losses.shape, pin_memory=True).copy_(losses, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        apply_gradients(optimizers, progress, cfg)
        step += 1
        if pending:
            settle(pending)
        pending = step, losses, copied, clock.now()
        if int(10 * progress) > reported:
            reported = int(10 * progress)
            log.line(f"progress: {progress:.0%}, {clock.now() / progress * (1 - progress):.0f} s of training left")


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
                          cfg.tie_embeddings, cfg.value_embed, dtype=choose_dtype(cfg.dtype, device))).to(device)
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


def run(cfg, origin, warnings):
    """The main job: prepare, compile, train, evaluate, quantise, save. Returns the content of result.json."""
    began = time.perf_counter()
    rank, world_size, device = start_process()
    cfg.run_id = cfg.run_id or time.strftime(f"%Y%m%d-%H%M%S-seed{cfg.seed}")
    layout = divide_batch(cfg, rank, world_size, device)
    data = open_data(cfg)
    model = build_model(cfg, data.vocab_size, device)
    log = RunLog(cfg, origin, rank)
    parameters = sum(p.numel() for p in model.parameters())
    if data.no_bpb:
        warnings.append(f"no val_bpb: {data.no_bpb}")
    if data.meta and cfg.tokenizer:
        warnings.append(f"TOKENIZER={cfg.tokenizer} is not used: {data.folder} has a meta.json")
    if cfg.jepa_lambda and cfg.jepa_distance == "infonce":
        warnings.append(f"infonce takes its negatives from micro-batches of {layout.micro_rows} rows; another division of the batch is another loss")
    for text in [*warnings, f"{parameters:,} parameters, {model.config.dtype} on {world_size} x {device.type}, {layout.rows} rows of {cfg.train_seq_len} "
                 f"tokens a step in micro-batches of {layout.micro_rows}, {sum(map(len, data.train)):,} train tokens"]:
        log.line(text)

    loss_fn, eval_fn, compiled, compiling = training_loss, row_losses, cfg.compile, time.perf_counter()
    if compiled:
        try:
            loss_fn, eval_fn = (torch.compile(f, fullgraph=True, dynamic=False) for f in (loss_fn, eval_fn))
            warm_up(model, loss_fn, cfg, data, layout)
        except torch._dynamo.exc.BackendCompilerFailed as e:  # a CPU without a C++ compiler
            log.line(f"torch.compile does not work here, going on without, slower: {' '.join(str(e).split())[:200]}")
            loss_fn, eval_fn, compiled = training_loss, row_losses, False
    if not compiled:
        warm_up(model, loss_fn, cfg, data, layout)
    log.line(f"{len(needed_graphs(cfg))} training graph(s) warmed up in {time.perf_counter() - compiling:.0f} s")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    try:
        result = train(model, loss_fn, eval_fn, cfg, data, layout, log)
    except ValueError as e:
        log.note(f"error: {e}")
        raise
    state = {name: w.detach().cpu() for name, w in model.state_dict().items()}
    artifact = quantize(state)
    if rank == 0:
        (log.folder / "model.safetensors").write_bytes(to_safetensors(state))
        (log.folder / "model.int8.zlib").write_bytes(artifact)
        artifact = (log.folder / "model.int8.zlib").read_bytes()
    model.load_state_dict(dequantize(artifact))
    quantized_val_loss, quantized_val_bpb = evaluate(model, eval_fn, data, layout, log)
    code_bytes = sum(len((ROOT / name).read_bytes()) for name in SOURCES)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result |= {"quantized_val_loss": quantized_val_loss, "quantized_val_bpb": quantized_val_bpb,
               "artifact_bytes": len(artifact) + code_bytes, "fits_16mb": len(artifact) + code_bytes <= 16_000_000,
               "tokens": result["steps"] * cfg.train_batch_tokens, "parameters": parameters, "peak_memory_bytes": peak, "compiled": compiled,
               "total_seconds": time.perf_counter() - began, "run_id": cfg.run_id, "seed": cfg.seed, "config": dataclasses.asdict(cfg)}
    if rank == 0:
        (log.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        model.load_state_dict(state)
        log.line(f"{'-' * 40} text sample\n{sample_text(model, data, cfg)}\n{'-' * 40}")
        log.line(f"artifact: {len(artifact):,} bytes of weights + {code_bytes:,} of source = {result['artifact_bytes']:,} "
                 f"({'within' if result['fits_16mb'] else 'over'} 16,000,000)")
        shown = {k: result[k] for k in ("val_loss", "val_bpb", "quantized_val_bpb") if result[k] is not None}
        log.line(f"result: {' '.join(f'{k}:{v:.4f}' for k, v in shown.items())} artifact_bytes:{result['artifact_bytes']} steps:{result['steps']} "
                 f"train_time:{1000 * result['train_seconds']:.0f}ms -> logs/{cfg.run_id}/result.json")
    if world_size > 1:
        dist.destroy_process_group()
    return result


def main():
    try:
        run(*load_config(Config, sys.argv[1:], os.environ, __doc__))
    except (ValueError, OSError, SystemExit) as e:
        if isinstance(e, SystemExit) and not isinstance(e.code, str):
            raise  # --help
        message = f"error: {str(e).removeprefix('error: ')}"
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)  # what all ranks find wrong is said once, by the first, whose exit ends the others
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun repeats what it finds there as the cause
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}))
        raise SystemExit(message) from None


if __name__ == "__main__":
    main()
