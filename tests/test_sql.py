"""SQL that a model wrote: it reads and does nothing else, within its time and memory."""

import json
import sqlite3
import time
from types import SimpleNamespace

import pytest

from databases import make_pets
from nanojepa.eval import sql

ENDLESS = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT "


@pytest.fixture
def database(tmp_path):
    return make_pets(tmp_path)


@pytest.fixture
def run(database):
    """Runs a query on the database pets."""

    def run_query(query, timeout=5):
        return sql.run_sql(database / "pets" / "pets.sqlite", query, timeout)

    return run_query


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- only reading

WRITING = [
    "INSERT INTO pet VALUES ('x', 1)",
    "DELETE FROM pet",
    "DROP TABLE pet",
    "CREATE TABLE t (a)",
    "CREATE TEMP TABLE t (a)",
    "CREATE TEMP VIEW v AS SELECT 1",
    "CREATE TEMP TRIGGER t AFTER INSERT ON pet BEGIN SELECT 1; END",
    "CREATE VIRTUAL TABLE v USING fts5(a)",
    "ALTER TABLE pet RENAME TO dog",
    "WITH t AS (SELECT 1) INSERT INTO pet SELECT 1, 2",
    "UPDATE sqlite_master SET sql = ''",
    "PRAGMA query_only=OFF",
    "PRAGMA user_version=7",
    "PRAGMA journal_mode=WAL",
    "PRAGMA writable_schema=ON",
    "PRAGMA trusted_schema=ON",
    "PRAGMA temp_store_directory='.'",
    "SELECT * FROM pragma_table_info('pet')",
    "SELECT * FROM pragma_database_list",
    "ATTACH 'other.sqlite' AS o",
    "ATTACH ':memory:' AS o",
    "ATTACH 'file:made.sqlite?mode=rwc' AS o",
    "DETACH main",
    "VACUUM",
    "VACUUM INTO 'copy.sqlite'",
    "REINDEX pet",
    "ANALYZE",
    "BEGIN",
    "SAVEPOINT s",
    "SELECT load_extension('x')",
    "SELECT Load_Extension('x', 'y')",
    "SELECT fts3_tokenizer('simple')",
    "SELECT fts3_tokenizer('simple', x'00')",
]
NO_RESULT = {
    "SELECT 1; DROP TABLE pet": "one statement",
    "": "not a query",
    "-- nothing": "not a query",
    ".shell touch made": "syntax error",
    ".output made\nSELECT 1": "syntax error",
    "SELECT '\0'": "null character",
    "SELECT '\ud800'": "surrogates",
    "SELECT * FROM nowhere": "no such table",
    "SELECT readfile('/etc/hostname')": "no such function",
    "SELECT writefile('made', 'x')": "no such function",
    "SELECT edit('x', 'touch made')": "no such function",
    "SELECT length(zeroblob(2000000000))": "too big",
    "SELECT (" + "(" * 100_000: "overflow|too large|too big",
    "SELECT 1" + " UNION SELECT 1" * 100_000: "too many terms|too big",
}
DENIED = "not authorized|authorization denied|readonly|may not be modified|not a query|no such func"


@pytest.mark.parametrize(
    "query, error", [*((query, DENIED) for query in WRITING), *NO_RESULT.items()]
)
def test_sql_that_does_more_than_read_fails_and_changes_nothing(
    database, run, monkeypatch, query, error
):
    monkeypatch.chdir(database)
    before = snapshot(database)
    with pytest.raises(sqlite3.Error, match=error):
        run(query)
    assert snapshot(database) == before


def test_each_layer_against_writing_holds_alone(database, monkeypatch):
    file, writing = str(database / "pets" / "pets.sqlite"), "INSERT INTO pet VALUES ('x', 1)"
    for query in ("CREATE TEMP TABLE t (a)", writing):
        with pytest.raises(sqlite3.Error, match="not authorized"):  # by the authorizer
            sql.query(file, query)
    monkeypatch.setattr(sql, "ACTIONS", set(range(100)))
    with pytest.raises(sqlite3.Error, match="readonly"):  # mode=ro
        sql.query(file, writing)


def test_reading_a_database_with_a_write_ahead_log_leaves_no_file(database, run):
    connection = sqlite3.connect(database / "pets" / "pets.sqlite")
    assert connection.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
    connection.close()
    before = snapshot(database)
    assert run("SELECT count(*) FROM pet") == [(5,)] and snapshot(database) == before


# ---- time and memory


@pytest.mark.parametrize("what", ["count(*) FROM t", "n FROM t", "n FROM t ORDER BY n DESC"])
def test_an_endless_query_is_stopped(run, what):
    began = time.monotonic()
    with pytest.raises(sqlite3.Error, match="interrupted"):
        run(ENDLESS + what, 0.3)
    assert 0.3 <= time.monotonic() - began < 5


@pytest.mark.parametrize(
    "query",
    [
        "SELECT instr(hex(zeroblob(490000)), hex(zeroblob(245000)) || 'b')",
        "SELECT length(printf('%.*c', 2000000000, 'x'))",
    ],
)
def test_one_step_that_takes_long_is_ended(run, query):
    """SQLite looks at the clock only between steps: left alone, these take ten seconds and more."""
    began = time.monotonic()
    try:
        run(query, 0.1)
    except sqlite3.Error as e:
        assert "interrupted" in str(e) or "too big" in str(e)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "query",
    [
        f"SELECT {', '.join(['randomblob(999999)'] * 1500)}",
        ENDLESS + "randomblob(99999) AS b FROM t ORDER BY b",
        ENDLESS + "count(*) FROM (SELECT DISTINCT randomblob(99999) FROM t)",
    ],
)
def test_memory_has_a_limit_and_no_file_takes_what_is_over_it(database, run, monkeypatch, query):
    monkeypatch.setattr(sql, "MEMORY_BYTES", 2**28)
    monkeypatch.setenv("SQLITE_TMPDIR", str(database))
    before = snapshot(database)
    with pytest.raises(sqlite3.Error, match="MemoryError|memory"):
        run(query, 60)
    assert snapshot(database) == before


def test_an_endless_result_is_not_parsed(run, monkeypatch):
    """Rows that end with an error are nobody's result; reading them would take longer than SQL."""
    parsed, loads = [], json.loads

    def note(line):
        parsed.append(line)
        return [line]

    monkeypatch.setattr(sql, "ROW", SimpleNamespace(decode=note))
    monkeypatch.setattr(sql.json, "loads", lambda line, **more: note(line) and loads(line, **more))
    overflow = "SELECT 1 UNION ALL SELECT abs(-9223372036854775808)"
    for query, error in ((ENDLESS + "n FROM t", "interrupted"), (overflow, "overflow")):
        with pytest.raises(sqlite3.Error, match=error):
            run(query, 0.3)
    assert [loads(line) for line in parsed] == ["integer overflow"]


def test_a_large_result_is_stopped(run, monkeypatch):
    monkeypatch.setattr(sql, "RESULT_BYTES", 10_000)
    began = time.monotonic()
    with pytest.raises(sqlite3.Error, match="too large"):
        run(ENDLESS + "n FROM t", 20)
    assert time.monotonic() - began < 5
    assert len(run(ENDLESS + "n FROM t LIMIT 50", 60)) == 50


# ---- what works


def test_queries_that_only_read_work(run):
    assert run("SELECT count(*), upper('a') FROM pet") == [(5, "A")]
    assert run(ENDLESS + "max(n) FROM (SELECT n FROM t LIMIT 9)") == [(9,)]
    inner = "(SELECT max(name) FROM pet WHERE name LIKE 'T%')"
    assert run(f"SELECT age FROM pet WHERE name = {inner}") == [(3,)]
    assert len(run("SELECT name FROM pet WHERE age = 9")[0][0]) == 2
    values = "1.5, x'00ff', NULL, 9223372036854775807, 'é' || char(10, 0), 1e999, -0.1, ''"
    kept = (1.5, b"\x00\xff", None, 2**63 - 1, "é\n\0", float("inf"), -0.1, "")
    assert run(f"SELECT {values}") == [kept]
    assert run("SELECT 1 WHERE 0") == []


@pytest.mark.parametrize(
    "text, statement",
    [
        ("SELECT 1", "SELECT 1"),
        ("SELECT 1;;", "SELECT 1"),
        ("; SELECT 1", "SELECT 1"),
        ("```sql\nSELECT 1;\n```", "SELECT 1"),
        ("```sqlite SELECT 1```", "SELECT 1"),
        ("Here:\n```SQL\nSELECT 1\n``` done; yes", "SELECT 1"),
        ("```\nSELECT 1", "SELECT 1"),
        ("SELECT ';' FROM t; DROP TABLE t", "SELECT ';' FROM t"),
        ("SELECT `a;b` -- c;\nFROM t; x", "SELECT `a;b` -- c;\nFROM t"),
        ("SELECT 1 /* ; not closed", "SELECT 1 /* ; not closed"),
        ("SELECT 1; -- it's;", "SELECT 1"),
        ("", ""),
        (";", ""),
    ],
)
def test_first_statement(text, statement):
    assert sql.first_statement(text) == statement
