"""What a training step is fed: rows of text (TokenData), or packed pairs and groups (PairData).

Which tokens and examples make up step n is a function of SEED and n alone: not of the term, the
ranks or the micro-batches. So the loaders have no state, and an arm's twin sees the same data.

Shapes: R rows of a micro-batch, T tokens, N pairs of places.
"""

import bisect
import functools
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanojepa.corpora import prepare_default
from nanojepa.objectives import OBJECTIVES, StepRandom
from nanojepa.objectives.schedule import keeps_term
from nanojepa.objectives.step import find_steps
from nanojepa.packing import (
    Batch,
    Document,
    Example,
    Item,
    Texts,
    View,
    fill_rows,
    place_examples,
)
from nanojepa.settings import Range
from nanojepa.shards import check_shard, held_by_meta, hold_shard, read_meta, read_shard
from nanojepa.tokenizer import saved_encoding, token_table, tokenizer_file

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED_DATA = ("data/stdlib", "data/nlregex", "data/nlregex_groups")  # prepared if missing
VAL_WINDOW = 512  # examples that are packed together in evaluation
MAX_PRED_TOKENS = 10  # as many as the vocabulary of pairs data has
PredTokens = Annotated[int, Range(0, MAX_PRED_TOKENS)]


# ---- who does what


@dataclass
class Share:
    """What this rank does of a step.

    It holds local_rows of the global batch's rows, from first_row on, micro_rows at a time. Of
    pairs data only micro_rows counts: examples fill as many micro-batches as they need, and the
    ranks take them in turn.
    """

    rank: int
    world_size: int
    device: torch.device
    rows: int
    local_rows: int
    first_row: int
    micro_rows: int


def divide_batch(cfg, rank, world_size, device, least=1):
    """The Share of this rank; ValueError if TRAIN_BATCH_TOKENS doesn't come out even.

    least: micro-batches of a step and rank, if GRAD_ACCUM_STEPS=0 leaves their number open.
    """
    T, rows = cfg.train_seq_len, cfg.train_batch_tokens // cfg.train_seq_len
    fits = [
        n
        for n in range(1, rows + 1)
        if rows % (n * world_size) == 0 and rows * T <= 65_536 * n * world_size
    ]
    enough = [n for n in fits if n >= least]
    accum = cfg.grad_accum_steps or min(enough, default=max(fits, default=1))
    if cfg.train_batch_tokens % (world_size * accum * T):
        raise ValueError(
            f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} must be a multiple of ranks x "
            f"GRAD_ACCUM_STEPS x TRAIN_SEQ_LEN = {world_size} x {accum} x {T}"
        )
    local = rows // world_size
    return Share(rank, world_size, device, rows, local, rank * local, local // accum)


class StepData(NamedTuple):
    """This rank's micro-batches of a step, and what the step costs over all ranks."""

    batches: list
    tokens: int
    visible_pairs: int  # (query, key) pairs of attention


def draw_step(objective, batches, seed, step):
    """Let the objective draw for every micro-batch of a step, in batch.drawn.

    The weights are divided by their sum over the step, all ranks and micro-batches, so that the
    term is a mean over all of its comparisons.
    """
    for batch in batches:
        rng = StepRandom(seed, step, batch.items, batch.total_items)
        batch.drawn = objective.draw(batch, rng)
    count = torch.stack([batch.drawn["weight"].sum() for batch in batches]).sum()
    if dist.is_initialized():
        dist.all_reduce(count)  # a CPU tensor: it goes over gloo, so the GPU is not waited for
    for batch in batches:
        batch.drawn["weight"] = batch.drawn["weight"] / count.clamp(min=1)


# ---- the shards of a folder


class Shards:
    """The checked shards of a folder, and what is known of their tokens.

    This process checks one of `parts` parts of the shards; the processes of a node share them.
    """

    def __init__(self, cfg, folder=None, part=0, parts=1):
        self.cfg, self.folder = cfg, Path(folder or cfg.data_path)
        self.meta, self.warnings = meta_of(self.folder), []
        files = self.find_files()
        self.train, self.val = ([read_shard(f) for f in files[split]] for split in files)
        self.sha256 = self.hash_meta()
        shards = list(zip(files["train"] + files["val"], self.train + self.val, strict=True))
        mine = shards[part::parts]
        largest = self.check_shards(mine)
        self.load_vocabulary(max(largest, default=0))
        for (file, _), token in zip(mine, largest, strict=True):
            if token >= self.known_size:
                raise ValueError(
                    f"{file}: token {token} is outside the vocabulary of {self.known_size}; "
                    "set VOCAB_SIZE or the right TOKENIZER"
                )

    def find_files(self):
        """{"train": [path], "val": [path]}; ValueError if they aren't those of meta.json."""
        files = {s: sorted(self.folder.glob(f"*_{s}_*.bin")) for s in ("train", "val")}
        for split, paths in files.items():
            if not paths:
                raise ValueError(
                    f"DATA_PATH={self.cfg.data_path}: no *_{split}_*.bin in it; make shards with "
                    "a script in data/ (docs/data.md)"
                )
        if both := set(files["train"]) & set(files["val"]):
            raise ValueError(f"{min(both)}: both *_train_* and *_val_* fit its name; rename it")
        if self.meta:
            odd = {f.name for paths in files.values() for f in paths} ^ set(self.meta["shards"])
            if odd:
                raise ValueError(
                    f"{self.folder / 'meta.json'} and the shards beside it disagree on "
                    f"{', '.join(sorted(odd))}; remove the folder and make the data again"
                )
        return files

    def identity(self):
        """What data a run is fed, for JSON.

        The sha256 of meta.json's shards. Foreign shards, which are held to their first use, are
        known by their place and sizes.
        """
        sizes = [len(tokens) for tokens in self.train + self.val]
        return self.sha256 or [str(self.folder.resolve()), *sizes]

    def hash_meta(self):
        """The sha256 of all that val_bpb is made of, or None without a meta.json."""
        if not self.meta:
            return None
        shards = self.meta["shards"]
        parts = [[name, shards[name]["sha256"]] for name in sorted(shards)]
        parts += [self.meta["doc_token"], self.meta["bytes_per_token"]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def check_shards(self, shards):
        """The largest token of each of these (file, tokens), held to their sha256."""
        known = self.meta["shards"] if self.meta else {}
        digests = [known[file.name]["sha256"] if known else None for file, _ in shards]
        files, tokens = [f for f, _ in shards], [t for _, t in shards]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            reasons = [] if known else [r for r in pool.map(hold_shard, files) if r]
            largest = list(pool.map(check_shard, files, tokens, digests))
        if reasons:
            self.warn_unheld(self.folder, "the shards", reasons[0])
        return largest

    def warn_unheld(self, folder, what, reason):
        self.warnings.append(
            f"{folder} cannot be written ({reason}), so the sha256 of {what} is not kept there: "
            "a change would go unseen"
        )

    def load_vocabulary(self, largest):
        """Find vocabulary size, document marker and bytes per token, from meta.json or TOKENIZER.

        With neither, the size follows from the largest token of this rank's shards, and no_bpb
        says why there is no val_bpb.
        """
        self.no_bpb = self.bytes_per_token = self.token_table = None
        self.doc_token = self.meta["doc_token"] if self.meta else self.cfg.doc_token
        tokenizer = tokenizer_file(self.folder, self.meta) if self.meta else self.cfg.tokenizer
        if tokenizer:
            self.token_table = token_table(str(tokenizer))
            sizes = self.meta["bytes_per_token"] if self.meta else map(len, self.token_table)
            self.bytes_per_token = np.array(list(sizes), dtype=np.int64)
        else:
            self.no_bpb = (
                f"{self.folder} has no meta.json and TOKENIZER is not set, so the bytes per "
                "token are unknown"
            )
        if not self.meta and os.path.isfile(tokenizer) and not held_by_meta(tokenizer):
            reason = hold_shard(tokenizer)
            if reason:
                self.warn_unheld(Path(tokenizer).parent, Path(tokenizer).name, reason)
        if dist.is_initialized():  # each rank has seen its part of the shards
            shared = torch.tensor(largest)
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            largest = shared.item()
        known = self.cfg.vocab_size or -(-(largest + 1) // 64) * 64
        if tokenizer:
            known = len(self.bytes_per_token)
        self.vocab_size = self.cfg.vocab_size or known
        self.known_size = min(known, self.vocab_size)  # ids from here on never occur


def meta_of(folder):
    """The meta.json of a data folder, None if it has none; ValueError if it can't be trusted."""
    if not folder.is_dir():
        raise ValueError(
            f"DATA_PATH={folder}: no such folder; make one with a script in data/ (docs/data.md)"
        )
    if os.path.lexists(folder / "meta.json"):
        return read_meta(folder)
    # The scripts in data/ call it so. Without meta.json, pairs would be read as text.
    if os.path.lexists(folder / "tokenizer.tiktoken"):
        raise ValueError(
            f"{folder}: its meta.json is missing; remove the folder and make the data again "
            "(data/prepare_fineweb.py only adds what is missing)"
        )
    return None


# ---- text


class TokenData(Shards):
    """Rows of T tokens in a seeded order, whatever documents lie in them.

    An epoch is a permutation of all rows. The tail of a shard that fills no row is left out.
    """

    least_micro_batches = 1  # of a step and rank, if the config leaves their number open

    def __init__(self, cfg, folder=None, part=0, parts=1):
        super().__init__(cfg, folder, part, parts)
        if cfg.loss_on == "target":
            raise ValueError(
                f"LOSS_ON=target: {self.folder} holds text, which has no target; choose LOSS_ON=all"
            )
        T = cfg.train_seq_len
        self.val_size = min(cfg.val_tokens or math.inf, sum(map(len, self.val)))
        if self.val_size < T + 1:
            raise ValueError(
                f"the val split of {cfg.data_path} has {self.val_size} tokens "
                f"(VAL_TOKENS={cfg.val_tokens}), fewer than a row of TRAIN_SEQ_LEN={T} and its "
                "last target; lower TRAIN_SEQ_LEN or make a larger split"
            )
        # The number of the first row of each shard, and at the end the number of all rows.
        self.first_row = np.cumsum([0] + [(len(tokens) - 1) // T for tokens in self.train])
        self.num_rows = int(self.first_row[-1])
        if not self.num_rows:
            raise ValueError(
                f"no train shard of {cfg.data_path} holds a row of TRAIN_SEQ_LEN={T} tokens; "
                "lower it"
            )
        self.epoch = functools.lru_cache(maxsize=2)(self.shuffle)
        self.about = f"{sum(map(len, self.train)):,} train tokens"

    def shuffle(self, epoch):
        return np.random.default_rng([self.cfg.seed, epoch]).permutation(self.num_rows)

    def check_micro_batch(self, share, objective):
        """Rows of text fit every micro-batch."""

    def extra_tokens(self, objective):
        """Rows of text are encoded once, whatever the objective compares in them."""
        return 0.0

    def missing_terms(self, objective):
        """What a row of text has to compare is known when its spans are drawn."""
        return {}

    def rows(self, step, rows, first_row, count):
        """`count` rows of the `rows` rows of a step, from first_row on: (idx, targets).

        Both are int64 CPU tensors (count, T).
        """
        T = self.cfg.train_seq_len
        out = np.empty((count, T + 1), dtype=np.int64)
        for i in range(count):
            epoch, n = divmod(step * rows + first_row + i, self.num_rows)
            row = int(self.epoch(epoch)[n])
            shard = bisect.bisect_right(self.first_row, row) - 1
            start = (row - int(self.first_row[shard])) * T
            out[i] = self.train[shard][start : start + T + 1]
        out = torch.from_numpy(out)
        return out[:, :-1].contiguous(), out[:, 1:].contiguous()

    def read(self, step, share, objective=None):
        """The StepData of a step for this rank."""
        T, size = self.cfg.train_seq_len, share.micro_rows
        batches = []
        for first in range(share.first_row, share.first_row + share.local_rows, size):
            idx, targets = self.rows(step, share.rows, first, size)
            items = torch.arange(first, first + size)
            batches.append(Batch(idx, targets, share.rows * T, items=items, total_items=share.rows))
        tokens = share.rows * T
        return StepData(batches, tokens, tokens * (T + 1) // 2)

    load = read  # for the next step of a run; reading ahead isn't worth it here

    def val_windows(self):
        """Yield idx, targets (T,): every token of the val split but each shard's first, once.

        Rows lie side by side, or advance by EVAL_STRIDE tokens, so that a target sees at least
        T - EVAL_STRIDE tokens if there are so many. Targets are -1 if the window before has scored
        them, and after the end.
        """
        T, left = self.cfg.train_seq_len, self.val_size
        stride = self.cfg.eval_stride or T
        for tokens in self.val:
            tokens = tokens[:left]
            left -= len(tokens)
            for done in range(0, len(tokens) - 1, stride):
                end = min(done + stride, len(tokens) - 1)
                start = max(0, end - T)
                idx, targets = np.zeros(T, dtype=np.int64), np.full(T, -1, dtype=np.int64)
                idx[: end - start] = tokens[start:end]
                targets[done - start : end - start] = tokens[done + 1 : end + 1]
                yield idx, targets

    def val_batches(self, share):
        """Yield (fraction done after it, Batch) over this rank's part of the val split."""
        rows = share.micro_rows
        windows = itertools.islice(self.val_windows(), share.rank, None, share.world_size)
        count = self.val_size / (self.cfg.eval_stride or self.cfg.train_seq_len)
        for n in itertools.count(1):
            window = list(itertools.islice(windows, rows))
            if not window:
                return
            idx, targets = (torch.from_numpy(np.stack(x)) for x in zip(*window, strict=True))
            missing = rows - len(window)  # one shape, one graph
            idx = F.pad(idx, (0, 0, 0, missing))
            targets = F.pad(targets, (0, 0, 0, missing), value=-1)
            yield min(1, n * rows * share.world_size / count), Batch(idx, targets)


# ---- pairs and groups


class ExampleSet:
    """The examples of one split: views of texts, token arrays, in groups.

    In the shards an example is marker, view, separator, view, ...
    """

    def __init__(self, shards, marker, separator, split):
        self.tokens = tokens = np.concatenate(shards)
        bounds = np.flatnonzero((tokens == marker) | (tokens == separator))
        self.start, self.length = bounds + 1, np.diff(bounds, append=len(tokens)) - 1
        # first: the number of the first view of each example, and at the end that of all views
        self.first = np.append(np.flatnonzero(tokens[bounds] == marker), len(bounds))
        if len(bounds) == 0 or bounds[0] or tokens[0] != marker or self.length.min() < 1:
            raise ValueError(
                f"the {split} shards hold no examples of non-empty views; remove the folder and "
                "make the data again with data/prepare_pairs.py"
            )

    def __len__(self):
        return len(self.first) - 1

    def views(self, example):
        """The tokens of an example's views, lists."""
        views = range(self.first[example], self.first[example + 1])
        return [self.tokens[self.start[v] : self.start[v] + self.length[v]].tolist() for v in views]

    def counts(self):
        """Views of each example."""
        return np.diff(self.first)

    def total_lengths(self):
        """Tokens of each example's views."""
        return np.add.reduceat(self.length, self.first[:-1])

    def keep(self, chosen):
        """Drop the examples that are not in chosen, a boolean array."""
        views = np.repeat(chosen, self.counts())
        first = np.concatenate(([0], np.cumsum(self.counts()[chosen])))
        self.start, self.length, self.first = self.start[views], self.length[views], first


class PairData(Shards):
    """Pairs (Text, Code) or groups of paraphrases, packed in rows.

    A step is the set of examples whose trunks begin within its TRAIN_BATCH_TOKENS of the epochs'
    trunk tokens. So its examples depend on SEED alone, and the term decides only how many
    micro-batches they fill. An epoch is a permutation of all examples.
    """

    least_micro_batches = 8  # so that on average at most a 16th of a step's rows is empty

    def __init__(self, cfg, folder=None, part=0, parts=1):
        super().__init__(cfg, folder, part, parts)
        self.read_examples(cfg)

    def read_examples(self, cfg):
        """Find the examples in the shards, and what a row can't hold."""
        self.cfg, self.paired = cfg, self.meta["kind"] == "pairs"
        self.check_settings()
        self.warnings, self.sets = [], {}
        if cfg.eval_stride:
            self.warnings.append(
                f"EVAL_STRIDE={cfg.eval_stride} is not used: pairs and groups are evaluated whole"
            )
        for split in ("train", "val"):
            examples = ExampleSet(getattr(self, split), self.doc_token, self.separator, split)
            views = examples.counts()
            if not ((views == 2).all() if self.paired else (views >= 2).all()):
                raise ValueError(
                    f"the {split} shards of {self.folder} don't hold {self.meta['kind']}; remove "
                    "the folder and make the data again with data/prepare_pairs.py"
                )
            self.sets[split] = examples
            self.fit_rows(split)
        train, val = self.sets["train"], self.sets["val"]
        if cfg.val_tokens:
            trunks = self.trunks("val")
            val.keep(np.cumsum(trunks) <= max(cfg.val_tokens, trunks[0]))
        self.trunk_tokens, self.val_size = int(self.trunks("train").sum()), len(val)
        # The smallest document that something can be compared in bounds the pairs of a row.
        documents = self.trunks("train") if self.paired else train.length + self.extra
        self.smallest = int(documents.min())
        self.epoch = functools.lru_cache(maxsize=2)(self.shuffle)  # a step may lie in two epochs
        self.thread, self.ahead, self.last_objective = ThreadPoolExecutor(1), None, None
        self.about = (
            f"{len(train):,} {self.meta['kind']} to train on, {self.trunk_tokens:,} trunk tokens: "
            f"{self.trunk_tokens / cfg.train_batch_tokens:.1f} steps an epoch; "
            f"{self.val_size:,} to validate on"
        )

    def check_settings(self):
        """Find the special tokens; ValueError if a setting doesn't go with this data."""
        cfg = self.cfg
        if cfg.loss_on == "target" and not self.paired:
            raise ValueError(
                f"LOSS_ON=target: {self.folder} holds groups of paraphrases, which have no "
                "target; choose LOSS_ON=all"
            )
        self.separator, first_pred = self.meta["separator"], self.meta["first_pred"]
        self.token_table += [b""] * (self.separator + 1 - len(self.token_table))
        self.token_table[self.separator] = b"\n"  # as a text sample shows it
        self.preds = tuple(range(first_pred, first_pred + cfg.jepa_pred_tokens))
        self.extra = 3 if self.paired else 2  # a trunk's tokens that are no view's: markers
        shortest = self.extra + MAX_PRED_TOKENS + 3
        if cfg.train_seq_len < shortest:
            raise ValueError(
                f"TRAIN_SEQ_LEN={cfg.train_seq_len}: pairs data needs rows of at least "
                f"{shortest} tokens"
            )
        if first_pred + MAX_PRED_TOKENS > self.vocab_size:
            raise ValueError(
                f"VOCAB_SIZE={cfg.vocab_size}: the tokens of {self.folder} need "
                f"{first_pred + MAX_PRED_TOKENS}"
            )

    def trunks(self, split):
        """Trunk tokens of each example: those that the cross entropy is about."""
        examples = self.sets[split]
        trunks = 1 if self.paired else examples.counts()
        return examples.total_lengths() + self.extra * trunks

    def longest_documents(self, split):
        """Tokens of each example's longest document, with as many [PRED]s as there can be."""
        examples = self.sets[split]
        join = np.add if self.paired else np.maximum
        views = join.reduceat(examples.length, examples.first[:-1])
        return views + self.extra + MAX_PRED_TOKENS

    def fit_rows(self, split):
        """Find the examples that a row can't hold, and stop, skip or truncate (LONG_EXAMPLES).

        Room for the most [PRED] tokens is left, so that all arms have the same examples.
        """
        cfg, examples, longest = self.cfg, self.sets[split], self.longest_documents(split)
        long, needed = longest > cfg.train_seq_len, longest.max()
        if not long.any():
            return
        what = (
            f"{long.sum():,} of {len(examples):,} {split} examples of {self.folder} don't fit a "
            f"row of TRAIN_SEQ_LEN={cfg.train_seq_len}"
        )
        if cfg.long_examples == "stop":
            raise ValueError(
                f"{what}: choose LONG_EXAMPLES=skip or truncate, or TRAIN_SEQ_LEN={needed}"
            )
        if cfg.long_examples == "skip":
            examples.keep(~long)
            if not len(examples):
                raise ValueError(f"{what}, so none is left: raise TRAIN_SEQ_LEN to {needed}")
            self.warnings.append(f"{what}: skipped (LONG_EXAMPLES)")
        else:
            self.truncate(examples, long)
            self.warnings.append(f"{what}: truncated (LONG_EXAMPLES)")

    def truncate(self, examples, long):
        """Cut the tail of the longer view of these examples; the end token stays."""
        room = self.cfg.train_seq_len - self.extra - MAX_PRED_TOKENS
        if self.paired:
            text, code = examples.length[0::2], examples.length[1::2]
            cut = np.minimum(text, np.maximum(room - code, room // 2))
            text[:] = np.where(long, cut, text)
            code[:] = np.where(long, np.minimum(code, room - text), code)
        else:
            np.minimum(examples.length, room, out=examples.length)

    def check_micro_batch(self, share, objective):
        """ValueError, before the run, if an example doesn't fit an empty micro-batch."""
        R, T = share.micro_rows, self.cfg.train_seq_len
        for split, examples in self.sets.items():
            # Upper bounds: whoever meets them fits, since first fit leaves nothing over up to here.
            extra = (self.extra + MAX_PRED_TOKENS) * examples.counts()
            total = 2 * (examples.total_lengths() + extra)
            room = np.maximum(T, R * (T - self.longest_documents(split)))
            for e in np.flatnonzero(total > room):
                layouts = [self.layout(examples.views(e), o) for o in {None, objective}]
                try:
                    for example in layouts:
                        place_examples([example], R, T)
                except ValueError:
                    raise ValueError(
                        f"a micro-batch of {R} rows of {T} tokens is too small for {split} example "
                        f"{e + 1} of {self.folder}; lower GRAD_ACCUM_STEPS, or raise "
                        "TRAIN_BATCH_TOKENS or TRAIN_SEQ_LEN"
                    ) from None

    def extra_tokens(self, objective):
        """How many more tokens the objective encodes, as a fraction of the trunks' tokens."""
        views = [self.sets["train"].views(e) for e in self.examples_of(0)]
        plain, full = (
            sum(len(d) for v in views for d in self.layout(v, o).documents)
            for o in (None, objective)
        )
        return full / plain - 1

    def missing_terms(self, objective):
        """{why: how many examples of the first step have nothing to compare}."""
        views = [self.sets["train"].views(e) for e in self.examples_of(0)]
        reasons = [self.layout(v, objective).no_term for v in views]
        return Counter(reason for reason in reasons if reason)

    def shuffle(self, epoch):
        """(permutation of the train examples, where their trunks begin in the epoch)."""
        rng = np.random.default_rng([self.cfg.seed, epoch])
        order = rng.permutation(len(self.sets["train"]))
        trunks = self.trunks("train")[order]
        return order, np.cumsum(trunks) - trunks

    def examples_of(self, step):
        """The examples of a step, as indices into the train set."""
        size, total = self.cfg.train_batch_tokens, self.trunk_tokens
        begin, end, chosen = step * size, (step + 1) * size, []
        for epoch in range(begin // total, (end - 1) // total + 1):
            order, starts = self.epoch(epoch)
            first, last = np.searchsorted(starts, (begin - epoch * total, end - epoch * total))
            chosen += order[first:last].tolist()
        return chosen

    def texts(self, views):
        """The Texts of an example's views, which are lists of tokens.

        The trunk of a pair is marker, Text, separator, Code, marker, which is the end token. Every
        text of a group is a document of its own.
        """
        marker = self.doc_token
        if self.paired:
            text, code = views
            trunk = [marker, *text, self.separator, *code, marker]
            begin = len(text) + 2 if self.cfg.loss_on == "target" else 1
            documents = [Document(trunk, range(begin, len(trunk)))]
            meaning = [(View([marker, *text], 1, document=0), View([marker, *code], 1))]
        else:
            documents = [
                Document([marker, *view, marker], range(1, len(view) + 2)) for view in views
            ]
            alone = [View([marker, *view], 1, document=n) for n, view in enumerate(views)]
            meaning = list(itertools.pairwise(alone))
        regions = [((n, 0), (n, len(d.trunk) - 1)) for n, d in enumerate(documents)]
        steps = functools.partial(self.steps, views)
        return Texts(documents, meaning, regions, self.cfg.train_seq_len, steps)

    def steps(self, views):
        """The Views of the first two steps of a pair's Code, [] if it has fewer."""
        if not self.paired:
            return []
        text, code = views
        pieces = [self.token_table[token] for token in code]
        said = b"".join(pieces).decode(errors="replace")
        ends = find_steps(said)
        if ends is None:
            return []
        # Step 1 ends with the token that holds the last byte of its blank line.
        size = len(said[: ends.first].encode())
        count = int(np.searchsorted(np.cumsum([len(piece) for piece in pieces]), size)) + 1
        second = self.encoding.encode_ordinary(said[ends.first : ends.second])
        trunk = [self.doc_token, *text, self.separator, *code[:count]]
        return [View(trunk, len(text) + 2, document=0), View([self.doc_token, *second], 1)]

    @functools.cached_property
    def encoding(self):
        return saved_encoding(self.folder, self.meta)

    def layout(self, views, objective):
        """The Example of these views; objective None: the trunks alone."""
        texts = self.texts(views)
        return objective.layout(texts) if objective else Example(texts.documents)

    def load(self, step, share, objective=None):
        """The StepData of the next step of a run; the one after that is packed meanwhile."""
        asked = step, share, objective
        ready = self.ahead is not None and self.ahead[0] == asked
        result = self.ahead[1].result() if ready else self.read(*asked)
        # A guess what will be asked next; if it is wrong, the step is packed again.
        self.last_objective = objective or self.last_objective
        ratio = self.cfg.jepa_ratio
        if ratio < 1:
            kept = keeps_term(self.cfg.seed, step + 1, ratio)
            objective = self.last_objective if kept else None
        asked = step + 1, share, objective
        self.ahead = asked, self.thread.submit(self.read, *asked)
        return result

    def read(self, step, share, objective=None):
        """The StepData of a step: every rank packs all of it and fills its own micro-batches."""
        chosen = self.examples_of(step)
        views = [self.sets["train"].views(e) for e in chosen]
        return self.pack([self.layout(v, objective) for v in views], chosen, share)

    def pack(self, examples, groups, share):
        """The StepData of these Examples, of which examples with equal `groups` are one."""
        R, T = share.micro_rows, self.cfg.train_seq_len
        placed = place_examples(examples, R, T)
        # Every rank has the same number of micro-batches; the last ones may be empty.
        rounds = -(-(max(p.micro_batch for p in placed) + 1) // share.world_size)
        held = [[] for _ in range(rounds * share.world_size)]
        first_items = np.cumsum([0] + [len(e.pairs) for e in examples])
        for example, place, group, first in zip(
            examples, placed, groups, first_items, strict=False
        ):
            held[place.micro_batch].append(Item(example, place.places, group, int(first)))
        num_targets = sum(len(d.loss_on) for e in examples for d in e.documents)
        batches = []
        for items in held[share.rank :: share.world_size]:
            room = R * (T // self.smallest)  # a step of training never exceeds it: one shape
            batch = fill_rows(items, R, T, self.doc_token, room)
            batch.num_targets = torch.tensor(float(num_targets))
            batch.total_items = max(1, int(first_items[-1]))
            batches.append(batch)
        return StepData(batches, len(held) * R * T, visible_pairs(held, R, T))

    def val_batches(self, share):
        """Yield (fraction done after it, Batch): the trunks of the val examples."""
        size = len(self.sets["val"])
        for first in range(0, size, VAL_WINDOW):
            window = range(first, min(size, first + VAL_WINDOW))
            examples = [self.layout(self.sets["val"].views(e), None) for e in window]
            batches = self.pack(examples, window, share).batches
            for n, batch in enumerate(batches, 1):
                yield (first + len(window) * n / len(batches)) / size, batch


def visible_pairs(held, R, T):
    """(query, key) pairs of micro-batches of Items; what is left of a row is a document too."""
    padding, visible = np.full((len(held), R), T), 0
    for m, items in enumerate(held):
        for item in items:
            for document, (row, _) in zip(item.example.documents, item.places, strict=True):
                padding[m, row] -= len(document)
                visible += document.visible_pairs()
    return int(visible + (padding * (padding + 1) // 2).sum())


# ---- which of the two


def open_data(cfg):
    """The TokenData or PairData of a run.

    An embedded data set that is missing is prepared, once a node.
    """
    embedded = cfg.data_path in EMBEDDED_DATA
    folder = ROOT / cfg.data_path if embedded else Path(cfg.data_path)
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # If the nodes share a disk, the first rank prepares for all of them.
    for first in (rank == 0, local_rank == 0):
        if embedded and first and not folder.exists():
            print(f"no data on disk: preparing {cfg.data_path}", flush=True)
            prepare_default(folder.name, folder)
        if dist.is_initialized():
            dist.barrier()
    meta = meta_of(folder)
    paired = meta is not None and "kind" in meta
    has_term = cfg.jepa_lambda or cfg.diag_every
    if has_term and OBJECTIVES[cfg.jepa_objective].needs_pairs and not paired:
        raise ValueError(
            f"JEPA_OBJECTIVE={cfg.jepa_objective}: {cfg.data_path} holds text; it needs pairs or "
            "groups of texts, made by data/prepare_pairs.py or data/prepare_nlregex.py"
        )
    kind = PairData if paired else TokenData
    return kind(cfg, folder, local_rank, local_world_size)
