"""Records of messages or paraphrases, as the Examples that are trained on.

A record becomes Texts, which know of no objective; the objective makes an Example of them.
"""

import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import random
from pathlib import Path
from typing import NamedTuple

from nanojepa.files import progress
from nanojepa.objectives.step import find_steps
from nanojepa.packing import Document, Example, Texts, View
from nanojepa.readers import TEST, TRAIN, open_dataset
from nanojepa.records import full_views, read_dataset, read_examples, seen_in_train
from nanojepa.texts import remove_thinking


class Source(NamedTuple):
    """Where records come from, and the records."""

    name: str
    records: list


class Prepared(NamedTuple):
    """Examples, and their counts {what: number}; summary: the counts as one line."""

    examples: list
    counts: dict
    summary: str


# ---- one record


def lay_out(record, chat, data, objective=None):
    """The Example of a record, or None if max_length leaves no label of it.

    data: the settings of the section dataset. Without an objective there is no term. ValueError
    names the record's line.
    """
    texts_of = paraphrases if record.kind == "groups" else messages
    try:
        texts = texts_of(record, chat, data)
        if texts is None:
            return None
        example = Example(texts.documents) if objective is None else objective.layout(texts)
        example.cut = texts.cut
        return example
    except ValueError as e:
        raise ValueError(f"line {record.line}: {e}") from None


def paraphrases(record, chat, data):
    """The Texts of a group: each text is a document of its own, and means the same as the next."""
    whole, room = [chat.encode(text) for text in record.views], data.max_length - 2
    texts = [text[:room] for text in whole]
    end = chat.tokenizer.eos_token_id
    views = [View([chat.start, *text], 1, [end], n) for n, text in enumerate(texts)]
    return Texts(
        [Document([chat.start, *text, end], range(1, len(text) + 2)) for text in texts],
        meaning=list(itertools.pairwise(views)),
        regions=[((n, 1), (n, len(text))) for n, text in enumerate(texts)],
        longest=data.max_length,
        cut=texts != whole,
    )


def messages(record, chat, data):
    """The Texts of a conversation, whose answer is trained; None if max_length leaves no label."""
    user, assistant = record.views
    if data.remove_thinking:
        assistant = remove_thinking(assistant)
        if not assistant:
            raise ValueError(
                "remove_thinking leaves nothing of the assistant's text; mend it, or set "
                "dataset.remove_thinking: false"
            )
    turns = chat.conversation(record.system, user, assistant)
    trunk = turns.tokens[: data.max_length]
    labels = range(1, len(trunk))
    if not data.train_all:
        labels = range(turns.labels.start, min(turns.labels.stop, len(trunk)))
    if not labels:
        return None
    last = min(turns.assistant[-1], len(trunk) - 1)
    return Texts(
        [Document(trunk, labels)],
        meaning=meaning(chat, turns, user, assistant, data.views),
        regions=[((0, turns.user[0]), (0, last))],
        longest=data.max_length,
        steps=functools.partial(first_steps, chat, turns),
        cut=trunk != turns.tokens,
    )


def meaning(chat, turns, user, assistant, views):
    """The pair of Views of a conversation: the user's text, and the assistant's.

    It is a generator, since most objectives need no views, and a template may refuse them.
    """
    if views == "prefix":
        a = View(turns.tokens[: turns.user.stop], turns.user[0], turns.user_tail, document=0)
        answer = turns.tokens[turns.assistant.start : turns.assistant.stop]
        yield a, View([chat.start, *answer], 1, turns.assistant_tail)
        return
    a, b = chat.turns([("user", user)]), chat.turns([("assistant", assistant)])
    # A conversation that begins with view A encodes it anyway.
    turn = [*a.tokens[: a.user.stop], *a.user_tail]
    begins = turns.tokens[: len(turn)] == turn
    yield (
        View(a.tokens[: a.user.stop], a.user[0], a.user_tail, document=0 if begins else None),
        View(b.tokens[: b.assistant.stop], b.assistant[0], b.assistant_tail),
    )


def first_steps(chat, turns):
    """The Views of the first two steps of the assistant's text, [] if it has fewer.

    Each step keeps the blank line that ends it. Step 1 is a part of the conversation.
    """
    ends = find_steps(turns.said)
    if ends is None:
        return []
    first = turns.holding(turns.said_at, turns.said_at + ends.first)
    second = chat.encode(turns.said[ends.first : ends.second])
    return [
        View(turns.tokens[: first.stop], first.start, document=0),
        View([chat.start, *second], 1),
    ]


# ---- all records


def read_records(name, data, limit, split="", order=TRAIN, key="dataset.train_split"):
    """The records of a file or a Hugging Face dataset, at most `limit` (0: all).

    split, order, key: as for open_dataset().
    """
    options = {"bad": data.bad, "limit": limit or None}
    options["columns"] = tuple(data.columns.split(",")) if data.columns else None
    if Path(name).is_file():
        records = read_examples(name, **options)
    else:
        dataset = open_dataset(name, data.config_name, split, order, data.cache_dir, key)
        records = read_dataset(dataset, name, **options)
    if records[0].kind == "groups" and not (data.plain and data.train_all):
        raise ValueError(
            f"{name}: paraphrases have no user and assistant; give dataset.plain and train_all "
            "(--plain --trainall)"
        )
    return records


def read_sources(data):
    """{"train": Source, "eval": Source}; the latter may have no records."""
    if data.data_file:
        records = read_records(data.data_file, data, 0, data.train_split)
        random.Random(data.split_seed).shuffle(records)
        size = round(data.eval_split * len(records))
        train = Source(data.data_file, records[size:][: data.max_items or None])
        evaluated = Source(data.data_file, records[:size][: data.max_eval_items or None])
        return {"train": train, "eval": evaluated}
    records = read_records(data.train_file, data, data.max_items, data.train_split)
    train, evaluated = Source(data.train_file, records), Source(data.eval_file, [])
    if data.eval_file:
        limit, split, key = data.max_eval_items, data.test_split, "dataset.test_split"
        records = read_records(data.eval_file, data, limit, split, TEST, key)
        evaluated = Source(data.eval_file, records)
    return {"train": train, "eval": evaluated}


def prepare(source, chat, data, objective=None):
    """The Prepared records of a Source; ValueError names the line of a record that can't be."""
    task = functools.partial(lay_out, chat=chat, data=data, objective=objective)
    count = len(source.records)
    processes = data.tokenize_num_proc or min(os.cpu_count() or 1, -(-count // 1000))
    laid_out = map(task, source.records)
    try:
        with contextlib.ExitStack() as stack:
            if processes > 1:
                # The task goes to each process once, not with every chunk: it holds a tokenizer.
                pool = stack.enter_context(multiprocessing.Pool(processes, set_task, [task]))
                laid_out = pool.imap(run_task, source.records, data.tokenize_batch_size)
            examples = list(progress(laid_out, f"tokenising {source.name}", total=count))
    except ValueError as e:
        raise ValueError(f"{source.name}, {e}") from None
    whole = [example for example in examples if example is not None]
    if not whole:
        raise ValueError(
            f"{source.name}: no example has a label left; "
            f"raise dataset.max_length={data.max_length}"
        )
    counts = count_examples(whole, count - len(whole), source.records, chat)
    return Prepared(whole, counts, summarize(source.name, whole, counts))


def set_task(task):
    run_task.task = task


def run_task(item):
    return run_task.task(item)


def count_examples(examples, skipped, records, chat):
    """{what: number} of Examples, and of the records that they came from."""
    documents = [document for example in examples for document in example.documents]
    texts = ("\n".join([record.system or "", *record.views]) for record in records)
    return {
        "examples": len(examples),
        "tokens": sum(map(len, documents)),
        "trained": sum(len(document.loss_on) for document in documents),
        "cut": sum(example.cut for example in examples),
        "skipped": skipped,
        "without_term": sum(bool(example.no_term) for example in examples),
        "control_tokens": sum(bool(chat.control.search(text)) for text in texts),
    }


def summarize(name, examples, counts):
    """A line of the counts, with the reasons why examples have no term."""
    mean = counts["tokens"] / len(examples)
    parts = [f"{name}: {len(examples):,} examples, {mean:.1f} tokens on average"]
    if counts["cut"]:
        parts.append(f"{counts['cut']:,} cut to max_length")
    if counts["skipped"]:
        parts.append(f"{counts['skipped']:,} dropped: no label left by max_length")
    if counts["control_tokens"]:
        parts.append(
            f"{counts['control_tokens']:,} with the spelling of a control token, encoded as plain "
            "text"
        )
    reasons = collections.Counter(e.no_term for e in examples if e.no_term)
    parts += [f"{n:,} without a JEPA term: {reason}" for reason, n in sorted(reasons.items())]
    return "; ".join(parts)


def count_duplicates(train, evaluated):
    """How many eval records have a user's text, or a paraphrase, that stands in train."""
    kinds = {source.records[0].kind if source.records else "" for source in (train, evaluated)}
    if len(kinds) > 1:
        return 0
    kind = kinds.pop()
    sides = [[full_views(r, True) for r in s.records] for s in (train, evaluated)]
    return sum(any(seen[:1] if kind == "pairs" else seen) for seen in seen_in_train(*sides, kind))


def notes(source, chat):
    """Lines on what else a user may not expect of these records."""
    if not chat.takes_system and any(record.system for record in source.records):
        yield (
            "the chat template takes no system message; each stands at the beginning of the "
            "user's text"
        )
