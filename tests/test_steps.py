"""data/prepare_steps.py: what a step is, and that nothing but blank space is lost."""

import json
import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data import prepare_steps as steps
from nanojepa import files
from nanojepa.records import Record, read_examples

CLIPS = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "That is 48+24 = <<48+24=72>>72 altogether.\n#### 72"
)
FORMATS = st.sampled_from(["lines", "paragraphs"])
# Blank space of every kind, and the marks that mean something, among letters.
TEXTS = st.text(st.sampled_from("ab1 .\n\n\r\t\f\u2028\u00a0é#<>=")).filter(str.strip)
LINES = st.text(st.sampled_from("ab1 .\u2028é#<>="), min_size=1).map(str.strip).filter(bool)
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\n \t\n", "\r\n\r\n", "\n\n\n"])
BLANK_LINES = st.sampled_from(["\n\n", "\n \n", "\r\n\t\r\n", "\n\n\n\n", "\n\u00a0\n"])
NUMBERS = st.from_regex(r"-?\$?[0-9]{1,3}(,[0-9]{3})*(\.[0-9]+)?", fullmatch=True)


def message(answer, user="How many?", system="Show steps."):
    return Record(0, "pairs", system, [user, answer]).to_json()


def json_file(path, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(path)


def make(folder, *lines, flags=()):
    """What main() makes of these lines: JSON objects."""
    source, out = json_file(folder / "in.jsonl", *lines), folder / "made" / "out.jsonl"
    steps.main(["--in", source, "--out", str(out), *flags])
    return [json.loads(line) for line in out.read_text().splitlines()]


def answers(objects):
    return [obj["messages"][-1]["content"] for obj in objects]


# ---- steps


@given(st.lists(LINES, min_size=1), st.lists(LINE_ENDS, min_size=1))
def test_lines_become_steps_whatever_blank_space_parts_them(lines, ends):
    text = "".join(line + ends[i % len(ends)] for i, line in enumerate(lines))
    assert steps.split_steps(text) == lines
    assert steps.split_steps("\n\n".join(lines), "paragraphs") == lines


@given(st.lists(st.lists(LINES, min_size=1), min_size=1), BLANK_LINES)
def test_paragraphs_keep_their_inner_line_ends(paragraphs, between):
    joined = ["\n".join(lines) for lines in paragraphs]
    text = f" {between}{between.join(joined)}{between}"
    assert steps.split_steps(text, "paragraphs") == joined


@given(TEXTS, FORMATS)
@example("a\r\rb\n\f\nc", "paragraphs")
def test_splitting_is_exact_and_only_blank_space_goes(text, form):
    parts = steps.split_steps(text, form)
    assert "".join("".join(parts).split()) == "".join(text.split())
    for part in parts:
        assert part and part == part.strip() and "\r" not in part
        assert all(map(str.strip, part.split("\n")))
        assert form == "paragraphs" or "\n" not in part
    # What a training script finds with a plain split.
    joined = "\n\n".join(parts)
    assert joined.split("\n\n") == steps.split_steps(joined, "paragraphs") == parts


@given(st.lists(LINES), NUMBERS, FORMATS, st.sampled_from(["", "\n", " \r\n"]))
def test_the_final_answer_is_the_last_step_with_its_number(lines, number, form, end):
    separator = "\n" if form == "lines" else "\n\n"
    text = separator.join([*lines, f"#### {number}"]) + end
    assert steps.split_steps(text, form)[-1] == f"#### {number}"


# ---- runs


def test_a_run_on_gsm8k(tmp_path, capsys):
    lines = [
        message(CLIPS, "How many\n\nclips é?"),
        "",
        message("It is 5.\r\n\r\n  #### 5 \r\n", system="other"),
        message("just so", system=None),
        message("a\nb"),
    ]
    objects, out = make(tmp_path, *lines), tmp_path / "made" / "out.jsonl"
    expected = [CLIPS.replace("\n", "\n\n"), "It is 5.\n\n#### 5", "just so", "a\n\nb"]
    assert answers(objects) == expected
    questions = [line["messages"][:-1] for line in lines if line]
    assert [obj["messages"][:-1] for obj in objects] == questions
    assert capsys.readouterr().out == (
        f"wrote {out}: 4 examples, 2.00 steps on average; 1 have fewer than two (no JEPA term), "
        "0 left out by --min_steps\n"
    )
    assert list(out.parent.iterdir()) == [out] and len(read_examples(out)) == 4


def test_flags_of_a_run(tmp_path, capsys):
    lines = [message(CLIPS), message("alone\nstill\n \nsecond"), message("alone")]
    flags = ["--format", "paragraphs", "--min_steps", "2"]
    assert answers(make(tmp_path, *lines, flags=flags)) == ["alone\nstill\n\nsecond"]
    assert (
        "1 examples, 2.00 steps on average; 0 have fewer than two (no JEPA term), "
        "2 left out by --min_steps"
    ) in capsys.readouterr().out


@pytest.mark.parametrize(
    "lines, flags, error",
    [
        (
            [message(CLIPS), '{"messages": ['],
            [],
            "IN, line 2: not JSON .*; mend it, or skip such lines with --bad skip",
        ),
        ([message(CLIPS), "", message(" \n")], [], "IN, line 3: assistant is empty; mend it"),
        (
            ["", {"paraphrases": ["a", "b"]}],
            [],
            "IN: paraphrases have no steps; give messages",
        ),
        (
            [message(CLIPS), {"paraphrases": ["a", "b"]}],
            ["--bad", "skip"],
            "IN, line 2: paraphrases among lines of the other kind; make",
        ),
        ([message(CLIPS)], ["--min_steps", "4"], "IN: no answer has 4 steps; lower --min_steps"),
        ([], [], "IN holds no usable line"),
    ],
)
def test_errors_name_the_line_and_write_nothing(tmp_path, lines, flags, error):
    with pytest.raises(SystemExit) as ended:
        make(tmp_path, *lines, flags=flags)
    source = re.escape(str(tmp_path / "in.jsonl"))
    assert re.match("error: " + error.replace("IN", source), str(ended.value))
    assert "\n" not in str(ended.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_lines_are_skipped_by_name(tmp_path, capsys):
    lines = ["x", message(CLIPS), message("a\nb")]
    assert len(make(tmp_path, *lines, flags=["--bad", "skip"])) == 2
    assert "in.jsonl, line 1: skipped: not JSON" in capsys.readouterr().err


def test_files_that_exist_or_cannot_be_written(tmp_path, monkeypatch):
    source, out = json_file(tmp_path / "in.jsonl", message(CLIPS)), str(tmp_path / "o.jsonl")

    def refused(message, source=source, out=out):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            steps.main(["--in", source, "--out", out])

    refused("in.jsonl exists: remove it, or choose another --out", out=source)
    refused("nowhere.jsonl: No such file or directory", source=str(tmp_path / "nowhere.jsonl"))
    refused("in.jsonl: File exists", out=f"{source}/out.jsonl")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    refused("No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert json.loads((tmp_path / "in.jsonl").read_text()) == message(CLIPS)


def test_as_a_script_without_torch(tmp_path):
    source = json_file(tmp_path / "in.jsonl", message(CLIPS))
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv[1:] = ['--in', {source!r}, '--out', 'o.jsonl']; "
        f"runpy.run_path({steps.__file__!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "wrote o.jsonl: 1 examples, 3.00 steps" in done.stdout
