"""What a training step is fed: rows of text (TokenData), or packed pairs and groups (PairData).

Read it as a batch goes: open_data checks the folder, data.load gives this rank its micro-batches
of step n, draw_step adds what the term draws. Which tokens and examples make up step n is a
function of SEED and n alone: not of the term, the ranks or the micro-batches. So an arm's twin
sees the same data, and a resumed run needs no state of the loader.

Shapes: R rows of a micro-batch, T tokens, N pairs of places.
"""

import bisect
import functools
import itertools
import math
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from nanojepa.corpora import EMBEDDED
from nanojepa.examples import ExampleSet
from nanojepa.objectives import StepRandom, kinds
from nanojepa.objectives.objective import divide_weights, sum_weights
from nanojepa.objectives.schedule import keeps_term
from nanojepa.objectives.step import find_steps
from nanojepa.packing import (
    Batch,
    Document,
    Example,
    Item,
    Texts,
    View,
    document_fragments,
    fill_rows,
    place_examples,
)
from nanojepa.records import PRED_TOKENS
from nanojepa.settings import Range
from nanojepa.shards import DataFolder, find_meta

ROOT = Path(__file__).resolve().parents[1]
VAL_WINDOW = 512  # examples that are packed together in evaluation
PredTokens = Annotated[int, Range(0, PRED_TOKENS)]


def open_data(cfg):
    """The TokenData or PairData of a run.

    An embedded data set that is missing is prepared, once a node.
    """
    embedded = cfg.data_path in EMBEDDED
    folder = ROOT / cfg.data_path if embedded else Path(cfg.data_path)
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # If the nodes share a disk, the first rank prepares for all of them.
    for first in (rank == 0, local_rank == 0):
        if embedded and first and not folder.exists():
            print(f"no data on disk: preparing {cfg.data_path}", file=sys.stderr)
            EMBEDDED[cfg.data_path](folder)
        if dist.is_initialized():
            dist.barrier()
    kind = (find_meta(folder) or {}).get("kind", "text")
    has_term = cfg.jepa_lambda or cfg.diag_every
    needs_pairs = any(each.needs_pairs for each in kinds(cfg.jepa_objective))
    if has_term and needs_pairs and kind == "text":
        raise ValueError(
            f"JEPA_OBJECTIVE={cfg.jepa_objective}: {cfg.data_path} holds text; it needs pairs or "
            "groups of texts, made by data/prepare_pairs.py or data/prepare_nlregex.py"
        )
    if cfg.loss_on == "target" and kind != "pairs":
        raise ValueError(
            f"LOSS_ON=target: {cfg.data_path} holds {kind} without a target; choose LOSS_ON=all"
        )
    data = TokenData if kind == "text" else PairData
    return data(cfg, folder, local_rank, local_world_size)


# ---- who does what


@dataclass
class Share:
    """What this rank does of a step: every world_size-th part of `rows` rows, micro_rows at a time.

    Of pairs data only micro_rows counts: examples fill as many micro-batches as they need, and the
    ranks take them in turn.
    """

    rank: int
    world_size: int
    device: torch.device
    rows: int
    micro_rows: int


def divide_batch(cfg, rank, world_size, device, least=1):
    """The Share of this rank; ValueError if TRAIN_BATCH_TOKENS doesn't come out even.

    least: micro-batches of a step and rank, if GRAD_ACCUM_STEPS=0 leaves their number open.
    """
    T, rows = cfg.train_seq_len, cfg.train_batch_tokens // cfg.train_seq_len
    local = rows // world_size
    accum = cfg.grad_accum_steps
    if not accum:
        fewest = max(least, math.ceil(local * T / most_tokens(cfg, device)))
        even = [n for n in range(1, local + 1) if local % n == 0]
        accum = next((n for n in even if n >= fewest), max(even, default=1))
    if cfg.train_batch_tokens % (world_size * accum * T):
        raise ValueError(
            f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} must be a multiple of ranks x "
            f"GRAD_ACCUM_STEPS x TRAIN_SEQ_LEN = {world_size} x {accum} x {T}"
        )
    return Share(rank, world_size, device, rows, local // accum)


def most_tokens(cfg, device):
    """Tokens of a micro-batch: on a GPU, those whose activations take 60% of its memory."""
    if device.type != "cuda":
        return 65_536
    return 0.6 * torch.cuda.get_device_properties(device).total_memory / kept_bytes(cfg)


def kept_bytes(cfg):
    """Bytes a token that a compiled step in bfloat16 keeps for its backward pass.

    In each block: the stream before and between its halves, both norms, the attention's output,
    queries, keys and values, the first two rotated too, and the MLP's state before and after its
    activation.
    """
    D, kv = cfg.model_dim, cfg.model_dim * cfg.num_kv_heads // cfg.num_heads
    return 2 * cfg.num_layers * ((5 + 2 + 2 * cfg.mlp_mult) * D + 3 * kv)


class StepData(NamedTuple):
    """This rank's micro-batches of a step, and what the step costs over all ranks."""

    batches: list
    tokens: int
    visible_pairs: int  # (query, key) pairs of attention


# ---- text


class TokenData(DataFolder):
    """Rows of T tokens in a seeded order, whatever documents lie in them.

    An epoch is a permutation of all rows. The tail of a shard that fills no row is left out.
    """

    least_micro_batches = 1  # of a step and rank, if the config leaves their number open

    def __init__(self, cfg, folder=None, part=0, parts=1):
        super().__init__(cfg, folder, part, parts)
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
        self.epoch = functools.lru_cache(maxsize=2)(self.shuffle)  # a step may lie in two epochs

    def shuffle(self, epoch):
        return np.random.default_rng([self.cfg.seed, epoch]).permutation(self.num_rows)

    def load(self, step, share, objective=None):
        """The StepData of a step; rows are encoded once, whatever the objective."""
        T, size, local = self.cfg.train_seq_len, share.micro_rows, share.rows // share.world_size
        tokens, batches = share.rows * T, []
        for first in range(share.rank * local, (share.rank + 1) * local, size):
            idx, targets = self.rows(step, share.rows, first, size)
            items = torch.arange(first, first + size)
            document = self.number_documents(idx)
            batches.append(
                Batch(
                    idx,
                    targets,
                    tokens,
                    ends=self.ends(document),
                    document=document,
                    items=items,
                    total_items=share.rows,
                )
            )
        return StepData(batches, tokens, tokens * (T + 1) // 2)

    read = load

    def number_documents(self, idx):
        """The number (R, T) of the document of a row that each token lies in."""
        return (idx == self.doc_token).cumsum(1)

    def ends(self, document):
        """Batch.ends of numbered documents, if they don't see each other; otherwise None."""
        return document_fragments(document)[1] + 1 if self.cfg.mask_documents else None

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

    def val_windows(self):
        """Yield (tokens of a shard, start, first, end): inputs from start, targets after first.

        Every token of the val split but each shard's first is a target once. Rows lie side by
        side, or advance by EVAL_STRIDE tokens, so that a target sees at least T - EVAL_STRIDE
        tokens if there are so many.
        """
        T, left = self.cfg.train_seq_len, self.val_size
        stride = self.cfg.eval_stride or T
        for tokens in self.val:
            tokens = tokens[:left]
            left -= len(tokens)
            for first in range(0, len(tokens) - 1, stride):
                end = min(first + stride, len(tokens) - 1)
                yield tokens, max(0, end - T), first, end

    def val_batches(self, share):
        """Yield (fraction done after it, Batch) over this rank's part of the val split."""
        R, T, windows = share.micro_rows, self.cfg.train_seq_len, list(self.val_windows())
        size = R * share.world_size
        for begin in range(0, len(windows), size):
            # Rows that are left over in the last batch stay empty: one shape, one graph.
            idx, targets = torch.zeros(R, T, dtype=torch.int64), torch.full((R, T), -1)
            own = windows[begin : begin + size][share.rank :: share.world_size]
            for row, (tokens, start, first, end) in enumerate(own):
                text = torch.from_numpy(tokens[start : end + 1].astype(np.int64))
                idx[row, : end - start] = text[:-1]
                targets[row, first - start : end - start] = text[first - start + 1 :]
            ends = self.ends(self.number_documents(idx))
            yield min(1, (begin + size) / len(windows)), Batch(idx, targets, ends=ends)

    def report(self, share, objective):
        """Lines for the log of a run that is about to begin."""
        return [*self.warnings, f"{sum(map(len, self.train)):,} train tokens"]

    def first_examples(self, count, share, objective):
        """The first rows of a run as Examples, each with its last target at its end."""
        idx, targets = self.rows(0, share.rows, 0, min(count, share.rows))
        layout = objective.layout if objective else lambda texts: Example(texts.documents)
        return [
            layout(self.texts([*row, last]))
            for row, last in zip(idx.tolist(), targets[:, -1].tolist(), strict=True)
        ]

    def texts(self, tokens):
        """The Texts of a row; its regions are the documents that spans are drawn in."""
        starts = [n for n, token in enumerate(tokens) if token == self.doc_token]
        if not self.cfg.jepa_doc:
            starts = []
        bounds = sorted({0, *starts, len(tokens) - 1})
        regions = [((0, a), (0, b - 1)) for a, b in itertools.pairwise(bounds)]
        return Texts([Document(tokens, range(1, len(tokens)))], regions=regions)

    def counts(self):
        """{what: number} of the data."""
        return {
            "rows": self.num_rows,
            "tokens": sum(map(len, self.train)),
            "val_tokens": self.val_size,
        }


# ---- pairs and groups


class PairData(DataFolder):
    """Pairs (Text, Code) or groups of paraphrases, packed in rows.

    A step is the set of examples whose trunks begin within its TRAIN_BATCH_TOKENS of the epochs'
    trunk tokens. So its examples depend on SEED alone, and the term decides only how many
    micro-batches they fill. An epoch is a permutation of all examples.
    """

    least_micro_batches = 8  # so that on average at most a 16th of a step's rows is empty

    def __init__(self, cfg, folder=None, part=0, parts=1):
        super().__init__(cfg, folder, part, parts)
        self.read_examples()

    def read_examples(self):
        """Find the examples in the shards, and what a row can't hold."""
        cfg, self.paired, self.sets = self.cfg, self.meta["kind"] == "pairs", {}
        self.separator, first_pred = self.meta["separator"], self.meta["first_pred"]
        self.token_table[self.separator] = b"\n"  # as a text sample shows it
        self.preds = tuple(range(first_pred, first_pred + cfg.jepa_pred_tokens))
        for split in ("train", "val"):
            tokens, name = getattr(self, split), f"{split} examples of {self.folder}"
            examples = ExampleSet(tokens, self.doc_token, self.separator, name, self.paired)
            self.warnings += examples.fit_rows(cfg.train_seq_len, cfg.long_examples)
            self.sets[split] = examples
        val, train = self.sets["val"], self.sets["train"]
        if cfg.val_tokens:
            val.keep(np.cumsum(val.trunks()) <= max(cfg.val_tokens, val.trunks()[0]))
        if cfg.eval_stride:
            self.warnings.append(
                f"EVAL_STRIDE={cfg.eval_stride} is not used: pairs and groups are evaluated whole"
            )
        self.trunk_tokens = int(train.trunks().sum())
        # The shortest document limits how many pairs fit in a row.
        self.smallest = int(train.documents()[0].min())
        self.epoch = functools.lru_cache(maxsize=2)(self.shuffle)  # a step may lie in two epochs
        self.thread, self.ahead, self.last_objective = ThreadPoolExecutor(1), None, None

    def load(self, step, share, objective=None):
        """The StepData of the next step of a run; the one after that is packed meanwhile."""
        asked = step, share, objective
        ready = self.ahead is not None and self.ahead[0] == asked
        result = self.ahead[1].result() if ready else self.read(*asked)
        # Pack the step that probably comes next; if another one is asked for, that is thrown away.
        self.last_objective = objective or self.last_objective
        if self.cfg.jepa_ratio < 1:
            kept = keeps_term(self.cfg.seed, step + 1, self.cfg.jepa_ratio)
            objective = self.last_objective if kept else None
        asked = step + 1, share, objective
        self.ahead = asked, self.thread.submit(self.read, *asked)
        return result

    def read(self, step, share, objective=None):
        """The StepData of a step: every rank packs all of it and fills its own micro-batches."""
        chosen = self.examples_of(step)
        views = [self.sets["train"].views(e) for e in chosen]
        return self.pack([self.layout(v, objective) for v in views], chosen, share)

    def examples_of(self, step):
        """The examples of a step, as indices into the train set."""
        size, total = self.cfg.train_batch_tokens, self.trunk_tokens
        begin, end, chosen = step * size, (step + 1) * size, []
        for epoch in range(begin // total, (end - 1) // total + 1):
            order, starts = self.epoch(epoch)
            first, last = np.searchsorted(starts, (begin - epoch * total, end - epoch * total))
            chosen += order[first:last].tolist()
        return chosen

    def shuffle(self, epoch):
        """(permutation of the train examples, where their trunks begin in the epoch)."""
        rng = np.random.default_rng([self.cfg.seed, epoch])
        order = rng.permutation(len(self.sets["train"]))
        trunks = self.sets["train"].trunks()[order]
        return order, np.cumsum(trunks) - trunks

    def layout(self, views, objective):
        """The Example of these views; objective None: the trunks alone."""
        texts = self.texts(views)
        return objective.layout(texts) if objective else Example(texts.documents)

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
        second = self.encode(said[ends.first : ends.second])
        trunk = [self.doc_token, *text, self.separator, *code[:count]]
        return [View(trunk, len(text) + 2, document=0), View([self.doc_token, *second], 1)]

    def pack(self, examples, groups, share):
        """The StepData of these Examples, examples with the same group number count as one."""
        R, T = share.micro_rows, self.cfg.train_seq_len
        placed = place_examples(examples, R, T)
        # Every rank has the same number of micro-batches; the last ones may be empty.
        rounds = -(-(max(p.micro_batch for p in placed) + 1) // share.world_size)
        held = [[] for _ in range(rounds * share.world_size)]
        num_pairs = 0
        for example, place, group in zip(examples, placed, groups, strict=True):
            held[place.micro_batch].append(Item(example, place.places, group, num_pairs))
            num_pairs += len(example.pairs)
        num_targets = sum(len(d.loss_on) for e in examples for d in e.documents)
        batches = []
        for items in held[share.rank :: share.world_size]:
            room = R * (T // self.smallest)  # no step has more pairs, so all batches have one shape
            batch = fill_rows(items, R, T, self.doc_token, room)
            batch.num_targets = torch.tensor(float(num_targets))
            batch.total_items = max(1, num_pairs)
            batches.append(batch)
        return StepData(batches, len(held) * R * T, visible_pairs(held, R, T))

    def val_batches(self, share):
        """Yield (fraction done after it, Batch): the trunks of the val examples."""
        val = self.sets["val"]
        for first in range(0, len(val), VAL_WINDOW):
            window = range(first, min(len(val), first + VAL_WINDOW))
            examples = [self.layout(val.views(e), None) for e in window]
            batches = self.pack(examples, window, share).batches
            for n, batch in enumerate(batches, 1):
                yield (first + len(window) * n / len(batches)) / len(val), batch

    def first_examples(self, count, share, objective):
        """The first Examples of a run."""
        views = [self.sets["train"].views(e) for e in self.examples_of(0)[:count]]
        return [self.layout(v, objective) for v in views]

    def counts(self):
        """{what: number} of the data."""
        train, val, overlap = self.sets["train"], self.sets["val"], self.meta["overlap"]
        return {
            "examples": len(train),
            "tokens": self.trunk_tokens,
            "cut": train.cut,
            "skipped": train.skipped,
            "val_examples": len(val),
            "duplicates": overlap["examples"] - overlap["clean"],
        }

    def check_micro_batch(self, share, objective):
        """ValueError if an example doesn't fit an empty micro-batch."""
        R, T = share.micro_rows, self.cfg.train_seq_len
        for examples in self.sets.values():
            # Examples below this bound always fit, so only the others are tried.
            total = 2 * (examples.trunks() + (PRED_TOKENS + 3) * examples.counts())
            room = np.maximum(T, R * (T - examples.longest()))
            for e in np.flatnonzero(total > room):
                for o in {None, objective}:
                    place_examples([self.layout(examples.views(e), o)], R, T)

    def report(self, share, objective):
        """Lines for the log of a run that is about to begin; ValueError if it can't."""
        self.check_micro_batch(share, objective)
        lines = [
            *self.warnings,
            f"{len(self.sets['train']):,} {self.meta['kind']} to train on, {self.trunk_tokens:,} "
            f"trunk tokens: {self.trunk_tokens / self.cfg.train_batch_tokens:.1f} steps an epoch; "
            f"{len(self.sets['val']):,} to validate on",
        ]
        if objective is None:
            return lines
        chosen = self.examples_of(0)
        examples = [self.layout(self.sets["train"].views(e), objective) for e in chosen]
        encoded = sum(len(d) for example in examples for d in example.documents)
        more = encoded / self.sets["train"].trunks()[chosen].sum() - 1
        if more > 0:
            lines.append(f"the term encodes {more:.0%} more tokens")
        for reason, count in Counter(e.no_term for e in examples if e.no_term).items():
            lines.append(f"warning: {count} examples of the first step have no term: {reason}")
        return lines


def visible_pairs(held, R, T):
    """(query, key) pairs of micro-batches of Items; the unused end of a row is a document too."""
    padding, visible = np.full((len(held), R), T), 0
    for m, items in enumerate(held):
        for item in items:
            for document, (row, _) in zip(item.example.documents, item.places, strict=True):
                padding[m, row] -= len(document)
                visible += document.visible_pairs()
    return int(visible + (padding * (padding + 1) // 2).sum())


# ---- what the term draws


def draw_step(objective, batches, seed, step):
    """Let the objective draw for every micro-batch of a step, in batch.drawn.

    The weights are divided by their sum over the step, all ranks and micro-batches, so that the
    term is a mean over all of its comparisons.
    """
    for batch in batches:
        rng = StepRandom(seed, step, batch.items, batch.total_items)
        batch.drawn = objective.draw(batch, rng)
    sums = torch.stack([sum_weights(batch.drawn) for batch in batches]).sum(0)
    if dist.is_initialized():
        dist.all_reduce(sums)  # a CPU tensor: it goes over gloo, so the GPU is not waited for
    for batch in batches:
        batch.drawn = divide_weights(batch.drawn, sums)
