"""What counts as right, task by task."""

import json
import re
import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from databases import make_pets
from nanojepa.eval import tasks
from nanojepa.eval.sql import first_statement
from nanojepa.eval.tasks import (
    Question,
    answer_of,
    is_right,
    number_after_hashes,
    plain_words,
    read_questions,
)


@pytest.fixture
def database(tmp_path):
    return make_pets(tmp_path)


def question(task, target, **keys):
    return Question(1, task, None, "u", target, keys)


def right(task, text, target, **keys):
    return is_right(task, text, answer_of(question(task, target, **keys)))


def test_exact_and_startswith():
    assert right("exact", " (ab)\n", "(ab) ")
    assert not right("exact", "(ab)c", "(ab)") and not right("exact", "", "(ab)")
    assert right("startswith", "\n(ab)c", "(ab) ")
    assert not right("startswith", "(a", "(ab)") and not right("startswith", "", "(ab)")
    with pytest.raises(ValueError, match="nothing is left"):  # every text would begin with it
        answer_of(question("startswith", " "))


# ---- numbers


@pytest.mark.parametrize(
    "text, expected",
    [
        ("so it is\n#### 1,234", "1234"),
        ("#### $18.00", "18"),
        ("####5", "5"),
        ("#### 12.50 %", "12.5"),
        ("#### -3", "-3"),
        ("#### - 3", "-3"),
        ("#### -$3.", "-3"),
        ("#### 1 000 000", "1000000"),
        ("#### 42 apples", "42"),
        ("#### .5", "0.5"),
        ("#### 7\n#### 8", "7"),
        ("#### 5 10", "5"),
        *((text, None) for text in ("#### ", "####", "####\n42", "42", "", "#### x42")),
        *((text, None) for text in ("#### 1/2", "#### 12/3", "#### 2e3")),
    ],
)
def test_number_after_hashes(text, expected):
    assert number_after_hashes(text, 0) == (None if expected is None else Decimal(expected))


def test_gsm8k_takes_the_last_of_the_reference_and_the_first_generated():
    assert right("gsm8k", "#### 8 #### 9", "#### 7 or\n#### 8")
    assert not right("gsm8k", "#### 9 #### 8", "#### 7 or\n#### 8")
    assert right("gsm8k", "#### 8.0", "#### 8") and not right("gsm8k", "8", "#### 8")
    assert not right("gsm8k", "", "#### 0") and not right("gsm8k", "####", "#### 0")
    big = 2**53 + 1  # which a float can't tell from 2**53
    assert right("gsm8k", f"#### {big}", f"#### {big}")
    assert not right("gsm8k", f"#### {big - 1}", f"#### {big}")
    with pytest.raises(ValueError, match='no "#### number"'):
        answer_of(question("gsm8k", "the answer is 8"))


FORMS = ["{:,}", "{}", "{}.0", "{:,}.00", "$ {}", "{} %", "  {}."]


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12), st.sampled_from(FORMS))
def test_writing_does_not_change_a_number(number, form):
    assert right("gsm8k", "because\n#### " + form.format(number), f"#### {number}")
    assert not right("gsm8k", "#### " + form.format(number + 1), f"#### {number}")


@settings(deadline=None)
@given(st.text(" \n\t-+.,$%/^eE0123456789x\u00a0", max_size=30))
def test_a_number_is_what_it_is_with_backtracking(text):
    end = re.sub(r"[$,%]|(?<=\d) (?=\d{3}(?!\d))", "", text.split("\n")[0])
    number = re.match(r"\s*([-+]?)\s*(\d++(?:\.\d*+)?|\.\d++)(?!\s*[/^]|[eE]\d)", end)
    expected = Decimal(number[1] + number[2]) if number else None
    assert number_after_hashes("####" + text, 0) == expected


def test_long_texts_are_judged_in_linear_time():
    """Texts of a megabyte: if each place is looked at n times, 8,000 characters take seconds."""
    n, began = 10**6, time.monotonic()
    assert number_after_hashes("#### " + " " * n + "x", 0) is None
    assert number_after_hashes("#### " + " " * n + "7", 0) == 7
    for mark in ("[", "'", '"', "`", "/*", "/*/", "('", "';", "[;", ";"):
        first_statement(mark * (n // len(mark)))
    assert time.monotonic() - began < 10


# ---- short answers, and a letter


@pytest.mark.parametrize(
    "text, target, expected",
    [
        ("Paris", "paris", True),
        ("It is the Eiffel Tower!", "Eiffel tower", True),
        ("the U.S.A.", "USA; America", True),
        ("in America", "USA; America", True),
        ("a;b", "a;b", True),
        ("parisian", "Paris", False),
        ("comparison", "Paris", False),
        ("Par is", "Paris", False),
        ("Paris", "Paris France", False),
        ("", "Paris", False),
        ("vitamin A", "A", True),
        ("vitamin B", "A", False),
        ("The The", "the the", True),
        ("The Beatles", "The The", False),
        ("?!", "...", False),
        ("x", "y; ; z", False),
    ],
)
def test_nq_open(text, target, expected):
    assert right("nq_open", text, target) == expected


def test_nq_open_prefers_the_answers_of_the_line():
    assert right("nq_open", "two", "one", answers=["two", "three"])
    assert not right("nq_open", "one", "one", answers=["two", "three"])
    assert right("nq_open", "two", "one", answer="zwei; two")
    for wrong in ([], [1], {"a": 1}):
        with pytest.raises(ValueError, match="holds no texts"):
            answer_of(question("nq_open", "one", answers=wrong))


@settings(deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1), st.text())
def test_an_empty_generation_answers_nothing_and_a_quoted_answer_is_found(answers, around):
    for empty in ("", " \n", "."):
        assert not is_right("nq_open", empty, answers)
    quoted = is_right("nq_open", f"{around} {answers[0]} {around}", answers[:1])
    assert quoted == bool(plain_words(answers[0]))


def test_the_letter_of_a_choice():
    letters = [answer_of(question("choice", t)) for t in ("B", " C) no", "(D)", "A. It")]
    assert letters == ["B", "C", "D", "A"]
    for wrong in ("Because", "E", "b", "the A"):
        with pytest.raises(ValueError, match="none of the letters"):
            answer_of(question("choice", wrong))


# ---- SQL


def test_spider_compares_results(database, monkeypatch):
    def gives(text, target):
        wanted = question("spider", target, db_id="pets")
        return is_right("spider", text, answer_of(wanted, database))

    young = "SELECT name, age FROM pet WHERE age < 9"
    assert gives(f"```sql\n{young} ORDER BY age DESC;\n```", young)  # in any order
    # A row that is there twice counts twice.
    assert not gives("SELECT DISTINCT name, age FROM pet WHERE age < 9", young)
    assert not gives("SELECT age, name FROM pet WHERE age < 9", young)
    assert not gives("SELECT name FROM", young)
    by_age = "SELECT age FROM pet ORDER BY age"
    assert gives("SELECT age FROM pet ORDER BY 1", by_age)
    assert not gives("SELECT age FROM pet ORDER BY 1 DESC", by_age)
    none = "SELECT name FROM pet WHERE age > 99"
    assert gives("SELECT age FROM pet WHERE age = 77", none)
    # What has no result at all doesn't equal an empty one.
    assert not any(gives(text, none) for text in ("", "-- no", "DELETE FROM pet"))
    endless = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT n FROM t"
    monkeypatch.setattr(tasks, "SQL_SECONDS", 1.0)
    assert not gives(endless, young)


NO_NAMES = ("../pets", "..", ".", "", "/etc", "pets/../pets", None, 5, ["pets"])


@pytest.mark.parametrize(
    "keys, target, message",
    [
        ({}, "SELECT 1", 'no "db_id"'),
        *(({"db_id": name}, "SELECT 1", 'no "db_id"') for name in NO_NAMES),
        *(({"db_id": n}, "SELECT 1", "no database") for n in ("a\0b", "a" * 5000, "a\nb")),
        ({"db_id": "cats"}, "SELECT 1", r"no database .*cats.sqlite"),
        ({"db_id": "pets"}, "SELECT x FROM pet", "SQL fails on .*pets.sqlite .*no such column"),
    ],
)
def test_spider_lines_that_cannot_be_judged(database, keys, target, message):
    with pytest.raises(ValueError, match=message) as e:
        answer_of(question("spider", target, **keys), database)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_spider_needs_its_databases():
    with pytest.raises(ValueError, match="give --databases"):
        answer_of(question("spider", "SELECT 1", db_id="pets"))


# ---- a file


def write(path, *lines):
    roles = ("user", "assistant")
    for n, (texts, keys) in enumerate(lines):
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        with open(path, "a" if n else "w") as file:
            file.write(json.dumps({"messages": messages, **keys}) + "\n")
    return path


def test_the_task_is_never_guessed(tmp_path):
    path = tmp_path / "gsm8k_test.jsonl"
    write(path, ("u1", {"task": "gsm8k"}), ("u2", {}))
    with pytest.raises(ValueError, match=r"gsm8k_test.jsonl, line 2: no task; give --task"):
        read_questions(path)
    assert [q.task for q in read_questions(path, "exact")] == ["exact", "exact"]  # over the lines'
    for wrong in ("gsm9k", ["exact"]):
        write(path, ("u1", {"task": "exact"}), ("u2", {"task": wrong}))
        with pytest.raises(ValueError, match=r"line 2: unknown task .*; give --task"):
            read_questions(path)


def test_line_numbers_are_those_of_the_file(tmp_path):
    path = write(tmp_path / "x.jsonl", ("ua", {"task": "exact", "more": 1}))
    path.write_text("\n" + path.read_text())
    (found,) = read_questions(path)
    assert found == Question(2, "exact", None, "u", "a", json.loads(path.read_text()))
