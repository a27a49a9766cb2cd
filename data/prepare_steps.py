"""Put a blank line between the steps of answers, in JSON lines of messages, for Step-JEPA.

    python data/prepare_steps.py --in gsm8k_train.jsonl --out gsm8k_steps.jsonl
    python data/prepare_steps.py --in reasoning.jsonl --out reasoning_steps.jsonl \\
        --format paragraphs [--min_steps 2] [--bad skip]

The input is what data/prepare_pairs.py reads. System and user messages stay as they are.
--format lines, the default, is for GSM8K: every line that isn't blank is a step, and the final
answer "#### 72" is the last one, with its number untouched. --format paragraphs: what stands
between blank lines is a step, with its own line ends.

The last line printed counts answers of fewer than two steps, which are kept and have no JEPA term
(--min_steps 2 leaves them out). The output appears whole or not at all.
"""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanojepa.files import one_line_errors, script_parser, shown, write_whole
from nanojepa.records import jsonl, read_examples

SEPARATORS = {"lines": r"\n", "paragraphs": r"\n\s*\n"}


def split_steps(text, form="lines"):
    """The steps of a text, each stripped, none of them blank, none with a blank line in it.

    form: a key of SEPARATORS.
    """
    text = re.sub(r"\r\n?", "\n", text)  # splitlines() would split at form feeds and U+2028 too
    parts = [part.strip() for part in re.split(SEPARATORS[form], text)]
    return [part for part in parts if part]


def parse_args(argv):
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--in", dest="source", required=True, help="JSON-lines file of messages")
    add("--out", required=True, type=Path, help="JSON-lines file to make")
    add(
        "--format",
        choices=SEPARATORS,
        default="lines",
        help="what a step of the input is (default: lines)",
    )
    add("--columns", nargs=2, metavar=("USER", "ASSISTANT"), help="columns of the two texts")
    add("--min_steps", type=int, default=1, help="leave out answers of fewer steps (default: 1)")
    add(
        "--bad",
        choices=("stop", "skip"),
        default="stop",
        help="what a line that is wrong does (default: stop); either names it",
    )
    return parser.parse_args(argv)


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    if os.path.lexists(args.out):
        raise ValueError(f"{args.out} exists: remove it, or choose another --out")
    records = read_examples(args.source, args.bad, columns=args.columns)
    if records[0].kind == "groups":
        raise ValueError(
            f"{args.source}: paraphrases have no steps; give messages with a user and an assistant"
        )
    kept, counts = [], []
    for record in records:
        text, answer = record.views
        steps = split_steps(answer, args.format)
        if len(steps) >= args.min_steps:
            kept.append(record._replace(views=[text, "\n\n".join(steps)]))
            counts.append(len(steps))
    if not kept:
        raise ValueError(
            f"{args.source}: no answer has {args.min_steps} steps; lower --min_steps, "
            "or choose another --format"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, jsonl(kept))
    print(
        f"wrote {shown(args.out)}: {len(kept):,} examples, {sum(counts) / len(kept):.2f} steps on "
        f"average; {counts.count(1):,} have fewer than two (no JEPA term), "
        f"{len(records) - len(kept):,} left out by --min_steps"
    )


if __name__ == "__main__":
    main()
