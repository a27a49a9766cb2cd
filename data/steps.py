r"""Answers as steps: messages whose assistant text is a sequence of steps with a blank line ("\n\n") between them, for Step-JEPA.

    python data/steps.py --in gsm8k_train.jsonl --out gsm8k_steps.jsonl
    python data/steps.py --in reasoning.jsonl --out reasoning_steps.jsonl --format paragraphs [--min_steps 2] [--bad skip]

The input is JSON lines of messages, as data/pairs.py reads; system and user messages stay as they are. --format lines (the
default, GSM8K): every line that isn't blank is a step, the final answer "#### 72" being the last one, its number untouched.
--format paragraphs: what stands between blank lines is a step, with its own line ends. Calculator annotations, <<48/2=24>>,
stay where --drop_calculators doesn't remove them. The last line printed counts the answers of fewer than two steps, which are
kept and have no JEPA term (--min_steps 2 leaves them out), and those whose last step has neither a line "#### ..." at its end
nor \boxed{...}. The output appears whole or not at all.
"""
import argparse
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.pairs import read, read_jsonl, record_of
from data.shards import write_whole

SEPARATORS = {"lines": r"\n", "paragraphs": r"\n\s*\n"}
FINAL_ANSWER = re.compile(r"(?:\A|\n)####[ \t]*\S[^\n]*\Z|\\boxed\{")
CALCULATOR = re.compile(r"<<.*?>>")


def split_steps(text, format="lines"):
    """The steps of a text, each stripped, none of them blank, none with a blank line in it; format: a key of SEPARATORS."""
    text = re.sub(r"\r\n?", "\n", text)  # and not splitlines(), which splits at form feeds and U+2028 too
    return [step for part in re.split(SEPARATORS[format], text) if (step := part.strip())]


def drop_calculators(step):
    """A step without <<...>>; a line that was nothing else goes too, since a blank one would end the step."""
    return "\n".join(line for line in CALCULATOR.sub("", step).split("\n") if line.strip()).strip()


def convert(views, format, drop=False):
    """[Text, steps joined by blank lines] of the views of a pair; ValueError where no step is left."""
    text, answer = views
    steps = split_steps(answer, format)
    if drop:
        steps = [step for part in steps if (step := drop_calculators(part))]
    if not steps:
        raise ValueError("assistant holds nothing but calculator annotations")
    return [text, "\n\n".join(steps)]


def write_lines(path, records):
    """Write a JSON object a line; the file appears whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, *(json.dumps(record).encode() + b"\n" for record in records))
    except OSError as e:
        raise SystemExit(f"error: {path}: cannot be written ({e.strerror}); choose another --out") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--in", dest="source", required=True, help="JSON-lines file of messages")
    parser.add_argument("--out", required=True, type=Path, help="JSON-lines file to make")
    parser.add_argument("--format", choices=SEPARATORS, default="lines", help="what a step of the input is (default: lines)")
    parser.add_argument("--drop_calculators", action="store_true", help="remove <<...>>")
    parser.add_argument("--min_steps", type=int, default=1, help="leave out answers of fewer steps (default: 1, none)")
    parser.add_argument("--bad", choices=("stop", "skip"), default="stop", help="what a line that is wrong does (default: stop); either names it")
    args = parser.parse_args(argv)
    if args.min_steps < 1:
        raise SystemExit(f"error: --min_steps {args.min_steps}: must be at least 1")
    if os.path.lexists(args.out):
        raise SystemExit(f"error: {args.out} exists: remove it, or choose another --out")
    lines = read_jsonl(args.source, args.bad)
    if lines[0][1] == "groups":
        raise SystemExit(f"error: {args.source}, line {lines[0][0]}: paraphrases have no steps; give messages with a user and an assistant")
    lines = read(((n, lambda: (kind, system, convert(views, args.format, args.drop_calculators))) for n, kind, system, views in lines), args.source, args.bad)
    examples = [(line, split_steps(line[-1][1], "paragraphs")) for line in lines]
    kept = [(line, steps) for line, steps in examples if len(steps) >= args.min_steps]
    if not kept:
        raise SystemExit(f"error: {args.source}: no answer has {args.min_steps} steps; lower --min_steps, or choose another --format")
    write_lines(args.out, (record_of(*line[1:]) for line, _ in kept))
    few, unanswered = sum(len(steps) < 2 for _, steps in kept), sum(not FINAL_ANSWER.search(steps[-1]) for _, steps in kept)
    print(f"wrote {args.out}: {len(kept):,} examples, {sum(len(steps) for _, steps in kept) / len(kept):.2f} steps on average; {few:,} have fewer than two "
          f"(no JEPA term), {unanswered:,} no final answer" + (f"; {len(examples) - len(kept):,} left out by --min_steps" if args.min_steps > 1 else ""))


if __name__ == "__main__":
    main()
