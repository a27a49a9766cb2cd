"""SQL that a model wrote: it only reads, within time and memory, in a process of its own.

SQLite looks at the clock only between its steps, and one call of a function can take minutes. So
run_sql() runs this file as a process, which can be killed. It imports the standard library alone.
"""

import contextlib
import itertools
import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

# Bytes that all rows of a result and the process may take.
RESULT_BYTES, MEMORY_BYTES = 2**28, 2**31
ROW_BYTES = 100  # what a row takes beside its text
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

FENCE = re.compile(r"```(?:sql(?:ite)?\b)?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


# ---- the text of a query


def first_statement(text):
    """The first SQL statement of a text, out of its ```sql fence if it has one."""
    fenced = FENCE.search(text)
    text = (fenced[1] if fenced else text).lstrip("; \t\r\n")
    # A semicolon may stand in a text or a comment; the first 100 are tried.
    ends = [mark.end() for mark in itertools.islice(re.finditer(";", text), 100)]
    wholes = (text[:end] for end in ends if sqlite3.complete_statement(text[:end]))
    return next(wholes, text).rstrip("; \t\r\n")


# ---- running it


def run_sql(file, sql, timeout):
    """The rows of one query, a list of tuples; timeout in s.

    sqlite3.Error if the query fails, does more than read, takes too much, or is none.
    """
    asked = json.dumps([str(Path(file).resolve()), sql, RESULT_BYTES, MEMORY_BYTES]).encode()
    # -I and -S: neither the environment nor a file beside this one can be imported.
    command = [sys.executable, "-I", "-S", __file__]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=timeout)
        rows, _, end = done.stdout.rstrip().rpartition(b"\n")
        error = json.loads(end)
    except subprocess.TimeoutExpired:
        error = f"interrupted after {timeout} s"
    except ValueError:  # its process was ended, maybe in the middle of a line
        error = done.stderr.decode(errors="replace").strip() or "interrupted: too much memory"
        error = error.splitlines()[-1]
    if error:  # this is asked before a row is parsed: there may be millions
        raise sqlite3.OperationalError(error)
    return [tuple(ROW.decode(line.decode())) for line in rows.splitlines()]


def answer_query():
    """What the process does: print a line of JSON for each row, and last "" or what is wrong."""
    file, sql, result_bytes, memory_bytes = json.load(sys.stdin)
    # macOS has no such limit, and Windows no such module.
    with contextlib.suppress(OSError, ValueError, ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    size = 0
    try:
        for row in query(file, sql):
            line = json.dumps(row, default=lambda blob: {"bytes": blob.hex()})
            size += ROW_BYTES + len(line)
            if size > result_bytes:
                raise sqlite3.DataError("its result is too large")
            print(line)
        print(json.dumps(""))
    except ERRORS as e:
        print(json.dumps(str(e) or type(e).__name__))


def query(file, sql):
    """The rows of a query, a cursor; one of ERRORS if it does more than read."""
    # immutable: otherwise SQLite writes files -shm and -wal beside the database.
    connection = sqlite3.connect(f"file:{quote(file)}?mode=ro&immutable=1", uri=True)
    # Some databases of Spider aren't UTF-8.
    connection.text_factory = lambda raw: raw.decode(errors="surrogateescape")
    connection.execute("PRAGMA temp_store=MEMORY")
    connection.set_authorizer(authorize)
    cursor = connection.execute(sql)
    if cursor.description is None:
        # An empty text or a comment has no result, so it must not equal an empty one.
        raise sqlite3.ProgrammingError("not a query")
    return cursor


def authorize(action, _, name, *__):
    """SQLite's authorizer: it allows what only reads."""
    loads_code = action == sqlite3.SQLITE_FUNCTION and name.lower() in FORBIDDEN_FUNCTIONS
    return sqlite3.SQLITE_OK if action in ACTIONS and not loads_code else sqlite3.SQLITE_DENY


if __name__ == "__main__":
    answer_query()
