"""What counts as right: the answer that a line of a test file asks for, and who gives it.

A line holds messages; what is right stands in the assistant's text. Its task is one of TASKS.
"""

import functools
import os
import re
import reprlib
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from nanojepa.eval.sql import first_statement, run_sql
from nanojepa.readers import open_rows
from nanojepa.records import read_rows, recorder
from nanojepa.texts import normalise, plain_words

LETTERS = "ABCD"
SQL_SECONDS = 10.0  # that a query may take


class Question(NamedTuple):
    """A line of a test file. keys: all that its JSON object holds."""

    line: int
    task: str
    system: str | None
    user: str
    target: str  # the assistant's text
    keys: dict


class Query(NamedTuple):
    """What a query must give: these rows of this database, in this order or in any."""

    file: Path
    rows: list
    ordered: bool


class Task(NamedTuple):
    """answer(question, databases): what texts are compared with; ValueError if there is none.

    databases: the folder of <name>/<name>.sqlite, or None.
    is_right(text, answer): whether a text without whitespace at its ends gives that answer.
    upstream(text, question, answer): what the scoring of LLM-JEPA's evaluate.py says.
    chooses: the likeliest of LETTERS is the text, and nothing is generated.
    """

    answer: Callable
    is_right: Callable
    upstream: Callable
    chooses: bool = False


def read_questions(path, task=None, bad="stop", columns=None):
    """The Questions of a file of messages; task: of all lines, whatever their own key says."""
    rows, record = open_rows(path), recorder(path, columns)
    return read_rows(
        rows.items, lambda n, raw: make_question(n, rows.parse(raw), record, task), path, bad
    )


def make_question(number, row, record, task=None):
    """The Question of a row; record: a recorder()."""
    pair, name = record(number, row), task or row.get("task")
    if pair.kind != "pairs":
        raise ValueError("it holds paraphrases; an accuracy needs messages; choose similarity")
    if not isinstance(name, str) or name not in TASKS:
        what = "no task" if name is None else f"unknown task {reprlib.repr(name)}"
        raise ValueError(f'{what}; give --task or a key "task", one of {", ".join(TASKS)}')
    return Question(number, name, pair.system, *pair.views, row)


def answer_of(question, databases=None):
    """What the texts that a model generates are compared with; ValueError if the line lacks it."""
    target = question.target.strip()
    if not target:
        raise ValueError(
            "nothing is left of the assistant's text; mend the line, or set remove_thinking: false "
            "in the model's config.yaml"
        )
    return TASKS[question.task].answer(question._replace(target=target), databases)


def is_right(task, text, answer):
    """Whether a generated text gives the answer, as answer_of() has it."""
    return TASKS[task].is_right(text.strip(), answer)


def judge(question, text, answer):
    """A line of predictions: whether the text is right, and what upstream says if it differs."""
    right = is_right(question.task, text, answer)
    judged = {"line": question.line, "prediction": text, "correct": right}
    upstream = bool(TASKS[question.task].upstream(text.strip(), question, answer))
    return judged if upstream == right else judged | {"upstream": upstream}


# ---- texts


def target_of(question, databases):
    return question.target


def is_exactly(text, answer):
    return text == answer


def upstream_exact(text, question, answer):
    return text == question.target


def upstream_startswith(text, question, answer):
    return text.startswith(question.target)


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
    end = unicodedata.normalize("NFKC", ends[which])
    end = re.sub(r"[$,%]|(?<=\d) (?=\d{3}(?!\d))", "", end)
    number = re.match(r"\s*+([-+]?)\s*+(\d++(?:\.\d*+)?|\.\d++)(?!\s*[/^]|[eE]\d)", end)
    return Decimal(number[1] + number[2]) if number else None


def upstream_number(text, question, answer):
    """The last line's text after "#### ", as a text; without one on either side it is right."""
    said, wanted = (re.search(r"\n#### (.+)$", given) for given in (text, question.target))
    return (said and said[1]) == (wanted and wanted[1])


# ---- short answers


def short_answers(question, databases):
    """The line's "answers" or "answer" with its "aliases", or the assistant's text cut at "; "."""
    keys = question.keys
    answers = keys.get("answers", keys.get("answer", question.target))
    if isinstance(answers, dict):  # as TriviaQA has them
        answers = [answers.get("value"), *(answers.get("aliases") or [])]
    if isinstance(answers, str):
        answers = answers.split("; ")
    aliases = keys.get("aliases") or []
    if not isinstance(answers, list) or not isinstance(aliases, list):
        raise ValueError('the keys "answers" and "aliases" hold no texts; mend the line')
    answers = [*answers, *aliases]
    if not all(isinstance(a, str) for a in answers) or not any(map(str.strip, answers)):
        raise ValueError('the key "answers" holds no texts; mend the line')
    return answers


def says_one(text, answers):
    """Whether one of the answers stands in the text as whole words."""
    return any(stands_in(answer, text) for answer in answers)


def stands_in(answer, text):
    for words in (normalise, plain_words):  # an answer may be nothing but an article: vitamin A
        if known := words(answer):
            return f" {' '.join(known)} " in f" {' '.join(words(text))} "
    return answer.strip() == text != ""  # nothing but punctuation


def upstream_short(text, question, answer):
    """A part of the text, cut at "; ", stands in the target; an empty one does too."""
    return any(part in question.target for part in text.split("; "))


# ---- a letter


def letter_of(question, databases):
    letter = first_letter(question.target)
    if letter is None:
        raise ValueError(
            f"the assistant's text {question.target[:20]!r} begins with none of the letters A to "
            "D; mend the line"
        )
    return letter


def first_letter(text):
    """The letter that a text begins with, as B, (B) or B. Paris, or None."""
    letter = re.match(rf"\(?([{LETTERS}])\b", text)
    return letter and letter[1]


def says_letter(text, answer):
    return first_letter(text) == answer


# ---- SQL


def query_of(question, databases):
    """The Query that the line's own SQL makes on the database of its key "db_id"."""
    name = question.keys.get("db_id")
    # It is a name, and no path that leads elsewhere.
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise ValueError('no "db_id", the name of a database; mend the line')
    if databases is None:
        raise ValueError(
            "its task is spider; give --databases, the folder with <db_id>/<db_id>.sqlite"
        )
    file, sql = Path(databases) / name / f"{name}.sqlite", first_statement(question.target)
    if not os.path.isfile(file):  # unlike Path's, it raises nothing if the name is too long
        raise ValueError(f"no database {str(file)[:300]!r}; check --databases")
    try:
        rows = run_sql(file, sql, SQL_SECONDS)
    except sqlite3.Error as e:
        raise ValueError(f"its SQL fails on {file} ({e}); mend the line") from None
    return Query(file, rows, "order by" in " ".join(sql.lower().split()))  # Spider's own rule


@functools.lru_cache(maxsize=1)  # both ways of scoring ask for it
def rows_of(file, text):
    """The rows of a text's SQL, or None if it fails."""
    try:
        return run_sql(file, first_statement(text), SQL_SECONDS)
    except sqlite3.Error:
        return None


def has_result(text, wanted):
    """Whether the text's SQL has the wanted result, a row as often as there."""
    rows = rows_of(wanted.file, text)
    if rows is None:
        return False
    return rows == wanted.rows if wanted.ordered else Counter(rows) == Counter(wanted.rows)


def upstream_rows(text, question, wanted):
    """The same rows, printed, in the same order; a query that fails prints nothing."""
    rows = rows_of(wanted.file, text) or []
    return [printed(row) for row in rows] == [printed(row) for row in wanted.rows]


def printed(row):
    return "|".join("" if value is None else str(value) for value in row)


TASKS = {
    "exact": Task(target_of, is_exactly, upstream_exact),
    "startswith": Task(target_of, str.startswith, upstream_startswith),
    "gsm8k": Task(last_number, says_number, upstream_number),
    "nq_open": Task(short_answers, says_one, upstream_short),
    "choice": Task(letter_of, says_letter, upstream_exact, chooses=True),
    "spider": Task(query_of, has_result, upstream_rows),
}
