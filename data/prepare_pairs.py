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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanojepa.files import one_line_errors, script_parser
from nanojepa.records import (
    Record,
    open_dataset,
    parse,
    prepare_pairs,
    read_jsonl,
    read_records,
    split_examples,
)


def read_columns(args):
    """The Records of a dataset's columns."""
    dataset = open_dataset(args.dataset, args.name, args.split)
    wanted = args.columns or args.group or []
    missing = [column for column in wanted if column not in dataset.column_names]
    if missing or not wanted:
        what = f"no column {missing[0]}" if missing else "no columns given"
        raise ValueError(
            f"{what}; choose --columns TEXT CODE or --group COLUMN ... among "
            f"{', '.join(dataset.column_names)} of {args.dataset}"
        )

    def make(number, row):
        texts = [row[column] for column in wanted]
        if len(texts) == 1:  # a column of lists
            texts = texts[0]
        kind = "pairs" if args.columns else "groups"
        return parse(number, Record(number, kind, None, texts).to_json())

    return read_records(enumerate(dataset, 1), make, args.dataset, args.bad)


def parse_args(argv):
    parser = script_parser(__doc__)
    add = parser.add_argument
    add_source = parser.add_mutually_exclusive_group(required=True).add_argument
    add_source("--train", help="JSON-lines file")
    add_source("--dataset", help="Hugging Face dataset, or a folder of one")
    add("--test", help="JSON-lines file of the same kind")
    add("--name", help="configuration of the dataset")
    add("--split", default="train", help="split of the dataset (default: train)")
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
    train = read_jsonl(args.train, args.bad) if args.train else read_columns(args)
    files = {}
    if args.test:
        test = read_jsonl(args.test, args.bad)
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
        f"prepared {args.out}: {len(train)} {meta['kind']} to train on, {len(test)} to test on, of "
        f"which {meta['overlap']['clean']} are clean; train on it with DATA_PATH={args.out}"
    )


if __name__ == "__main__":
    main()
