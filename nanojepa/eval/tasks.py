"""What counts as right: the answer that a line of a test file asks for, and who gives it.

A line holds messages; what is right stands in the assistant's text. Its task is one of TASKS.
"""

import os
import re
import reprlib
import sqlite3
import string
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from nanojepa.eval.sql import first_statement, is_ordered, run_sql
from nanojepa.files import json_lines
from nanojepa.records import read_jsonl

LETTERS = "ABCD"
ARTICLES = ("a", "an", "the")


class Question(NamedTuple):
    """A line of a test file. keys: all that its JSON object holds."""

    line: int
    task: str
    system: str | None
    user: str
    target: str  # the assistant's text
    keys: dict


class Databases(NamedTuple):
    """Where databases lie, <folder>/<name>/<name>.sqlite, and the seconds that a query may take."""

    folder: str | None = None
    timeout: float = 10.0


class Query(NamedTuple):
    """What a query must give: these rows of this database, in this order or in any."""

    file: Path
    rows: list
    ordered: bool
    timeout: float


class Task(NamedTuple):
    """answer(question, databases): what texts are compared with; ValueError if there is none.

    is_right(text, answer): whether a text without whitespace at its ends gives that answer.
    chooses: the likeliest of LETTERS is the text, and nothing is generated.
    """

    answer: Callable
    is_right: Callable
    chooses: bool = False


def read_questions(path, task=None, bad="stop"):
    """The Questions of a file of messages; task: of all lines, whatever their own key says."""
    records = read_jsonl(path, bad)
    if records[0].kind != "pairs":
        raise ValueError(
            f"{path} holds groups of paraphrases; an accuracy needs messages; choose similarity"
        )
    loads, questions = dict(json_lines(path)), []
    for record in records:
        keys = loads[record.line]()
        name = task or keys.get("task")
        if name is None or not isinstance(name, str) or name not in TASKS:
            what = "no task" if name is None else f"unknown task {reprlib.repr(name)}"
            raise ValueError(
                f"{path}, line {record.line}: {what}; give --task or a key "
                f'"task", one of {", ".join(TASKS)}'
            )
        questions.append(Question(record.line, name, record.system, *record.views, keys))
    return questions


def answer_of(question, databases=None):
    """What the texts that a model generates are compared with; ValueError if the line lacks it."""
    target = question.target.strip()
    if not target:
        raise ValueError(
            "nothing is left of the assistant's text; mend the line, or set remove_thinking: false "
            "in the model's config.yaml"
        )
    return TASKS[question.task].answer(question._replace(target=target), databases or Databases())


def is_right(task, text, answer):
    """Whether a generated text gives the answer, as answer_of() has it."""
    return TASKS[task].is_right(text.strip(), answer)


# ---- texts


def target_of(question, databases):
    return question.target


def is_exactly(text, answer):
    return text == answer


# ---- numbers


def last_number(question, databases):
    """The number after the last "####"."""
    number = number_after_hashes(question.target, -1)
    if number is None:
        raise ValueError('no "#### number" in the assistant\'s text; mend the line')
    return number


def says_number(text, answer):
    return number_after_hashes(text, 0) == answer


def number_after_hashes(text, which):
    """The number after the first (0) or last (-1) "####" of a text, a Decimal.

    None if no number follows at once on the same line.
    """
    ends = [part.split("\n")[0] for part in text.split("####")[1:]]
    if not ends:
        return None
    end = re.sub(r"[$,%]|(?<=\d) (?=\d{3}(?!\d))", "", ends[which])
    number = re.match(r"\s*+([-+]?)\s*+(\d++(?:\.\d*+)?|\.\d++)(?!\s*[/^]|[eE]\d)", end)
    return Decimal(number[1] + number[2]) if number else None


# ---- short answers


def short_answers(question, databases):
    """The line's list "answers" or "answer", or a text cut at "; "."""
    keys = question.keys
    answers = keys.get("answers", keys.get("answer", question.target))
    if isinstance(answers, str):
        answers = answers.split("; ")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise ValueError('the key "answers" holds no texts; mend the line')
    return answers


def says_one(text, answers):
    """Whether one of the answers stands in the text as whole words."""
    said = f" {normalise(text)} "
    return any(f" {known} " in said for known in map(normalise, answers) if known)


def normalise(text):
    """Lower case, no punctuation, no articles, single spaces: as in SQuAD's and NQ's evaluation."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ARTICLES)


# ---- a letter


def letter_of(question, databases):
    letter = re.match(rf"\(?([{LETTERS}])\b", question.target)
    if letter is None:
        raise ValueError(
            f"the assistant's text {question.target[:20]!r} begins with none of the letters A to "
            "D; mend the line"
        )
    return letter[1]


# ---- SQL


def query_of(question, databases):
    """The Query that the line's own SQL makes on the database of its key "db_id"."""
    name = question.keys.get("db_id")
    # It is a name, and no path that leads elsewhere.
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise ValueError('no "db_id", the name of a database; mend the line')
    if databases.folder is None:
        raise ValueError(
            "its task is spider; give --databases, the folder with <db_id>/<db_id>.sqlite"
        )
    file, sql = Path(databases.folder) / name / f"{name}.sqlite", first_statement(question.target)
    if not os.path.isfile(file):  # unlike Path's, it raises nothing if the name is too long
        raise ValueError(f"no database {str(file)[:300]!r}; check --databases")
    try:
        rows = run_sql(file, sql, databases.timeout)
    except sqlite3.Error as e:
        raise ValueError(
            f"its SQL fails on {file} ({e}); mend the line, or raise --sql_timeout"
        ) from None
    return Query(file, rows, is_ordered(sql), databases.timeout)


def has_result(text, wanted):
    """Whether the text's SQL has the wanted result, a row as often as there."""
    try:
        rows = run_sql(wanted.file, first_statement(text), wanted.timeout)
    except sqlite3.Error:
        return False
    return rows == wanted.rows if wanted.ordered else Counter(rows) == Counter(wanted.rows)


TASKS = {
    "exact": Task(target_of, is_exactly),
    "startswith": Task(target_of, str.startswith),
    "gsm8k": Task(last_number, says_number),
    "nq_open": Task(short_answers, says_one),
    "choice": Task(letter_of, is_exactly, chooses=True),
    "spider": Task(query_of, has_result),
}
