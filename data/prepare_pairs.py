"""Tokenise pairs of texts, or groups of paraphrases.

    python data/prepare_pairs.py --train train.jsonl --test test.jsonl --out data/NAME
    python data/prepare_pairs.py --dataset OWNER/NAME --columns question answer --out data/NAME
    python data/prepare_pairs.py --dataset cestwc/paraphrase --split coco --group COLUMN ... \\
        --out data/paraphrase

A line of JSON is {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]},
whose user message is Text and whose assistant message is Code, or {"paraphrases": [text, text,
...]}. Of a dataset, a group comes from one column of lists of texts, or from several columns of one
text each. A system message stands before Text if it differs between lines; one that never changes
says nothing and is left out (--system).

Without --test, the test examples are chosen by the hash of their first view, and written to
test.jsonl in --out. A test example is clean if none of its texts stands in train; evaluate.py
reports its accuracy on those as well, and meta.json counts them.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanojepa.files import one_line_errors, quoted, script_parser, shown
from nanojepa.readers import TEST, TRAIN, Rows, open_dataset, open_rows
from nanojepa.records import (
    parse,
    prepare_pairs,
    read_dataset,
    read_examples,
    read_rows,
    split_examples,
)


def read_source(source, args, order):
    """The Records of a file or a Hugging Face dataset."""
    columns = tuple(args.columns or ())
    if os.path.isfile(source):
        if args.group:
            return read_groups(open_rows(source), source, args)
        return read_examples(source, args.bad, columns=columns)
    dataset = open_dataset(source, args.name, args.split if order is TRAIN else "", order)
    if args.group:
        return read_groups(Rows(enumerate(dataset, 1), dict), source, args)
    return read_dataset(dataset, source, args.bad, columns=columns)


def read_groups(rows, source, args):
    """The Records of rows with paraphrases in one column of lists, or in several of one text."""

    def make(number, raw):
        row = rows.parse(raw)
        if missing := [column for column in args.group if column not in row]:
            raise ValueError(f"no column {missing[0]} among {', '.join(row)}")
        texts = [row[column] for column in args.group]
        return parse(number, {"paraphrases": texts[0] if len(texts) == 1 else texts})

    return read_rows(rows.items, make, source, args.bad)


def parse_args(argv):
    parser = script_parser(__doc__)
    add = parser.add_argument
    add_source = parser.add_mutually_exclusive_group(required=True).add_argument
    add_source("--train", help="file of examples")
    add_source("--dataset", help="Hugging Face dataset, or a folder of one")
    add("--test", help="file or dataset of the same kind")
    add("--name", help="configuration of the dataset")
    add("--split", default="", help="split of the dataset (default: train)")
    add_columns = parser.add_mutually_exclusive_group().add_argument
    add_columns("--columns", nargs=2, metavar=("TEXT", "CODE"), help="columns of a pair")
    add_columns(
        "--group",
        nargs="+",
        metavar="COLUMN",
        help="column of lists of paraphrases, or columns of one paraphrase each",
    )
    add("--out", required=True, help="folder to make")
    add(
        "--test-fraction",
        type=float,
        default=0.05,
        help="share of the examples that are test, without --test (default: 0.05)",
    )
    add(
        "--bad",
        choices=("stop", "skip"),
        default="stop",
        help="what a line that is wrong does (default: stop); either names it",
    )
    add(
        "--system",
        choices=("auto", "keep", "drop"),
        default="auto",
        help="system message before Text; auto keeps it if it differs between lines (default)",
    )
    add_tokenizer = parser.add_mutually_exclusive_group().add_argument
    add_tokenizer("--vocab-size", type=int, help="train BPE of this size, up to 65525")
    add_tokenizer("--tokenizer", help="use a tiktoken name or file of ranks; BPE of 512 if neither")
    add("--licence", default="unknown", help="noted in meta.json")
    return parser.parse_args(argv)


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    if not 0 < args.test_fraction < 1:
        raise ValueError(f"--test-fraction {args.test_fraction}: must lie between 0 and 1")
    train, files = read_source(args.train or args.dataset, args, TRAIN), {}
    if args.test:
        test = read_source(args.test, args, TEST)
    else:
        train, test = split_examples(train, args.test_fraction)
        files["test.jsonl"] = test  # for evaluate.py
    meta = prepare_pairs(
        args.out,
        train,
        test,
        source=args.train or args.dataset,
        licence=args.licence,
        system=args.system,
        vocab_size=args.vocab_size or 512,
        tokenizer=args.tokenizer,
        files=files,
    )
    print(
        f"prepared {shown(args.out)}: {len(train)} {meta['kind']} to train on, {len(test)} to test "
        f"on, of which {meta['overlap']['clean']} are clean; train on it with "
        f"DATA_PATH={quoted(args.out)}"
    )


if __name__ == "__main__":
    main()
