"""Pairs of texts and groups of paraphrases: lines of JSON, and the token shards made of them.

A line is {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}, whose user
message is Text and whose assistant message is Code, or {"paraphrases": [text, text, ...]}. The
first line says of which kind a file is.

In a shard an example is marker, view, separator, view, and so on.
"""

import itertools
import json
import reprlib
import sys
from typing import NamedTuple

from nanojepa.files import numbered_lines, one_line, parse_line, progress, whole_folder, write_whole
from nanojepa.shards import digest, hold_out, read_meta, write_folder
from nanojepa.tokenizer import load_tokenizer, train_bpe

PRED_TOKENS = 10  # [PRED] tokens in the vocabulary of pairs; JEPA_PRED_TOKENS uses the first ones


class Record(NamedTuple):
    """One line: its number, "pairs" or "groups", the system message or None, and the texts.

    The views of a pair are Text and Code.
    """

    line: int
    kind: str
    system: str | None
    views: list

    def to_json(self):
        """The JSON object that parse reads as this record."""
        if self.kind == "groups":
            return {"paraphrases": self.views}
        roles = [] if self.system is None else [("system", self.system)]
        roles += zip(("user", "assistant"), self.views, strict=True)
        return {"messages": [{"role": role, "content": text} for role, text in roles]}


def jsonl(records):
    """The lines, bytes, that read_jsonl reads as these Records."""
    return "".join(json.dumps(record.to_json()) + "\n" for record in records).encode()


# ---- one line


def check_text(text, name):
    """The text; ValueError if it is none, or blank, or has no UTF-8 form."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is not a text")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a surrogate pair, which has no UTF-8 form") from None
    return text


def parse(line, obj):
    """The Record of the JSON in a line; ValueError says what is wrong with it."""
    if isinstance(obj, dict) and "paraphrases" in obj:
        texts = obj["paraphrases"]
        if not isinstance(texts, list) or len(texts) < 2:
            raise ValueError("paraphrases: a group needs at least two texts")
        views = [check_text(text, f"paraphrases[{i}]") for i, text in enumerate(texts)]
        return Record(line, "groups", None, views)
    messages = obj.get("messages") if isinstance(obj, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('neither {"messages": [...]} nor {"paraphrases": [...]}')
    roles = [message.get("role") for message in messages]
    if roles not in (["system", "user", "assistant"], ["user", "assistant"]):
        raise ValueError(
            f"roles {reprlib.repr(roles)}: there must be one user and one assistant message, after "
            "at most one system message"
        )
    system = messages[0].get("content") if len(messages) == 3 else None
    if system not in (None, ""):
        check_text(system, "system")
    views = [check_text(message.get("content"), message["role"]) for message in messages[-2:]]
    return Record(line, "pairs", system, views)


# ---- a file or a data set


def read_records(items, make, place, bad="stop"):
    """[make(number, item)] of numbered items, each of which makes one Record.

    bad: an item of which make raises ValueError stops it all, or is skipped ("skip"); either way
    it is named.
    """
    records, skipped = [], 0
    for number, item in items:
        try:
            records.append(make(number, item))
        except ValueError as error:
            if bad == "stop":
                raise ValueError(
                    f"{place}, line {number}: {error}; mend it, or skip such lines with --bad skip"
                ) from None
            skipped += 1
            print(f"{place}, line {number}: skipped: {error}", file=sys.stderr)
    if skipped:
        print(f"{place}: {skipped} of {skipped + len(records)} lines skipped", file=sys.stderr)
    if not records:
        raise ValueError(f"{place} holds no usable line")
    for record in records:
        if record.kind != records[0].kind:
            other = "paraphrases" if record.kind == "groups" else "messages"
            raise ValueError(
                f"{place}, line {record.line}: {other} among lines of the other kind; "
                "make a file of each"
            )
    return records


def read_jsonl(path, bad="stop", limit=None):
    """The Records of a file with a JSON object a line, of its first `limit` lines."""
    lines = itertools.islice(numbered_lines(path), limit)
    return read_records(lines, lambda n, line: parse(n, parse_line(line)), str(path), bad)


def open_dataset(source, name, split, cache_dir=None):
    """A Hugging Face dataset from the hub, downloaded once, or from a folder."""
    from datasets import load_dataset  # slow to import

    try:
        return load_dataset(source, name or None, split=split, cache_dir=cache_dir or None)
    except Exception as error:  # of many kinds: no such dataset, configuration, split, network
        raise ValueError(
            f"{source}: neither a file nor a dataset that can be loaded ({one_line(error)}); "
            "check its name, its configuration and its split"
        ) from None


def read_dataset(source, name, split, limit=None, cache_dir=None):
    """The Records of a Hugging Face dataset with a column messages or paraphrases."""
    rows = itertools.islice(open_dataset(source, name, split, cache_dir), limit)
    return read_records(enumerate(rows, 1), parse, source)


# ---- train and test


def split_examples(records, test_fraction):
    """(train, test), by the hash of the first view, so that copies of it are on one side."""
    digests = [digest(record.views[0]) for record in records]
    held_out = set(hold_out(digests, test_fraction)[0])
    if not held_out:
        raise ValueError("fewer than two different texts: there is nothing to split; give --test")
    train, test = [], []
    for record, own in zip(records, digests, strict=True):
        (test if own in held_out else train).append(record)
    return train, test


def seen_in_train(train, test, kind):
    """[[whether this view stands in train, for each view] for each example of test].

    train, test: lists of views. A text is compared with texts and a code with codes; a paraphrase
    with any.
    """
    if kind == "pairs":
        known = [set(side) for side in zip(*train, strict=True)]
        return [[v in side for v, side in zip(views, known, strict=True)] for views in test]
    known = {view for views in train for view in views}
    return [[view in known for view in views] for views in test]


def count_overlap(train, test, kind):
    """What meta.json says of test examples that stand in train; clean ones have no view there."""
    seen = seen_in_train(train, test, kind)
    overlap = {"examples": len(test)}
    if kind == "pairs":
        overlap["texts"], overlap["codes"] = (sum(side) for side in zip(*seen, strict=True))
    return overlap | {"clean": sum(not any(views) for views in seen)}


def full_views(record, keep_system):
    """The views of a record, the first with the system message before it if that is kept."""
    _, _, system, views = record
    if not keep_system or not system:
        return views
    return [f"{system}\n{views[0]}", *views[1:]]


def encode_views(views, encoding):
    """The tokens of an example; the separator is the token after the marker."""
    tokens = []
    for view in views:
        mark = encoding.n_vocab if tokens else encoding.eot_token
        tokens += [mark, *encoding.encode_ordinary(view)]
    return tokens


def prepare_pairs(
    out,
    train,
    test,
    *,
    source,
    licence="unknown",
    system="auto",
    vocab_size=None,
    tokenizer=None,
    files=None,
):
    """Tokenise Records into the folder `out`, which appears whole or not at all: its meta.json.

    system: "keep" the system message before Text, "drop" it, or keep it if it differs among the
    training examples ("auto"). tokenizer: a tiktoken name or a file of ranks; without it, BPE of
    vocab_size tokens is trained on train. The separator and the [PRED] tokens come on top.
    files: {name: Records} to put beside the shards as lines of JSON.
    """
    kinds = {kind for _, kind, _, _ in train + test}
    if len(kinds) > 1:
        raise ValueError("train and test are of different kinds, pairs and groups; give one kind")
    kind = kinds.pop()
    systems = {system for _, _, system, _ in train}
    keep = system == "keep" or (system == "auto" and len(systems) > 1)
    train, test = ([full_views(record, keep) for record in records] for records in (train, test))
    with whole_folder(out) as work:
        texts = itertools.chain.from_iterable(train)
        encoding = load_tokenizer(tokenizer) if tokenizer else train_bpe(texts, vocab_size)
        separator = encoding.n_vocab
        for name, records in (files or {}).items():
            write_whole(work / name, jsonl(records))
        encoded = {
            split: (encode_views(v, encoding) for v in progress(views, f"tokenising {split}"))
            for split, views in (("train", train), ("val", test))
        }
        write_folder(
            work,
            "pairs",
            encoded,
            encoding,
            source=source,
            licence=licence,
            extra_tokens=1 + PRED_TOKENS,
            kind=kind,
            separator=separator,
            first_pred=separator + 1,
            keep_system=keep,
            overlap=count_overlap(train, test, kind),
        )
    return read_meta(out)
