"""Records of messages as packed trees: what is encoded of an example, in which order, and what is compared.

A record is (line number, kind, system text or None, views), as data/pairs.py reads it; cfg a finetune.Config. Shapes: R rows of
T tokens, N pairs of views.
"""
import functools
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset

import jepa
from chat import remove_thinking
from data.pairs import parse, read, read_jsonl

BLANK_LINE = re.compile(r"\r?\n[ \t]*\r?\n\s*")
MAX_SPAN_FRAC = 0.5  # as JEPA_MAX_SPAN_FRAC


@dataclass
class View:
    """A text to take a state of: the tokens up to its end, where in them it begins, and what closes its turn.

    document: the one of the example that begins with these tokens, or None.
    """
    tokens: list
    first: int
    tail: list
    document: int | None = None


def lay_out(chat, cfg, preds, kind, system, views):
    """(jepa.Example of one record, why it has no JEPA term or ""); the example is None where no label is left of it.

    preds: ids of the [PRED] tokens. The pair of a span is the first and the last token that it may lie between.
    """
    d, t = cfg.dataset, cfg.training
    if kind == "groups":  # paraphrases: each is a document, and predicts the next
        texts = [chat.encode(text)[:d.max_length - 2] for text in views]
        example = jepa.Example([jepa.Document([chat.start, *text, chat.tokenizer.eos_token_id], range(1, len(text) + 2)) for text in texts])
        sides = [View([chat.start, *text], 1, [chat.tokenizer.eos_token_id], i) for i, text in enumerate(texts)]
        return example, connect(example, zip(sides, sides[1:]), cfg, preds) if cfg.ratio else ""
    user, assistant = views
    turns = chat.conversation(system, user, assistant)
    trunk = turns.tokens[:d.max_length]
    loss_on = range(1 if d.train_all else turns.assistant[0], len(trunk))
    if not loss_on:
        return None, ""
    example = jepa.Example([jepa.Document(trunk, loss_on)])
    if not cfg.ratio:
        return example, ""
    if t.span:
        ends = turns.user[0], min(turns.assistant[-1], len(trunk) - 1)
        if ends[1] - ends[0] < 2:
            return example, "cut off by max_length"
        example.pairs.append(((0, ends[0]), (0, ends[1])))
        return example, ""
    if t.step_jepa:
        sides = steps(chat, turns)
        if sides is None:
            return example, "fewer than two steps"
    elif d.views == "prefix" or d.plain:
        sides = (View(turns.tokens[:turns.user[-1] + 1], turns.user[0], turns.user_tail, 0),
                 View([chat.start, *(turns.tokens[n] for n in turns.assistant)], 1, turns.assistant_tail))
    else:
        a, b = chat.alone("user", user), chat.alone("assistant", assistant)
        sides = (View(a.tokens[:a.user[-1] + 1], a.user[0], a.user_tail), View(b.tokens[:b.assistant[-1] + 1], b.assistant[0], b.assistant_tail))
    return example, connect(example, [sides], cfg, preds)


def steps(chat, turns):
    """The Views of the first two steps of the assistant's text, each with the blank line that ends it; None where it has no two."""
    text = turns.said
    ends = [m.end() for m in BLANK_LINE.finditer(text) if text[:m.start()].strip() and text[m.end():].strip()]
    if not ends:
        return None
    _, (step,) = chat.encode_places(text, [(0, ends[0])])
    first = turns.assistant[0]
    second = text[ends[0]:ends[1] if len(ends) > 1 else None]
    return View(turns.tokens[:first + len(step)], first, [], 0), View([chat.start, *chat.encode(second)], 1, [])


def connect(example, ways, cfg, preds):
    """Let view a predict view b for each of these pairs of Views; why one can't, or ""."""
    t, longest = cfg.training, cfg.dataset.max_length

    def place(view, preds=()):
        """(tokens, or the place of the state in a document, what continues it) of a view."""
        if t.front_pred and preds:
            view, preds = View(view.tokens[:view.first] + list(preds) + view.tokens[view.first:], view.first, view.tail), ()
        turn = [*view.tokens, *preds, *view.tail]
        at = len(turn) + t.last_token if t.last_token and not t.step_jepa else len(view.tokens) + len(preds) - 1
        if not 0 <= at:
            raise ValueError(f"training.last_token={t.last_token}: a view has {len(turn)} tokens; count fewer from its end")
        if view.document is None:
            return turn[:at + 1], ()
        if at < len(view.tokens) or not preds:
            return (view.document, at), ()
        return (view.document, len(view.tokens) - 1), turn[len(view.tokens):at + 1]

    for a, b in ways:
        if t.reverse_pred:
            a, b = b, a
        (a, branch), (b, _) = place(a, preds), place(b)
        for view in (a, b):
            if (view[1] >= len(example.documents[view[0]].trunk) if isinstance(view, tuple) else len(view) > longest):
                return "a view is cut off by max_length"
        example.add_pair(a, b, branch)
    return ""


def pack(examples, span, filler, generator=None, rows_of=0):
    """The documents of these examples as one micro-batch, a dict of tensors.

    input_ids, labels (already shifted, -1: none), position_ids, ends: (R, T); views (2, N), or (4, N) for spans: indices into
    the R * T states; weight, group (N,), of weight 0 where there is no pair. rows_of: tokens of a row, 0: the longest document's.
    """
    documents = [d for e in examples for d in e.documents]
    T = rows_of or -(-max(map(len, documents)) // 8) * 8
    places = jepa.first_fit([len(d) for d in documents], np.full(len(documents), T), T)
    R = 1 + max(row for row, _ in places)
    R = 1 << (R - 1).bit_length() if rows_of else R  # few shapes, each of which FlexAttention compiles
    idx, targets, positions, ends = map(torch.from_numpy, jepa.write_rows(documents, places, R, T, filler))
    found, n = [], 0
    for group, e in enumerate(examples):
        where = [row * T + column for row, column in places[n:n + len(e.documents)]]
        found += [(where[i] + p, where[j] + q, group) for (i, p), (j, q) in e.pairs]
        n += len(e.documents)
    table = torch.tensor(found or [(0, 2, 0)]).T  # without any pair: one of weight 0, so that every process uses the same weights
    weight = torch.ones(table.size(1)) * bool(found)
    views = table[:2]
    if span:
        start, end = views
        a, b = jepa.place_spans(torch.rand(len(start), 2, generator=generator, dtype=torch.float64), start, end, MAX_SPAN_FRAC)
        views = torch.stack((a, b, start, end))
    return {"input_ids": idx, "labels": targets, "position_ids": positions, "ends": ends, "views": views, "weight": weight, "group": table[2]}


def read_records(source, cfg, split, limit):
    """[(line number, kind, system, views)] of a JSON-lines file or a Hugging Face dataset; ValueError says what is wrong where."""
    d = cfg.dataset
    if Path(source).is_file():
        records = read_jsonl(source, limit=limit or None)
    else:
        try:
            rows = load_dataset(source, d.config_name or None, split=d.train_split if d.train_split and split == "train" else split, cache_dir=d.cache_dir or None)
        except Exception as e:  # datasets raises many kinds
            raise ValueError(f"{source}: no such file, and no dataset ({' '.join(str(e).split())[:200]}); check the path, dataset.config_name and train_split") from None
        records = read(((n, functools.partial(parse, row)) for n, row in enumerate(itertools.islice(rows, limit or None), 1)), source, "stop")
    if records[0][1] == "groups" and not (d.plain and d.train_all):
        raise ValueError(f"{source}: paraphrases have no user and assistant; give dataset.plain and train_all (--plain --trainall)")
    if records[0][1] == "groups" and (cfg.training.step_jepa or cfg.training.span):
        raise ValueError(f"{source}: paraphrases are views of each other; step_jepa and span need messages")
    return records


def clean(row, enabled):
    """A record with remove_thinking done."""
    if enabled and row["kind"] == "pairs":
        row["views"] = [row["views"][0], remove_thinking(row["views"][1])]
        if not row["views"][1]:
            raise ValueError(f"line {row['line']}: remove_thinking leaves nothing of the assistant's text; mend it, or set dataset.remove_thinking: false")
    return row


def tokenise(batch, chat, cfg, preds):
    """Columns of laid-out examples, of columns of records."""
    columns = {"documents": [], "pairs": [], "lost": [], "cut": []}
    for line, kind, system, views in zip(*(batch[name] for name in ("line", "kind", "system", "views"))):
        try:
            example, lost = lay_out(chat, cfg, preds, kind, system, views)
        except ValueError as e:
            raise ValueError(f"line {line}: {e}") from None
        columns["lost"].append("no label left by max_length" if example is None else lost)
        columns["cut"].append(example is not None and any(len(d.trunk) == cfg.dataset.max_length for d in example.documents))
        columns["documents"].append([{"trunk": d.trunk, "loss_on": [d.loss_on.start, d.loss_on.stop], "branch": d.branch, "fork": d.fork} for d in example.documents]
                                    if example else [])
        columns["pairs"].append([[*a, *b] for a, b in example.pairs] if example else [])
    return columns


def prepare(records, source, chat, cfg, preds):
    """(the jepa.Examples of these records, the number of each one's record, a line that counts what was cut and what has no term)."""
    d, count = cfg.dataset, len(records)
    processes = lambda asked: most if (most := min(count, asked or min(os.cpu_count(), -(-count // 1000)))) > 1 else None
    table = Dataset.from_list([dict(zip(("line", "kind", "system", "views"), record)) for record in records])
    try:
        table = table.map(functools.partial(clean, enabled=d.remove_thinking), num_proc=processes(d.preprocess_num_proc), desc=f"cleaning {source}")
        table = table.map(functools.partial(tokenise, chat=chat, cfg=cfg, preds=preds), batched=True, batch_size=d.tokenize_batch_size,
                          num_proc=processes(d.tokenize_num_proc), remove_columns=table.column_names, desc=f"tokenising {source}")
    except ValueError as e:
        raise ValueError(f"{source}, {e}") from None
    kept = [n for n, documents in enumerate(table["documents"]) if documents]
    examples = [jepa.Example([jepa.Document(x["trunk"], range(*x["loss_on"]), x["branch"], x["fork"]) for x in row["documents"]],
                             [((a, p), (b, q)) for a, p, b, q in row["pairs"]]) for row in table if row["documents"]]
    if not examples:
        raise ValueError(f"{source}: no example has a label left; raise dataset.max_length={d.max_length}")
    lost, cut = [reason for reason in table["lost"] if reason], sum(table["cut"])
    counts = f"; {cut:,} as long as max_length, or cut to it" if cut else ""
    counts += "".join(f"; {lost.count(reason):,} {'dropped' if reason.startswith('no label') else 'without a JEPA term'}: {reason}" for reason in sorted(set(lost)))
    return examples, kept, f"{source}: {len(examples):,} examples, {sum(len(x) for e in examples for x in e.documents) / len(examples):.1f} tokens on average{counts}"
