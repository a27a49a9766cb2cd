"""data/steps.py: what a step is, that nothing but blank space is lost, and that a file is written whole or not at all."""
import json
import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data import pairs, steps

CLIPS = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nThat is 48+24 = <<48+24=72>>72 altogether.\n#### 72"
FORMATS = st.sampled_from(["lines", "paragraphs"])
# blank space of every kind, and the marks that mean something, among letters
TEXTS = st.text(st.sampled_from("ab1 .\n\n\r\t\f\u2028\u00a0é#<>=")).filter(str.strip)
LINES = st.text(st.sampled_from("ab1 .\u2028é#<>="), min_size=1).map(str.strip).filter(bool)


def message(answer, user="How many?", system="Show steps."):
    return pairs.record_of("pairs", system, [user, answer])


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def made(tmp_path, *lines, flags=()):
    """What main() makes of these lines: the records."""
    steps.main(["--in", write(tmp_path / "in.jsonl", *lines), "--out", str(tmp_path / "made" / "out.jsonl"), *flags])
    return [json.loads(line) for line in (tmp_path / "made" / "out.jsonl").read_text().splitlines()]


def answers(records):
    return [record["messages"][-1]["content"] for record in records]


@given(st.lists(LINES, min_size=1), st.lists(st.sampled_from(["\n", "\r\n", "\n \t\n", "\r\n\r\n", "\n\n\n"]), min_size=1))
def test_lines_become_steps_whatever_blank_space_parts_them(lines, ends):
    text = "".join(line + ends[i % len(ends)] for i, line in enumerate(lines))
    assert steps.split_steps(text) == lines
    assert steps.split_steps("\n\n".join(lines), "paragraphs") == lines


@given(st.lists(st.lists(LINES, min_size=1), min_size=1), st.sampled_from(["\n\n", "\n \n", "\r\n\t\r\n", "\n\n\n\n", "\n\u00a0\n"]))
def test_paragraphs_keep_their_inner_line_ends(paragraphs, between):
    joined = ["\n".join(lines) for lines in paragraphs]
    assert steps.split_steps(f" {between}{between.join(joined)}{between}", "paragraphs") == joined


@given(TEXTS, FORMATS)
@example("a\r\rb\n\f\nc", "paragraphs")
def test_splitting_is_exact_and_only_blank_space_goes(text, format):
    found = steps.split_steps(text, format)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(step and step == step.strip() and "\r" not in step and all(map(str.strip, step.split("\n"))) for step in found)
    assert format == "paragraphs" or not any("\n" in step for step in found)
    _, joined = steps.convert(["q", text], format)
    # what a training script finds with a plain split, and a second conversion changes nothing
    assert joined.split("\n\n") == steps.split_steps(joined, "paragraphs") == found and steps.convert(["q", joined], "paragraphs")[1] == joined


@given(st.lists(LINES), st.from_regex(r"-?\$?[0-9]{1,3}(,[0-9]{3})*(\.[0-9]+)?", fullmatch=True), FORMATS, st.booleans(), st.sampled_from(["", "\n", " \r\n"]))
def test_the_final_answer_is_the_last_step_with_its_number(lines, number, format, drop, end):
    separator = "\n" if format == "lines" else "\n\n"
    _, joined = steps.convert(["q", separator.join([*lines, f"#### {number}"]) + end], format, drop)
    assert joined.split("\n\n")[-1] == f"#### {number}" and steps.FINAL_ANSWER.search(joined.split("\n\n")[-1])


@pytest.mark.parametrize("last, final", [("#### 72", True), ("so it is\n####72", True), (r"It is \boxed{72}.", True), ("72", False), ("####", False),
                                         ("#### 72\nis it", False), ("so #### 72", False)])
def test_what_counts_as_a_final_answer(last, final):
    assert bool(steps.FINAL_ANSWER.search(last)) == final


@pytest.mark.parametrize("format, answer, expected", [
    ("lines", CLIPS, "Natalia sold 48/2 = 24 clips in May.\n\nThat is 48+24 = 72 altogether.\n\n#### 72"),
    ("lines", "a\n<<1+1=2>>\nb <<3>2=1>>", "a\n\nb"), ("lines", "1 << 2\n4 >> 1", "1 << 2\n\n4 >> 1"),
    ("paragraphs", "a\n<<1+1=2>>\nb\n\n<<1=1>>\n\nc", "a\nb\n\nc")])
def test_calculators_go_only_when_asked(format, answer, expected):
    assert steps.convert(["<<q>>", answer], format, True) == ["<<q>>", expected]
    assert steps.convert(["q", answer], format)[1] == "\n\n".join(steps.split_steps(answer, format))
    assert steps.convert(["q", answer], format)[1].count("<<") == answer.count("<<")


def test_a_run_on_gsm8k(tmp_path, capsys):
    lines = [message(CLIPS, "How many\n\nclips é?"), "", message("It is 5.\r\n\r\n  #### 5 \r\n", system="other"), message("just so", system=None), message("a\nb")]
    records = made(tmp_path, *lines)
    assert answers(records) == [CLIPS.replace("\n", "\n\n"), "It is 5.\n\n#### 5", "just so", "a\n\nb"]
    assert [r["messages"][:-1] for r in records] == [line["messages"][:-1] for line in lines if line]
    out = tmp_path / "made" / "out.jsonl"
    assert capsys.readouterr().out == f"wrote {out}: 4 examples, 2.00 steps on average; 1 have fewer than two (no JEPA term), 2 no final answer\n"
    assert list(out.parent.iterdir()) == [out] and len(pairs.read_jsonl(out)) == 4


def test_flags_of_a_run(tmp_path, capsys):
    lines = [message(CLIPS), message("alone\nstill\n \nsecond"), message("alone")]
    assert answers(made(tmp_path, *lines, flags=["--format", "paragraphs", "--min_steps", "2"])) == ["alone\nstill\n\nsecond"]
    assert "1 examples, 2.00 steps on average; 0 have fewer than two (no JEPA term), 1 no final answer; 2 left out by --min_steps" in capsys.readouterr().out
    (tmp_path / "made" / "out.jsonl").unlink()
    assert "<<" not in answers(made(tmp_path, *lines, flags=["--drop_calculators"]))[0]


@pytest.mark.parametrize("lines, flags, error", [
    ([message(CLIPS), '{"messages": ['], [], r"IN, line 2: not JSON .*; mend it, or skip such lines with --bad skip"),
    ([message(CLIPS), "", message(" \n")], [], "IN, line 3: assistant is empty; mend it"),
    (["", message(CLIPS), "", message("<<1=1>>\n<<2=2>>")], ["--drop_calculators"], "IN, line 4: assistant holds nothing but calculator annotations; mend it"),
    (["", {"paraphrases": ["a", "b"]}], [], "IN, line 2: paraphrases have no steps; give messages"),
    ([message(CLIPS), {"paraphrases": ["a", "b"]}], ["--bad", "skip"], "IN, line 2: paraphrases among lines of the other kind; make"),
    ([message(CLIPS)], ["--min_steps", "4"], "IN: no answer has 4 steps; lower --min_steps"),
    ([message(CLIPS)], ["--min_steps", "0"], "--min_steps 0: must be at least 1"), ([], [], "IN holds no usable line")])
def test_errors_name_the_line_and_write_nothing(tmp_path, lines, flags, error):
    with pytest.raises(SystemExit) as e:
        made(tmp_path, *lines, flags=flags)
    assert re.match("error: " + error.replace("IN", re.escape(str(tmp_path / "in.jsonl"))), str(e.value)) and "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_lines_are_skipped_by_name(tmp_path, capsys):
    lines = ["x", message(CLIPS), message("<<1=1>>"), message("a\nb")]
    assert len(made(tmp_path, *lines, flags=["--drop_calculators", "--bad", "skip"])) == 2
    said = capsys.readouterr().err
    assert "in.jsonl, line 1: skipped: not JSON" in said and "in.jsonl, line 3: skipped: assistant holds nothing but" in said


def test_files_that_exist_or_cannot_be_written(tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", message(CLIPS))
    with pytest.raises(SystemExit, match="in.jsonl exists: remove it, or choose another --out"):
        steps.main(["--in", source, "--out", source])
    assert json.loads((tmp_path / "in.jsonl").read_text()) == message(CLIPS)
    with pytest.raises(SystemExit, match="nowhere.jsonl: No such file or directory; check the path"):
        steps.main(["--in", str(tmp_path / "nowhere.jsonl"), "--out", str(tmp_path / "o.jsonl")])
    with pytest.raises(SystemExit, match=r"error: .*cannot be written \(.*\); choose another --out"):
        steps.main(["--in", source, "--out", f"{source}/out.jsonl"])

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(steps.os, "replace", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        steps.main(["--in", source, "--out", str(tmp_path / "o.jsonl")])
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_as_a_script_without_torch(tmp_path):
    source = write(tmp_path / "in.jsonl", message(CLIPS))
    code = f"import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = ['--in', {source!r}, '--out', 'o.jsonl']; runpy.run_path({steps.__file__!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "wrote o.jsonl: 1 examples, 3.00 steps" in done.stdout, done.stderr
