"""SQL that a model wrote: it only reads, within time and memory, in a process of its own.

SQLite looks at the clock only between its steps, and one call of a function can take minutes. So
run_sql() runs this file as a process that the kernel ends. It imports the standard library alone.
"""

import contextlib
import json
import re
import resource
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

# Bytes that one value, all rows of a result, and the process may take.
VALUE_BYTES, RESULT_BYTES, MEMORY_BYTES = 10**6, 2**28, 2**31
ROW_BYTES = 100  # what a row takes beside its text
LONGEST_TIMEOUT = 86_400.0  # s; infinity is no limit that the kernel knows
ACTIONS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_RECURSIVE,
    sqlite3.SQLITE_FUNCTION,
}
FORBIDDEN_FUNCTIONS = ("load_extension", "fts3_tokenizer")
# What a query may raise, for all that is written in it.
ERRORS = (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError)
# JSON has no bytes, so a row holds them as {"bytes": hexadecimal digits}.
ROW = json.JSONDecoder(object_hook=lambda blob: bytes.fromhex(blob["bytes"]))

# SQL's texts, quoted names and comments. One that isn't closed ends with the text, so that no part
# is looked through twice.
QUOTED = "|".join(
    (
        r"'(?:[^']++|'')*+(?:'|\Z)",
        r'"(?:[^"]++|"")*+(?:"|\Z)',
        r"`[^`]*+(?:`|\Z)",
        r"\[[^\]]*+(?:\]|\Z)",
        r"--[^\n]*",
        r"/\*.*?(?:\*/|\Z)",
    )
)
FENCE = re.compile(r"```(?:sql(?:ite)?\b)?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
ORDER_BY = re.compile(r"\border\s+by\b", re.IGNORECASE)


# ---- the text of a query


def first_statement(text):
    """The first SQL statement of a text, out of its ```sql fence if it has one."""
    fenced = FENCE.search(text)
    text = (fenced[1] if fenced else text).lstrip("; \t\r\n")
    pieces = re.finditer(f"{QUOTED}|;", text, re.DOTALL)
    end = next((piece.start() for piece in pieces if piece[0] == ";"), len(text))
    return text[:end].strip()


def is_ordered(sql):
    """Whether a query orders its result.

    Then ORDER BY stands outside parentheses, texts, quoted names and comments.
    """
    bare, opened = [], []  # pieces, and at which of them a parenthesis opens
    for piece in re.split(r"([()])", re.sub(QUOTED, " x ", sql, flags=re.DOTALL)):
        if piece == ")" and opened:
            bare[opened.pop() :] = [" "]
            continue
        if piece == "(":
            opened.append(len(bare))
        bare.append(piece)
    return bool(ORDER_BY.search("".join(bare)))


# ---- running it


def run_sql(file, sql, timeout):
    """The rows of one query, a list of tuples; timeout in s.

    sqlite3.Error if the query fails, does more than read, takes too much, or is none.
    """
    limits = min(timeout, LONGEST_TIMEOUT), RESULT_BYTES, MEMORY_BYTES
    asked = json.dumps([str(Path(file).resolve()), sql, *limits]).encode()
    # -I and -S: neither the environment nor a file beside this one can be imported.
    command = [sys.executable, "-I", "-S", __file__]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=2 * limits[0] + 60)
        rows, _, end = done.stdout.rstrip().rpartition(b"\n")
        error = json.loads(end)
    except (subprocess.TimeoutExpired, ValueError):  # it was ended, maybe in the middle of a line
        error = "interrupted: too much time or memory for one step"
    if error:  # this is asked before a row is parsed: there may be millions
        raise sqlite3.OperationalError(error)
    return [tuple(ROW.decode(line.decode())) for line in rows.splitlines()]


def answer_query():
    """What the process does: print a line of JSON for each row, and last "" or what is wrong."""
    file, sql, timeout, result_bytes, memory_bytes = json.load(sys.stdin)
    limit(resource.RLIMIT_CPU, int(timeout) + 2)
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_AS, memory_bytes)
    size = 0
    try:
        for row in query(file, sql, timeout):
            line = json.dumps(row, default=lambda blob: {"bytes": blob.hex()})
            size += ROW_BYTES + len(line)
            if size > result_bytes:
                raise sqlite3.DataError("its result is too large")
            print(line)
        print(json.dumps(""))
    except ERRORS as e:
        print(json.dumps(str(e) or type(e).__name__))


def limit(kind, value):
    with contextlib.suppress(OSError, ValueError):  # not every system has each of the limits
        resource.setrlimit(kind, (value, value))


def query(file, sql, timeout):
    """Yield the rows of a query; one of ERRORS if it does more than read."""
    # immutable: otherwise SQLite writes files -shm and -wal beside the database.
    connection = sqlite3.connect(f"file:{quote(file)}?mode=ro&immutable=1", uri=True)
    # Some databases of Spider aren't UTF-8.
    connection.text_factory = lambda raw: raw.decode(errors="surrogateescape")
    for pragma in ("query_only=ON", "trusted_schema=OFF", "temp_store=MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_BYTES)
    connection.set_authorizer(authorize)
    deadline = time.monotonic() + timeout
    # It is asked every 1,000 steps of SQLite's machine.
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 1000)
    cursor = connection.execute(sql)
    if cursor.description is None:
        # An empty text or a comment has no result, so it must not equal an empty one.
        raise sqlite3.ProgrammingError("not a query")
    for row in cursor:
        if time.monotonic() > deadline:
            raise sqlite3.OperationalError("interrupted")
        yield row


def authorize(action, _, name, *__):
    """SQLite's authorizer: it allows what only reads."""
    loads_code = action == sqlite3.SQLITE_FUNCTION and name.lower() in FORBIDDEN_FUNCTIONS
    return sqlite3.SQLITE_OK if action in ACTIONS and not loads_code else sqlite3.SQLITE_DENY


if __name__ == "__main__":
    answer_query()
