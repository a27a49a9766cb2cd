"""What counts as right: the answer that a line of a test file asks for, and whether a generated text is it.

Tasks: exact and startswith, the text itself; gsm8k, the number behind ####; nq_open, one of several short answers; choice, a letter;
spider, a SQL query with the right result. SQL that a model has written is run by the sqlite3 module on a database opened for
reading, one statement, in a process of its own with limits on time, memory and result.
"""
import contextlib
import json
import os
import re
import resource
import sqlite3
import string
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path
from urllib.parse import quote

TASKS = ("exact", "startswith", "gsm8k", "nq_open", "choice", "spider")
# SQL's texts, quoted names and comments; one that isn't closed ends with the text, so that none is looked through twice
QUOTED = r"'(?:[^']++|'')*+(?:'|\Z)|\"(?:[^\"]++|\"\")*+(?:\"|\Z)|`[^`]*+(?:`|\Z)|\[[^\]]*+(?:\]|\Z)|--[^\n]*|/\*.*?(?:\*/|\Z)"
SQL_ACTIONS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_FUNCTION}
SQL_ERRORS = (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError)  # what a query may raise, for all that is written in it
SQL_ROW = json.JSONDecoder(object_hook=lambda blob: bytes.fromhex(blob["bytes"]))  # of what answer_query prints
SQL_VALUE, SQL_RESULT, SQL_MEMORY = 10**6, 2**28, 2**31  # bytes that one value, all rows of a result, and its process may take


def answer_of(example, databases=None, timeout=10.0):
    """What a prediction is compared with; ValueError where the example doesn't say it."""
    task, target, record = example["task"], example["target"].strip(), example["record"]
    if not target:
        raise ValueError("nothing is left of the assistant's text; mend the line, or set remove_thinking: false in the model's config.yaml")
    if task == "gsm8k":
        if (number := number_behind_hashes(target, -1)) is None:
            raise ValueError('no "#### number" in the assistant\'s text; mend the line')
        return number
    if task == "nq_open":
        answers = record.get("answers", record.get("answer", target))
        answers = answers.split("; ") if isinstance(answers, str) else answers
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            raise ValueError('the key "answers" holds no texts; mend the line')
        return answers
    if task == "choice":
        if not (letter := re.match(r"\(?([ABCD])\b", target)):
            raise ValueError(f"the assistant's text {target[:20]!r} begins with none of the letters A to D; mend the line")
        return letter[1]
    if task == "spider":
        name = record.get("db_id")
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:  # a name, no path that leads elsewhere
            raise ValueError('no "db_id", the name of a database; mend the line')
        if databases is None:
            raise ValueError("its task is spider; give --databases, the folder with <db_id>/<db_id>.sqlite")
        file, sql = Path(databases) / name / f"{name}.sqlite", first_statement(target)
        if not os.path.isfile(file):  # unlike Path's it raises nothing for a name that is too long
            raise ValueError(f"no database {str(file)[:300]!r}; check --databases")
        try:
            return file, run_sql(file, sql, timeout), is_ordered(sql)
        except sqlite3.Error as e:
            raise ValueError(f"its SQL fails on {file} ({e}); mend the line, or raise --sql_timeout") from None
    return target


def is_right(task, text, answer, timeout=10.0):
    """Whether a generated text is the answer, as answer_of gives it."""
    text = text.strip()
    if task == "gsm8k":
        return number_behind_hashes(text, 0) == answer
    if task == "nq_open":
        said = f" {normalise(text)} "
        return any(f" {known} " in said for known in map(normalise, answer) if known)
    if task == "spider":
        file, wanted, ordered = answer
        try:
            rows = run_sql(file, first_statement(text), timeout)
        except sqlite3.Error:
            return False
        return rows == wanted if ordered else Counter(rows) == Counter(wanted)
    return text.startswith(answer) if task == "startswith" else text == answer


def number_behind_hashes(text, which):
    """The number behind the first (0) or last (-1) "####" of a text as a Decimal, None where none follows at once."""
    ends = [line.split("\n")[0] for line in text.split("####")[1:]]
    if not ends:
        return None
    end = re.sub(r"[$,%]|(?<=\d) (?=\d{3}(?!\d))", "", ends[which])
    number = re.match(r"\s*+([-+]?)\s*+(\d++(?:\.\d*+)?|\.\d++)(?!\s*[/^]|[eE]\d)", end)
    return Decimal(number[1] + number[2]) if number else None


def normalise(text):
    """Lower case, no punctuation, no articles, single spaces: as SQuAD's evaluation does, and NQ's."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def first_statement(text):
    """The first SQL statement of a text, out of its ```sql fence if it has one."""
    fenced = re.search(r"```(?:sql(?:ite)?\b)?(.*?)(?:```|\Z)", text, re.DOTALL | re.IGNORECASE)
    text = (fenced[1] if fenced else text).lstrip("; \t\r\n")
    end = next((m.start() for m in re.finditer(f"{QUOTED}|;", text, re.DOTALL) if m[0] == ";"), len(text))
    return text[:end].strip()


def is_ordered(sql):
    """Whether a query orders its result: ORDER BY outside parentheses, texts, quoted names and comments."""
    bare, opened = [], []  # pieces, and where among them an open parenthesis stands
    for piece in re.split(r"([()])", re.sub(QUOTED, " x ", sql, flags=re.DOTALL)):
        if piece == ")" and opened:
            bare[opened.pop():] = [" "]
            continue
        if piece == "(":
            opened.append(len(bare))
        bare.append(piece)
    return bool(re.search(r"\border\s+by\b", "".join(bare), re.IGNORECASE))


def run_sql(file, sql, timeout):
    """The rows of one query, which may only read; sqlite3.Error where it fails, wants more, or is none.

    SQLite looks at the clock between its steps alone, and one call of a function can take minutes: so this file runs it, as a
    process that the kernel ends.
    """
    timeout = min(timeout, 86_400)  # inf is no limit of the kernel's
    asked = json.dumps([str(Path(file).resolve()), sql, timeout, SQL_RESULT, SQL_MEMORY])
    try:
        done = subprocess.run([sys.executable, "-I", "-S", __file__], input=asked.encode(), capture_output=True, timeout=2 * timeout + 60)
        rows, _, end = done.stdout.rstrip().rpartition(b"\n")
        end = json.loads(end)
    except (subprocess.TimeoutExpired, ValueError):
        end = None  # it was ended from outside, maybe in the middle of a line
    if end != "":  # known before a row is parsed: there may be millions
        raise sqlite3.OperationalError(end if isinstance(end, str) else "interrupted: too much time or memory for one step")
    return [tuple(SQL_ROW.decode(line.decode())) for line in rows.splitlines()]


def answer_query():
    """The process of run_sql: a line of JSON a row, and last an empty text, or what is wrong."""
    file, sql, timeout, most, memory = json.load(sys.stdin)
    for kind, limit in ((resource.RLIMIT_CPU, int(timeout) + 2), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_AS, memory)):
        with contextlib.suppress(OSError, ValueError):  # not every system has each of them
            resource.setrlimit(kind, (limit, limit))
    try:
        size = 0
        for row in query(file, sql, timeout):
            line = json.dumps(row, default=lambda blob: {"bytes": blob.hex()})
            size += 100 + len(line)
            if size > most:
                raise sqlite3.DataError("its result is too large")
            print(line)
        print(json.dumps(""))
    except SQL_ERRORS as e:
        print(json.dumps(str(e) or type(e).__name__))


def query(file, sql, timeout):
    """Yield the rows of a query; one of SQL_ERRORS where it does more than read."""
    connection = sqlite3.connect(f"file:{quote(file)}?mode=ro&immutable=1", uri=True)  # immutable: else SQLite writes -shm and -wal files
    connection.text_factory = lambda raw: raw.decode(errors="surrogateescape")  # some databases of Spider aren't UTF-8
    for pragma in ("query_only=ON", "trusted_schema=OFF", "temp_store=MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, SQL_VALUE)
    allow = lambda action, _, name, *__: action in SQL_ACTIONS and not (
        action == sqlite3.SQLITE_FUNCTION and name.lower() in ("load_extension", "fts3_tokenizer"))
    connection.set_authorizer(lambda *what: sqlite3.SQLITE_OK if allow(*what) else sqlite3.SQLITE_DENY)
    deadline = time.monotonic() + timeout
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 1000)  # every so many steps of SQLite's machine
    cursor = connection.execute(sql)
    if cursor.description is None:  # an empty text, or a comment: it has no result, so it must not equal an empty one
        raise sqlite3.ProgrammingError("not a query")
    for row in cursor:
        if time.monotonic() > deadline:
            raise sqlite3.OperationalError("interrupted")
        yield row


if __name__ == "__main__":
    answer_query()
