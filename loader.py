"""What a training step is fed: rows of text shards (TokenData), or packed examples of pairs and groups of texts (PairData).

Which tokens and examples make up step n is a function of SEED and n alone: not of the JEPA settings, the ranks or the
micro-batches. So the loaders have no state, and an arm's twin sees the same data.
Shapes: R rows of a micro-batch, T tokens, S spans a row, N pairs of a micro-batch.
"""
import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import jepa
from data.shards import check_shard, held_by_meta, hold_shard, read_meta, read_shard, token_table, tokenizer_file

ROOT = Path(__file__).resolve().parent
EMBEDDED_DATA = ("data/stdlib", "data/nlregex", "data/nlregex_groups")  # prepared where they are missing
VAL_WINDOW = 512  # examples packed together in evaluation


@dataclass
class Batch:
    """One micro-batch. idx, targets (R, T) int64, -1 where there is no target; num_targets of the global batch, int or 0-dim
    float tensor. Rows of trees have positions (R, T) and ends (R, T), the index behind each token's last descendant.
    views: what the term compares, as jepa.span_views and weight, or jepa.pair_views, weight (N,) and group (N,); None: no
    term. pull: for infonce, the gradient of the term with respect to view A and view B."""
    idx: torch.Tensor
    targets: torch.Tensor
    num_targets: int | torch.Tensor = 1
    positions: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    views: tuple | None = None
    pull: tuple | None = None

    def to(self, device):
        """This batch on the device; to a GPU without waiting for it."""
        def move(x):
            if isinstance(x, tuple):
                return tuple(map(move, x))
            return x.pin_memory().to(device, non_blocking=True) if torch.is_tensor(x) and device.type == "cuda" else x
        return Batch(*(move(getattr(self, f.name)) for f in dataclasses.fields(self)))


class Shards:
    """The checked shards of a folder, and what is known of their tokens. This process checks one of `parts` parts of the
    shards, those of one node share them."""

    def __init__(self, cfg, folder=None, part=0, parts=1):
        self.cfg, self.folder = cfg, Path(folder or cfg.data_path)
        self.meta, self.warnings = meta_of(self.folder), []
        files = {split: sorted(self.folder.glob(f"*_{split}_*.bin")) for split in ("train", "val")}
        for split, found in files.items():
            if not found:
                raise ValueError(f"DATA_PATH={cfg.data_path}: no *_{split}_*.bin in it; make shards with a script in data/ (README, Data)")
        if both := set(files["train"]) & set(files["val"]):
            raise ValueError(f"{min(both)}: both *_train_* and *_val_* fit its name; rename it")
        shards = self.meta["shards"] if self.meta else {}
        identity = [[name, shards[name]["sha256"]] for name in sorted(shards)] + ([self.meta["doc_token"], self.meta["bytes_per_token"]] if shards else [])
        self.sha256 = hashlib.sha256(json.dumps(identity).encode()).hexdigest() if shards else None  # of all that val_bpb is made of
        if self.meta and (odd := {f.name for found in files.values() for f in found} ^ set(shards)):
            raise ValueError(f"{self.folder / 'meta.json'} and the shards beside it disagree on {', '.join(sorted(odd))}; "
                             "remove the folder and make the data again")
        self.train, self.val = ([read_shard(f) for f in files[split]] for split in ("train", "val"))

        mine = [(f, tokens) for split in files for f, tokens in zip(files[split], getattr(self, split))][part::parts]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
            unheld = [] if self.meta else [reason for reason in pool.map(lambda m: hold_shard(m[0]), mine) if reason]
            largest = list(pool.map(lambda m: check_shard(*m, shards[m[0].name]["sha256"] if self.meta else None), mine))
        if unheld:
            self.warn_unheld(self.folder, "the shards", unheld[0])
        self.load_vocabulary(max(largest, default=0))
        for (file, _), token in zip(mine, largest):
            if token >= self.known_size:
                raise ValueError(f"{file}: token {token} is outside the vocabulary of {self.known_size}; set VOCAB_SIZE or the right TOKENIZER")

    def warn_unheld(self, folder, what, reason):
        self.warnings.append(f"{folder} cannot be written ({reason}), so the sha256 of {what} is not kept there: a change would go unseen")

    def load_vocabulary(self, largest):
        """Vocabulary size, document marker, bytes per token and the tokens' bytes, from meta.json or TOKENIZER; with
        neither, the size follows from the largest token, and no_bpb says why there is no val_bpb."""
        tokenizer = tokenizer_file(self.folder, self.meta) if self.meta else self.cfg.tokenizer
        self.token_table = token_table(str(tokenizer)) if tokenizer else None
        if not self.meta and os.path.isfile(tokenizer) and not held_by_meta(tokenizer) and (reason := hold_shard(tokenizer)):
            self.warn_unheld(Path(tokenizer).parent, Path(tokenizer).name, reason)
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


def spread(count, total):
    """Which of `total` places are chosen, booleans: `count` of them, evenly spread."""
    places = np.arange(total + 1) * count // total
    return places[1:] > places[:-1]


class TokenData(Shards):
    """Text: rows of T tokens in a seeded order, whatever documents lie in them. An epoch is a permutation of all rows; the
    tail of a shard that fills no row is left out."""

    def __init__(self, cfg, folder=None, part=0, parts=1):
        super().__init__(cfg, folder, part, parts)
        if cfg.loss_on == "target":
            raise ValueError(f"LOSS_ON=target: {self.folder} holds text, which has no target; choose LOSS_ON=all")
        T = cfg.train_seq_len
        self.val_size = min(cfg.val_tokens or math.inf, sum(map(len, self.val)))
        if self.val_size < T + 1:
            raise ValueError(f"the val split of {cfg.data_path} has {self.val_size} tokens (VAL_TOKENS={cfg.val_tokens}), fewer than a row of "
                             f"TRAIN_SEQ_LEN={T} and its last target; lower TRAIN_SEQ_LEN or make a larger split")
        self.first_row = np.cumsum([0] + [(len(tokens) - 1) // T for tokens in self.train])  # of each shard; last: all rows
        if not self.first_row[-1]:
            raise ValueError(f"no train shard of {cfg.data_path} holds a row of TRAIN_SEQ_LEN={T} tokens; lower it")
        self.epoch = functools.lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([cfg.seed, epoch]).permutation(int(self.first_row[-1])))
        self.least_micro_batches = 1  # micro-batches of a step and rank, where the config leaves it open
        self.about = f"{sum(map(len, self.train)):,} train tokens"

    def check_micro_batch(self, share):
        """Rows of text fit every micro-batch."""

    def batch(self, step, rows, first_row, count):
        """Rows first_row.. of the `rows` rows of this step's global batch: idx and targets, int64 CPU tensors (count, T)."""
        T, total = self.cfg.train_seq_len, int(self.first_row[-1])
        out = np.empty((count, T + 1), dtype=np.int64)
        for i in range(count):
            epoch, n = divmod(step * rows + first_row + i, total)
            row = int(self.epoch(epoch)[n])
            shard = bisect.bisect_right(self.first_row, row) - 1
            start = (row - int(self.first_row[shard])) * T
            out[i] = self.train[shard][start:start + T + 1]
        out = torch.from_numpy(out)
        return out[:, :-1].contiguous(), out[:, 1:].contiguous()

    def read(self, step, share, term, fraction=1.0):
        """This rank's micro-batches of a step, a list of Batch, with the term's views or without; and what the whole step
        costs, all ranks: (tokens, visible (query, key) pairs), for GPT.flops. fraction: of the rows, evenly spread over the
        global batch, so that the term's own pass depends on neither ranks nor accumulation."""
        T = self.cfg.train_seq_len
        chosen = spread(max(1, round(fraction * share.rows)), share.rows)
        idx, targets = self.batch(step, share.rows, share.first_row, share.local_rows)
        parts = [idx, targets, *(draw_spans(self.cfg, self, share, step, idx, chosen) if term else ())]
        kept = -(-share.micro_rows * int(chosen.sum()) // share.rows)  # rows of a micro-batch: at most so many are chosen
        if kept < share.micro_rows:  # the chosen rows first; what is behind them has weight 0
            own = torch.from_numpy(chosen[share.first_row:share.first_row + share.local_rows]).view(-1, share.micro_rows)
            order = own.int().argsort(dim=1, descending=True, stable=True)[:, :kept]
            rows = (order + torch.arange(len(own))[:, None] * share.micro_rows).flatten()
            parts = [x[rows] for x in parts]
        batches = [Batch(i, t, share.rows * T, views=tuple(views) or None) for i, t, *views in zip(*(x.split(kept) for x in parts))]
        tokens = share.rows // share.micro_rows * kept * T
        return batches, (tokens, tokens * (T + 1) // 2)

    load = read  # for the next step of a run: reading ahead isn't worth it here

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

    def val_batches(self, share):
        """Yield (fraction done after it, Batch) over this rank's part of the val split, all of one shape."""
        windows, rows = itertools.islice(self.val_windows(), share.rank, None, share.world_size), share.micro_rows
        count = self.val_size / (self.cfg.eval_stride or self.cfg.train_seq_len)
        for n in itertools.count(1):
            window = list(itertools.islice(windows, rows))
            if not window:
                return
            idx, targets = (torch.from_numpy(np.stack(t)) for t in zip(*window))
            missing = rows - len(window)  # one shape, one graph
            yield min(1, n * rows * share.world_size / count), Batch(torch.nn.functional.pad(idx, (0, 0, 0, missing)),
                                                                     torch.nn.functional.pad(targets, (0, 0, 0, missing), value=-1))


def draw_spans(cfg, data, share, step, idx, chosen=None):
    """Spans of this rank's rows idx: a, b, start, end and weight, each (local rows, S), the weight being 1 / spans in the
    chosen rows (all) of the global batch, or 0. chosen: booleans (rows,).

    Their generator is seeded by seed and step alone, so a run that starts the term late draws the same.
    """
    *positions, weight = jepa.sample_spans(
        idx, span_generator(cfg.seed, step), spans=cfg.jepa_spans, max_span_frac=cfg.jepa_max_span_frac,
        doc_token=data.doc_token if cfg.jepa_doc else None, total_rows=share.rows, first_row=share.first_row)
    if chosen is not None:
        weight = weight * torch.from_numpy(chosen[share.first_row:share.first_row + share.local_rows])[:, None]
    count = weight.sum()
    if share.world_size > 1:
        dist.all_reduce(count)  # a CPU tensor: over gloo, so the GPU is not waited for
    return *positions, weight / count.clamp(min=1)


def span_generator(seed, step):
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class ExampleSet:
    """The examples of one split: views of texts, token arrays, in groups. One example is marker, view, separator, view, ..."""

    def __init__(self, shards, marker, separator, split):
        self.tokens = tokens = np.concatenate(shards)
        bounds = np.flatnonzero((tokens == marker) | (tokens == separator))
        self.start, self.length = bounds + 1, np.diff(bounds, append=len(tokens)) - 1
        self.first = np.append(np.flatnonzero(tokens[bounds] == marker), len(bounds))  # the first view of each example
        if len(bounds) == 0 or bounds[0] or tokens[0] != marker or self.length.min() < 1:
            raise ValueError(f"the {split} shards hold no examples of non-empty views; remove the folder and make the data again with data/pairs.py")

    def __len__(self):
        return len(self.first) - 1

    def views(self, example):
        """The tokens of an example's views, lists."""
        return [self.tokens[self.start[v]:self.start[v] + self.length[v]].tolist() for v in range(self.first[example], self.first[example + 1])]

    def counts(self):
        """Views of each example."""
        return np.diff(self.first)

    def keep(self, chosen):
        """Drop the examples not in chosen, a boolean array."""
        views = np.repeat(chosen, self.counts())
        first = np.concatenate(([0], np.cumsum(self.counts()[chosen])))
        self.start, self.length, self.first = self.start[views], self.length[views], first


class PairData(Shards):
    """Pairs (Text, Code) or groups of paraphrases, packed as jepa.lay_out and jepa.pack say.

    A step is the set of examples whose trunks begin within its TRAIN_BATCH_TOKENS of the epochs' trunk tokens, so its
    examples depend on SEED alone, and the term's settings only on how many micro-batches they fill. An epoch is a
    permutation of all examples.
    """

    def __init__(self, cfg, folder=None, part=0, parts=1):
        super().__init__(cfg, folder, part, parts)
        self.read_examples(cfg)

    def read_examples(self, cfg):
        """Find the examples in the shards, and what a row can't hold."""
        self.cfg, self.paired = cfg, self.meta["kind"] == "pairs"
        if self.cfg.loss_on == "target" and not self.paired:
            raise ValueError(f"LOSS_ON=target: {self.folder} holds groups of paraphrases, which have no target; choose LOSS_ON=all")
        self.separator, first_pred = self.meta["separator"], self.meta["first_pred"]
        self.token_table += [b""] * (self.separator + 1 - len(self.token_table))
        self.token_table[self.separator] = b"\n"  # as a text sample shows it
        self.preds = list(range(first_pred, first_pred + cfg.jepa_pred_tokens))
        self.extra = 3 if self.paired else 2  # tokens of a trunk that are no view's: markers and separator
        if cfg.train_seq_len < self.extra + jepa.MAX_PRED_TOKENS + 3:
            raise ValueError(f"TRAIN_SEQ_LEN={cfg.train_seq_len}: pairs data needs rows of at least {self.extra + jepa.MAX_PRED_TOKENS + 3} tokens")
        self.warnings, self.sets = [f"EVAL_STRIDE={cfg.eval_stride} is not used: pairs and groups are evaluated whole"] if cfg.eval_stride else [], {}
        if self.meta["first_pred"] + jepa.MAX_PRED_TOKENS > self.vocab_size:
            raise ValueError(f"VOCAB_SIZE={cfg.vocab_size}: the tokens of {self.folder} need {self.meta['first_pred'] + jepa.MAX_PRED_TOKENS}")
        self.least_micro_batches = 8  # so that on average at most a 16th of a step's rows is empty
        for split in ("train", "val"):
            self.sets[split] = ExampleSet(getattr(self, split), self.doc_token, self.separator, split)
            views = self.sets[split].counts()
            if not (views == 2).all() if self.paired else (views < 2).any():
                raise ValueError(f"the {split} shards of {self.folder} don't hold {self.meta['kind']}; remove the folder and make the data again with data/pairs.py")
            self.fit_rows(split)
        if cfg.val_tokens:
            self.sets["val"].keep(np.cumsum(self.trunks("val")) <= max(cfg.val_tokens, self.trunks("val")[0]))
        self.trunk_tokens = int(self.trunks("train").sum())
        self.val_size = len(self.sets["val"])
        documents = self.trunks("train") if self.paired else self.sets["train"].length + self.extra
        self.smallest = int(documents.min())  # of what holds a pair, or a span
        self.epoch = functools.lru_cache(maxsize=2)(self.shuffle)  # a step may lie in two epochs
        self.thread, self.ahead, self.in_window = ThreadPoolExecutor(1), None, True
        self.about = (f"{len(self.sets['train']):,} {self.meta['kind']} to train on, {self.trunk_tokens:,} trunk tokens: "
                      f"{self.trunk_tokens / cfg.train_batch_tokens:.1f} steps an epoch; {self.val_size:,} to validate on")
        if cfg.jepa_lambda and cfg.jepa_objective == "pair":
            examples = [self.sets["train"].views(e) for e in self.examples_of(0)]
            plain, with_term = (sum(len(d) for views in examples for d in self.lay_out(views, term).documents) for term in (False, True))
            self.about += f"; the term encodes {with_term / plain - 1:.0%} more tokens"

    def trunks(self, split):
        """Trunk tokens of each example: those that the cross entropy is about."""
        s = self.sets[split]
        views = np.add.reduceat(s.length, s.first[:-1])
        return views + self.extra * (1 if self.paired else s.counts())

    def longest_documents(self, split):
        """Tokens of each example's longest document, with as many [PRED] tokens as there can be."""
        s = self.sets[split]
        return (np.add if self.paired else np.maximum).reduceat(s.length, s.first[:-1]) + self.extra + jepa.MAX_PRED_TOKENS

    def fit_rows(self, split):
        """Find the examples that a row can't hold, even with the most [PRED] tokens so that all arms agree, and stop, skip or truncate."""
        s, longest = self.sets[split], self.longest_documents(split)
        room, needed = self.cfg.train_seq_len - self.extra - jepa.MAX_PRED_TOKENS, longest.max()
        long = longest > self.cfg.train_seq_len
        if not long.any():
            return
        found = f"{long.sum():,} of {len(s):,} {split} examples of {self.folder} don't fit a row of TRAIN_SEQ_LEN={self.cfg.train_seq_len}"
        if self.cfg.long_examples == "stop":
            raise ValueError(f"{found}: choose LONG_EXAMPLES=skip or truncate, or TRAIN_SEQ_LEN={needed}")
        if self.cfg.long_examples == "skip":
            s.keep(~long)
            if not len(s):
                raise ValueError(f"{found}, so none is left: raise TRAIN_SEQ_LEN to {needed}")
            self.warnings.append(f"{found}: skipped (LONG_EXAMPLES)")
        else:  # the tail of the longer view goes; the end token stays
            if self.paired:
                text, code = s.length[0::2], s.length[1::2]
                text[:] = np.where(long, np.minimum(text, np.maximum(room - code, room // 2)), text)
                code[:] = np.where(long, np.minimum(code, room - text), code)
            else:
                np.minimum(s.length, room, out=s.length)
            self.warnings.append(f"{found}: truncated (LONG_EXAMPLES)")

    def check_micro_batch(self, share):
        """ValueError where an example, in any layout a setting of the term can give it, doesn't fit an empty micro-batch: the
        same for all arms, before the run, and not in the middle of it."""
        R, T, most = share.micro_rows, self.cfg.train_seq_len, jepa.MAX_PRED_TOKENS

        @functools.cache
        def packs(*lengths):  # every layout, as first fit may fail on documents no longer than others that it places
            views = [[0] * n for n in lengths]
            try:
                for k, front, reverse in itertools.product(range(most + 1), (False, True), (False, True)):
                    jepa.pack([jepa.lay_out(views, paired=self.paired, marker=0, separator=0, preds=[0] * k, front=front, reverse=reverse)], R, T)
            except ValueError:
                return False
            return True

        for split, s in self.sets.items():
            total = 2 * (np.add.reduceat(s.length, s.first[:-1]) + (self.extra + most) * s.counts())  # at most
            room = np.maximum(T, R * (T - self.longest_documents(split)))  # first fit leaves nothing over up to there
            for e in np.flatnonzero(total > room):
                if not packs(*s.length[s.first[e]:s.first[e + 1]].tolist()):
                    raise ValueError(f"a micro-batch of {R} rows of {T} tokens is too small for {split} example {e + 1} of {self.folder} with the most "
                                     "[PRED] tokens; lower GRAD_ACCUM_STEPS, or raise TRAIN_BATCH_TOKENS or TRAIN_SEQ_LEN")

    def shuffle(self, epoch):
        """(permutation of the train examples, where their trunks begin in the epoch)."""
        order = np.random.default_rng([self.cfg.seed, epoch]).permutation(len(self.sets["train"]))
        trunks = self.trunks("train")[order]
        return order, np.cumsum(trunks) - trunks

    def examples_of(self, step):
        """The examples of a step, as indices into the train set."""
        size, total = self.cfg.train_batch_tokens, self.trunk_tokens
        begin, end, found = step * size, (step + 1) * size, []
        for epoch in range(begin // total, (end - 1) // total + 1):
            order, starts = self.epoch(epoch)
            found += order[slice(*np.searchsorted(starts, (begin - epoch * total, end - epoch * total)))].tolist()
        return found

    def lay_out(self, views, term):
        """The jepa.Example of these views; term: with what JEPA_OBJECTIVE=pair encodes besides the trunk."""
        cfg = self.cfg
        return jepa.lay_out(views, paired=self.paired, marker=self.doc_token, separator=self.separator, preds=self.preds,
                            front=cfg.jepa_pred_position == "front", reverse=cfg.jepa_reverse, target_only=cfg.loss_on == "target", term=term)

    def load(self, step, share, term, fraction=1.0):
        """What read returns, for the next step of a run: the one after that is packed in a thread meanwhile."""
        asked = step, share, term, fraction
        result = self.ahead[1].result() if self.ahead and self.ahead[0] == asked else self.read(*asked)
        cfg, kept = self.cfg, lambda n: bool(self.cfg.jepa_lambda) and jepa.keeps_term(self.cfg.seed, n, self.cfg.jepa_ratio)
        if cfg.jepa_update == "coupled":  # a guess: at worst it is packed again
            asked = step + 1, share, term if cfg.jepa_ratio == 1 else kept(step + 1), 1.0
        elif term:  # a step without the term, then the term's own pass
            self.in_window, asked = True, (step + 1, share, False, 1.0)
        else:  # after a step that went without its pass there will be none for a while: JEPA_START_FRAC, JEPA_END_FRAC
            self.in_window = self.in_window and (self.ahead is None or self.ahead[0][2] is False)
            asked = (step, share, True, cfg.jepa_rows_frac) if kept(step) and self.in_window else (step + 1, share, False, 1.0)
        self.ahead = asked, self.thread.submit(self.read, *asked)
        return result

    def read(self, step, share, term, fraction=1.0):
        """As TokenData.read: here every rank packs the whole step, and fills its own micro-batches, one of the ranks in turn.
        fraction: of the examples. A function of its arguments alone."""
        cfg, T = self.cfg, self.cfg.train_seq_len
        pair, chosen = term and cfg.jepa_objective == "pair", np.array(self.examples_of(step))
        chosen = chosen[spread(max(1, round(fraction * len(chosen))), len(chosen))].tolist()
        examples = [self.lay_out(self.sets["train"].views(e), pair) for e in chosen]
        placed = jepa.pack(examples, share.micro_rows, T)
        batches, cost = self.fill(examples, placed, share)
        if term:
            views = self.pair_indices(chosen, examples, placed, share) if pair else self.span_indices(examples, placed, share, step)
            for batch, own in zip(batches, views):
                batch.views = own
        return batches, cost

    def fill(self, examples, placed, share):
        """This rank's micro-batches of packed examples, and the cost of all, as load returns them."""
        R, T = share.micro_rows, self.cfg.train_seq_len
        held = [([], []) for _ in range(self.rounds(placed, share) * share.world_size)]  # per micro-batch, documents and places
        for example, (m, places) in zip(examples, placed):
            held[m][0].extend(example.documents)
            held[m][1].extend(places)
        padding, visible, num_targets = np.full((len(held), R), T), 0, 0
        for m, (documents, places) in enumerate(held):
            for document, (row, column) in zip(documents, places):
                padding[m, row] -= len(document)
                visible += document.visible_pairs()
                num_targets += len(document.loss_on)
        batches = []
        for documents, places in held[share.rank::share.world_size]:
            i, t, p, e = map(torch.from_numpy, jepa.write_rows(documents, places, R, T, self.doc_token))
            batches.append(Batch(i, t, torch.tensor(float(num_targets)), p, e))
        return batches, (padding.size * T, int(visible + (padding * (padding + 1) // 2).sum()))

    @staticmethod
    def rounds(placed, share):
        """Micro-batches of each rank: the same number, the last ones may be empty."""
        return -(-(max(m for m, _ in placed) + 1) // share.world_size)

    def pair_indices(self, groups, examples, placed, share):
        """views of each of this rank's micro-batches: places a and b in all rows, weight 1 / pairs of the step or 0, and group,
        the example's of `groups`, each (N,)."""
        R, T = share.micro_rows, self.cfg.train_seq_len
        total = sum(len(e.pairs) for e in examples)
        found = {}
        for group, example, (m, places) in zip(groups, examples, placed):
            where = [row * T + column for row, column in places]
            found.setdefault(m, []).extend((where[i] + p, where[j] + q, group) for (i, p), (j, q) in example.pairs)
        for n in range(self.rounds(placed, share)):
            own = found.get(n * share.world_size + share.rank, [])
            table = np.zeros((max(len(own), R * (T // self.smallest)), 3), dtype=np.int64)  # training examples never exceed it: one shape
            table[:len(own)] = np.array(own).reshape(-1, 3)
            weight = torch.zeros(len(table))
            weight[:len(own)] = 1 / total
            a, b, group = torch.from_numpy(table).T.contiguous()
            yield a, b, weight, group

    def span_indices(self, examples, placed, share, step):
        """views of each of this rank's micro-batches for spans: a, b, start, end and weight, (R, S a trunk)."""
        cfg, R, T = self.cfg, share.micro_rows, self.cfg.train_seq_len
        trunks = [(m, row, column, len(d)) for e, (m, places) in zip(examples, placed) for d, (row, column) in zip(e.documents, places)]
        m, row, start, length = (torch.tensor(x)[:, None].expand(-1, cfg.jepa_spans) for x in zip(*trunks))
        uniform = torch.rand(*start.shape, 2, generator=span_generator(cfg.seed, step), dtype=torch.float64)
        a, b = jepa.place_spans(uniform, start, start + length - 1, cfg.jepa_max_span_frac)
        spans = torch.stack((a, b, start, start + length - 1)).flatten(1)
        m, row = m.flatten(), row.flatten()
        for n in range(self.rounds(placed, share)):
            table = torch.zeros(4, R, cfg.jepa_spans * (T // self.smallest), dtype=torch.long)
            table[:2] = 1  # absent ones: valid indices, of no weight
            weight = torch.zeros(table.shape[1:])
            for r in range(R):
                own = spans[:, (m == n * share.world_size + share.rank) & (row == r)]
                table[:, r, :own.size(1)], weight[r, :own.size(1)] = own, 1 / spans.size(1)
            yield *table, weight

    def val_batches(self, share):
        """As TokenData.val_batches: the trunks of the val examples."""
        size = len(self.sets["val"])
        for first in range(0, size, VAL_WINDOW):
            last = min(size, first + VAL_WINDOW)
            examples = [self.lay_out(self.sets["val"].views(e), False) for e in range(first, last)]
            batches, _ = self.fill(examples, jepa.pack(examples, share.micro_rows, self.cfg.train_seq_len), share)
            for n, batch in enumerate(batches, 1):
                yield (first + (last - first) * n / len(batches)) / size, batch


def meta_of(folder):
    """The meta.json of a data folder, None where it has none; ValueError where there is no folder or it can't be trusted."""
    if not folder.is_dir():
        raise ValueError(f"DATA_PATH={folder}: no such folder; make one with a script in data/ (README, Data)")
    if os.path.lexists(folder / "meta.json"):
        return read_meta(folder)
    if os.path.lexists(folder / "tokenizer.tiktoken"):  # as the scripts in data/ call it: pairs would be read as text
        raise ValueError(f"{folder}: its meta.json is missing; remove the folder and make the data again (data/fineweb.py only adds what is missing)")
    return None


def open_data(cfg):
    """The TokenData or PairData of a run; prepares an embedded data set where DATA_PATH names one that is missing, once a node."""
    embedded = cfg.data_path in EMBEDDED_DATA
    folder = ROOT / cfg.data_path if embedded else Path(cfg.data_path)
    rank, local_rank, local_world_size = (int(os.environ.get(name, default)) for name, default in
                                          (("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    for first in (rank == 0, local_rank == 0):  # the nodes may share a disk: then the first rank has done it for all
        if embedded and first and not folder.exists():
            from data import nlregex, stdlib
            script = stdlib if cfg.data_path == "data/stdlib" else nlregex
            print(f"no data on disk: preparing {cfg.data_path}: {script.__doc__.splitlines()[0]}", flush=True)
            script.prepare_default(folder)
        if dist.is_initialized():
            dist.barrier()
    meta = meta_of(folder)
    paired = meta is not None and "kind" in meta
    if (cfg.jepa_lambda or cfg.diag_every) and cfg.jepa_objective == "pair" and not paired:
        raise ValueError(f"JEPA_OBJECTIVE=pair: {cfg.data_path} holds text; it needs pairs or groups of texts, made by data/pairs.py or data/nlregex.py")
    return (PairData if paired else TokenData)(cfg, folder, local_rank, local_world_size)
