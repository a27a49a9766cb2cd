"""Pairs of texts, or groups of paraphrases, as token shards: what DATA_PATH trains on with JEPA_OBJECTIVE=pair.

    python data/pairs.py --train train.jsonl --test test.jsonl --out data/NAME
    python data/pairs.py --dataset OWNER/NAME --columns question answer --out data/NAME
    python data/pairs.py --dataset cestwc/paraphrase --split coco --group COLUMN [COLUMN ...] --out data/paraphrase

A line of JSON is {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}, whose user message is Text and
whose assistant message is Code, or {"paraphrases": [text, text, ...]}. A group comes from one column that holds a list of texts,
or from several columns (a wrong name is answered with the names there are). A system message stands before Text where it
differs between lines; one that never changes says nothing and is left out (--system). Without --test, the test examples are
chosen by the hash of their first view, and written to test.jsonl in --out. An example in a shard is marker, view, separator, view, ... meta.json says how many
test texts or codes stand in train too; evaluate.py reports its accuracy on the others as well.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.shards import (json_lines, load_tokenizer, progress, read_meta, sha256_file, token_bytes, train_bpe, whole_folder, write_meta, write_ranks,
                         write_shard, write_whole)

PRED_TOKENS = 10  # [PRED] tokens a vocabulary of pairs has: JEPA_PRED_TOKENS uses the first ones


def check_text(text, name):
    """The text, or ValueError where it is none, or blank, or has no UTF-8 form."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is not a text")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a surrogate pair, which has no UTF-8 form") from None
    return text


def parse(record):
    """(kind, system text or None, views) of one line of JSON; ValueError says what is wrong with it."""
    if isinstance(record, dict) and "paraphrases" in record:
        return "groups", None, check_group(record["paraphrases"], "paraphrases")
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('neither {"messages": [...]} nor {"paraphrases": [...]}')
    roles = [m.get("role") for m in messages]
    for role in ("user", "assistant"):
        if role not in roles:
            raise ValueError(f"no message of role {role}")
    if roles not in (["system", "user", "assistant"], ["user", "assistant"]):
        raise ValueError(f"roles {str(roles)[:100]}: only one user and one assistant message are known, after at most one system message")
    system = messages[0].get("content") if len(messages) == 3 else None
    if system not in (None, ""):
        check_text(system, "system")
    return "pairs", system, [check_text(m.get("content"), m["role"]) for m in messages[-2:]]


def record_of(kind, system, views):
    """The line of JSON that parse() reads as these."""
    if kind == "groups":
        return {"paraphrases": views}
    roles = [("system", system)] if system is not None else []
    return {"messages": [{"role": role, "content": text} for role, text in [*roles, *zip(("user", "assistant"), views)]]}


def check_group(texts, name):
    if not isinstance(texts, list) or len(texts) < 2:
        raise ValueError(f"{name}: a group needs at least two texts")
    return [check_text(text, f"{name}[{i}]") for i, text in enumerate(texts)]


def read(records, where, bad):
    """[(line number, kind, system, views)] of numbered functions that parse one record each. bad: stop at, or skip, one that
    raises ValueError; either names it and says why."""
    found, skipped = [], 0
    for number, parse_record in records:
        try:
            found.append((number, *parse_record()))
        except (ValueError, RecursionError) as e:  # the latter from a message that shows what is nested deeply
            if bad == "stop":
                raise SystemExit(f"error: {where}, line {number}: {e}; mend it, or skip such lines with --bad skip") from None
            skipped += 1
            print(f"{where}, line {number}: skipped: {e}", file=sys.stderr)
    if skipped:
        print(f"{where}: {skipped} of {skipped + len(found)} lines skipped", file=sys.stderr)
    if not found:
        raise SystemExit(f"error: {where} holds no usable line")
    if len({kind for _, kind, _, _ in found}) > 1:
        other = next(number for number, kind, _, _ in found if kind != found[0][1])
        raise SystemExit(f"error: {where}, line {other}: {'paraphrases' if found[0][1] == 'pairs' else 'messages'} among lines of the other kind; "
                         "make a file of each")
    return found


def read_jsonl(path, bad="stop", limit=None):
    """As read(), of a file with a JSON object a line, the first `limit` of them; empty lines don't count."""
    try:
        return read(((n, lambda: parse(load())) for n, load in itertools.islice(json_lines(path), limit)), str(path), bad)
    except OSError as e:
        raise SystemExit(f"error: {path}: {e.strerror}; check the path") from None


def read_dataset(source, name, split, columns, group, bad):
    """As read(), of a Hugging Face dataset: two columns are a pair, `group` columns or one column of lists a group."""
    from datasets import load_dataset
    try:
        dataset = load_dataset(source, name, split=split)
    except Exception as e:  # datasets raises many kinds: no such repository, configuration, split, network
        raise SystemExit(f"error: --dataset {source}: cannot be loaded ({' '.join(str(e).split())[:300]}); check name, --name and --split") from None
    wanted = columns or group or []
    if not wanted or (missing := [c for c in wanted if c not in dataset.column_names]):
        raise SystemExit(f"error: {f'no column {missing[0]}' if wanted else 'no columns given'}; choose --columns TEXT CODE or --group COLUMN ... among "
                         f"{', '.join(dataset.column_names)} of {source}")

    def load(row):
        if columns:
            return "pairs", None, [check_text(row[c], f"column {c}") for c in columns]
        texts = row[group[0]] if len(group) == 1 else [row[c] for c in group]
        return "groups", None, check_group(texts, f"column {' '.join(group)}")
    return read(((n, lambda: load(row)) for n, row in enumerate(dataset, 1)), source, bad)


def split_examples(examples, test_fraction):
    """(train, test): by the hash of the first view, so that copies of it fall on one side."""
    digest = [hashlib.sha256(views[0].encode()).digest() for *_, views in examples]
    unique = sorted(set(digest))
    if len(unique) < 2:
        raise SystemExit("error: fewer than two different texts: there is nothing to split; give --test")
    chosen = set(unique[:min(len(unique) - 1, math.ceil(test_fraction * len(unique)))])
    return tuple([e for e, d in zip(examples, digest) if (d in chosen) == test] for test in (False, True))


def seen_in_train(train, test, kind):
    """For every view of every test example whether it stands in train too. train, test: lists of views. Of pairs a text is
    compared with texts and a code with codes, of groups any view with any."""
    if kind == "pairs":
        known = [set(side) for side in zip(*train)]
        return [[view in side for view, side in zip(views, known)] for views in test]
    known = {view for views in train for view in views}
    return [[view in known for view in views] for views in test]


def overlap(train, test, kind):
    """{"examples": of test, "texts", "codes": of pairs, how many stand in train, "clean": examples without one that does}."""
    hits = seen_in_train(train, test, kind)
    names = {"texts": sum(h[0] for h in hits), "codes": sum(h[1] for h in hits)} if kind == "pairs" else {}
    return {"examples": len(test), **names, "clean": sum(not any(h) for h in hits)}


def prepare_pairs(out, train, test, *, source, licence="unknown", system="auto", vocab_size=None, tokenizer=None, files={}):
    """Tokenise examples, as read() returns them, into the folder `out`, which appears whole or not at all; returns its meta.json.

    tokenizer: a tiktoken name or file of ranks; without it, BPE of vocab_size tokens, the marker included, is trained on train. The
    separator and the [PRED] tokens come on top. files: {name: text} to put beside the shards.
    """
    out = Path(out)
    if out.exists():
        raise SystemExit(f"error: {out} exists: remove it, or choose another --out")
    kinds = {kind for _, kind, _, _ in train + test}
    if len(kinds) > 1:
        raise SystemExit("error: train and test are of different kinds, pairs and groups; give files of one kind")
    kind = kinds.pop()
    systems = {s for _, _, s, _ in train}
    keep = system == "keep" or system == "auto" and len(systems) > 1
    views = {split: [[f"{s}\n{v[0]}" if keep and s else v[0], *v[1:]] for _, _, s, v in examples] for split, examples in (("train", train), ("val", test))}
    if tokenizer:
        encoding = load_tokenizer(tokenizer)
    else:
        encoding = train_bpe((text for example in views["train"] for text in example), vocab_size)
    marker, separator = encoding.eot_token, encoding.n_vocab
    table = token_bytes(encoding) + [b""] * (1 + PRED_TOKENS)
    if len(table) > 65536:
        raise SystemExit(f"error: {len(table)} tokens with separator and [PRED]s; a shard holds uint16, at most 65536")
    with whole_folder(out) as work:
        shards = {}
        for split, examples in views.items():
            tokens = []
            for example in progress(examples, desc=f"tokenising {split}"):
                for i, ids in enumerate(map(encoding.encode_ordinary, example)):
                    tokens += [separator if i else marker, *ids]
            file = f"pairs_{split}_000000.bin"
            write_shard(work / file, np.array(tokens))
            shards[file] = {"sha256": sha256_file(work / file), "tokens": len(tokens), "text_bytes": sum(len(v.encode()) for e in examples for v in e)}
        for name, text in files.items():
            write_whole(work / name, text.encode())
        write_ranks(work / "tokenizer.tiktoken", token_bytes(encoding))
        write_meta(work, tokenizer={"file": "tokenizer.tiktoken", "name": encoding.name, "pattern": encoding._pat_str}, table=table, doc_token=marker,
                   shards=shards, source=source, licence=licence, kind=kind, separator=separator, first_pred=separator + 1,
                   keep_system=keep, overlap=overlap(views["train"], views["val"], kind))
    return read_meta(out)


def describe(meta):
    """One line on the test examples of a meta.json that stand in train."""
    o = meta["overlap"]
    shared = f"{o['texts']} of {o['examples']} test texts and {o['codes']} codes stand in train" if "texts" in o else \
             f"{o['examples'] - o['clean']} of {o['examples']} test groups share a text with train"
    return f"{shared}; {o['clean']} test examples are clean"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--train", help="JSON-lines file")
    parser.add_argument("--test", help="JSON-lines file of the same kind")
    parser.add_argument("--dataset", help="Hugging Face dataset, or a folder of one")
    parser.add_argument("--name", help="its configuration")
    parser.add_argument("--split", default="train", help="its split (default: train)")
    parser.add_argument("--columns", nargs=2, metavar=("TEXT", "CODE"), help="its columns of a pair")
    parser.add_argument("--group", nargs="+", metavar="COLUMN", help="its column of lists of paraphrases, or its columns of one paraphrase each")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--test-fraction", type=float, default=0.05, help="share of the examples that are test, without --test (default: 0.05)")
    parser.add_argument("--train-fraction", type=float, default=1.0, help="use only this share of the training examples, the first ones, e.g. 0.125")
    parser.add_argument("--bad", choices=("stop", "skip"), default="stop", help="what a line that is wrong does (default: stop); either names it")
    parser.add_argument("--system", choices=("auto", "keep", "drop"), default="auto", help="system message in front of Text: auto keeps it where it differs between lines")
    parser.add_argument("--vocab-size", type=int, help="train BPE of this size (default: 512), up to 65525")
    parser.add_argument("--tokenizer", help="use a tiktoken name or file of ranks instead")
    parser.add_argument("--licence", default="unknown", help="noted in meta.json")
    args = parser.parse_args(argv)
    if (args.train is None) == (args.dataset is None):
        raise SystemExit("error: give either --train or --dataset")
    if args.tokenizer and args.vocab_size:
        raise SystemExit("error: give either --tokenizer or --vocab-size")
    for name in ("test_fraction", "train_fraction"):
        if not 0 < getattr(args, name) <= 1:
            raise SystemExit(f"error: --{name.replace('_', '-')} {getattr(args, name)}: must lie above 0 and at most at 1")
    train = read_jsonl(args.train, args.bad) if args.train else read_dataset(args.dataset, args.name, args.split, args.columns, args.group, args.bad)
    files = {}
    if args.test:
        test = read_jsonl(args.test, args.bad)
    else:
        train, test = split_examples(train, args.test_fraction)
        files["test.jsonl"] = "".join(json.dumps(record_of(kind, s, views)) + "\n" for _, kind, s, views in test)  # for evaluate.py
    train = train[:max(1, round(args.train_fraction * len(train)))]
    meta = prepare_pairs(args.out, train, test, source=args.train or args.dataset, licence=args.licence, system=args.system,
                         vocab_size=None if args.tokenizer else args.vocab_size or 512, tokenizer=args.tokenizer, files=files)
    print(f"prepared {args.out}: {len(train)} {meta['kind']} to train on, {describe(meta)}. Train with DATA_PATH={args.out}")


if __name__ == "__main__":
    main()
