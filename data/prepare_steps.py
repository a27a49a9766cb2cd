r"""Put a blank line between the steps of answers, in JSON lines of messages, for Step-JEPA.

    python data/prepare_steps.py --in gsm8k_train.jsonl --out gsm8k_steps.jsonl
    python data/prepare_steps.py --in reasoning.jsonl --out reasoning_steps.jsonl \
        --format paragraphs [--min_steps 2] [--bad skip]

The input is what data/prepare_pairs.py reads. System and user messages stay as they are.
--format lines, the default, is for GSM8K: every line that isn't blank is a step, and the final
answer "#### 72" is the last one, with its number untouched. --format paragraphs: what stands
between blank lines is a step, with its own line ends. Calculator annotations like <<48/2=24>> stay
unless --drop_calculators removes them.

The last line printed counts answers of fewer than two steps, which are kept and have no JEPA term
(--min_steps 2 leaves them out), and answers whose last step has neither a line "#### ..." at its
end nor \boxed{...}. The output appears whole or not at all.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanojepa.files import one_line_errors, write_whole
from nanojepa.records import read_jsonl, read_records

SEPARATORS = {"lines": r"\n", "paragraphs": r"\n\s*\n"}
FINAL_ANSWER = re.compile(r"(?:\A|\n)####[ \t]*\S[^\n]*\Z|\\boxed\{")
CALCULATOR = re.compile(r"<<.*?>>")


def split_steps(text, form="lines"):
    """The steps of a text, each stripped, none of them blank, none with a blank line in it.

    form: a key of SEPARATORS.
    """
    text = re.sub(r"\r\n?", "\n", text)  # splitlines() would split at form feeds and U+2028 too
    parts = [part.strip() for part in re.split(SEPARATORS[form], text)]
    return [part for part in parts if part]


def drop_calculators(step):
    """A step without <<...>>. A line that was nothing else goes too: blank, it would end a step."""
    lines = CALCULATOR.sub("", step).split("\n")
    return "\n".join(line for line in lines if line.strip()).strip()


def convert(answer, form, drop=False):
    """The steps of an answer joined by blank lines; ValueError if none is left."""
    steps = split_steps(answer, form)
    if drop:
        steps = [step for step in map(drop_calculators, steps) if step]
    if not steps:
        raise ValueError("assistant holds nothing but calculator annotations")
    return "\n\n".join(steps)


def read_answers(args):
    """The Records of the input, their answers converted."""
    records = read_jsonl(args.source, args.bad)
    if records[0].kind == "groups":
        raise ValueError(
            f"{args.source}, line {records[0].line}: paraphrases have no steps; "
            "give messages with a user and an assistant"
        )

    def make(number, record):
        text, answer = record.views
        return record._replace(views=[text, convert(answer, args.format, args.drop_calculators)])

    numbered = ((record.line, record) for record in records)
    return read_records(numbered, make, args.source, args.bad)


def describe(answers):
    """What is worth knowing of answers, which are lists of steps."""
    average = sum(map(len, answers)) / len(answers)
    few = sum(len(steps) < 2 for steps in answers)
    open_ended = sum(not FINAL_ANSWER.search(steps[-1]) for steps in answers)
    return (
        f"{len(answers):,} examples, {average:.2f} steps on average; {few:,} have fewer than two "
        f"(no JEPA term), {open_ended:,} no final answer"
    )


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--in", dest="source", required=True, help="JSON-lines file of messages")
    add("--out", required=True, type=Path, help="JSON-lines file to make")
    add(
        "--format",
        choices=SEPARATORS,
        default="lines",
        help="what a step of the input is (default: lines)",
    )
    add("--drop_calculators", action="store_true", help="remove <<...>>")
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
    if args.min_steps < 1:
        raise ValueError(f"--min_steps {args.min_steps}: must be at least 1")
    if os.path.lexists(args.out):
        raise ValueError(f"{args.out} exists: remove it, or choose another --out")
    answers = [(record, record.views[1].split("\n\n")) for record in read_answers(args)]
    kept = [(record, steps) for record, steps in answers if len(steps) >= args.min_steps]
    if not kept:
        raise ValueError(
            f"{args.source}: no answer has {args.min_steps} steps; lower --min_steps, "
            "or choose another --format"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record.to_json()) + "\n" for record, _ in kept]
    write_whole(args.out, "".join(lines).encode())
    summary = describe([steps for _, steps in kept])
    if args.min_steps > 1:
        summary += f"; {len(answers) - len(kept):,} left out by --min_steps"
    print(f"wrote {args.out}: {summary}")


if __name__ == "__main__":
    main()
