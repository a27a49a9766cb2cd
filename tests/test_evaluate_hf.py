"""evaluate.py on Hugging Face models: what counts as right, SQL that can do no harm, generation, resuming, similarity of views."""
import contextlib
import io
import json
import re
import sqlite3
import sys
import time
from decimal import Decimal
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

pytest.importorskip("transformers")
import evaluate
import scoring
from chat import Chat
from conftest import ROOT, run_cli
from hf import make_folder, make_model, make_tokenizer, write_messages

QUESTIONS = ["What is 2 + 2?", "lines with words", "ein Haus, ein säh; 12345 67890 and lines with a vowel, zero or more times", "a", "Say it in words, please. 7"]


def evaluated(*flags):
    """The last line that evaluate.py prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        evaluate.main([str(f) for f in flags])
    return json.loads(out.getvalue().splitlines()[-1])


def write_lines(path, *records):
    """A file of (user, assistant, other keys)."""
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}], **more}) + "\n" for u, a, more in records))
    return str(path)


def example(task, target, **record):
    return {"task": task, "target": target, "record": record}


def right(task, text, target, **record):
    return scoring.is_right(task, text, scoring.answer_of(example(task, target, **record)))


# ---- what counts as right


@settings(deadline=None)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_are_where_the_share_is_just_plausible(case):
    hits, n = case
    low, high = evaluate.wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1 and (hits > 0 or low == 0) and (hits < n or high == 1) and high > low
    for end in {low, high} - {0.0, 1.0}:  # the score test: |share - p| is z standard errors of p
        assert abs(hits / n - end) == pytest.approx(1.959964 * (end * (1 - end) / n) ** 0.5, rel=1e-5, abs=1e-9)


def test_wilson_known_values():
    assert evaluate.wilson(8, 10) == pytest.approx([0.4901625, 0.9433178], abs=1e-6)  # R: prop.test(8, 10, correct=FALSE)


@pytest.mark.parametrize("text, expected", [
    ("so it is\n#### 1,234", "1234"), ("#### $18.00", "18"), ("####5", "5"), ("#### 12.50 %", "12.5"), ("#### -3", "-3"), ("#### - 3", "-3"), ("#### -$3.", "-3"),
    ("#### 1 000 000", "1000000"), ("#### 42 apples", "42"), ("#### .5", "0.5"), ("#### 7\n#### 8", "7"), ("#### 5 10", "5"),
    ("#### ", None), ("####", None), ("####\n42", None), ("42", None), ("", None), ("#### x42", None), ("#### 1/2", None), ("#### 12/3", None), ("#### 2e3", None)])
def test_number_behind_hashes(text, expected):
    assert scoring.number_behind_hashes(text, 0) == (None if expected is None else Decimal(expected))


def test_gsm8k_takes_the_last_of_the_reference_and_the_first_generated():
    assert right("gsm8k", "#### 8 #### 9", "#### 7 or\n#### 8") and not right("gsm8k", "#### 9 #### 8", "#### 7 or\n#### 8")
    assert right("gsm8k", "#### 8.0", "#### 8") and not right("gsm8k", "8", "#### 8") and not right("gsm8k", "", "#### 0") and not right("gsm8k", "####", "#### 0")
    big = "9007199254740993"  # 2**53 + 1, which a float can't tell from 2**53
    assert right("gsm8k", f"#### {big}", f"#### {big}") and not right("gsm8k", "#### 9007199254740992", f"#### {big}")
    with pytest.raises(ValueError, match='no "#### number"'):
        scoring.answer_of(example("gsm8k", "the answer is 8"))


@settings(deadline=None)
@given(st.integers(-10**12, 10**12), st.sampled_from(["{:,}", "{}", "{}.0", "{:,}.00", "$ {}", "{} %", "  {}."]))
def test_writing_does_not_change_a_number(number, form):
    assert right("gsm8k", "because\n#### " + form.format(number), f"#### {number}")
    assert not right("gsm8k", "#### " + form.format(number + 1), f"#### {number}")


@pytest.mark.parametrize("text, target, expected", [
    ("Paris", "paris", True), ("It is the Eiffel Tower!", "Eiffel tower", True), ("the U.S.A.", "USA; America", True), ("in America", "USA; America", True),
    ("parisian", "Paris", False), ("comparison", "Paris", False), ("Par is", "Paris", False), ("", "Paris", False), ("the", "The", False), ("anything", "The", False),
    ("?!", "...", False), ("Paris", "Paris France", False), ("a;b", "a;b", True), ("x", "y; ; z", False)])
def test_nq_open(text, target, expected):
    assert right("nq_open", text, target) == expected


def test_nq_open_prefers_the_answers_of_the_line():
    assert right("nq_open", "two", "one", answers=["two", "three"]) and not right("nq_open", "one", "one", answers=["two", "three"])
    assert right("nq_open", "two", "one", answer="zwei; two")
    for wrong in ([], [1], {"a": 1}):
        with pytest.raises(ValueError, match="holds no texts"):
            scoring.answer_of(example("nq_open", "one", answers=wrong))


@settings(deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1), st.text())
def test_an_empty_generation_answers_nothing_and_a_quoted_answer_is_found(answers, around):
    for empty in ("", " \n", "the", "."):
        assert not scoring.is_right("nq_open", empty, answers) or scoring.normalise(empty)
    normal = scoring.normalise(answers[0])
    assert scoring.normalise(normal) == normal
    assert scoring.is_right("nq_open", f"{around} {answers[0]} {around}", answers[:1]) == bool(normal)


def test_exact_and_startswith():
    assert right("exact", " (ab)\n", "(ab) ") and not right("exact", "(ab)c", "(ab)") and not right("exact", "", "(ab)")
    assert right("startswith", "\n(ab)c", "(ab) ") and not right("startswith", "(a", "(ab)") and not right("startswith", "", "(ab)")
    with pytest.raises(ValueError, match="nothing is left"):  # of which every text would be a beginning
        scoring.answer_of(example("startswith", " "))


def test_the_letter_of_a_choice():
    assert [scoring.answer_of(example("choice", t)) for t in ("B", " C) no", "(D)", "A. It")] == ["B", "C", "D", "A"]
    for wrong in ("Because", "E", "b", "the A"):
        with pytest.raises(ValueError, match="none of the letters"):
            scoring.answer_of(example("choice", wrong))


# ---- tasks of a file


def test_the_task_is_never_guessed(tmp_path):
    path = write_lines(tmp_path / "gsm8k_test.jsonl", ("u", "#### 1", {"task": "gsm8k"}), ("u", "#### 1", {}))
    with pytest.raises(ValueError, match=r"gsm8k_test.jsonl, line 2: no task; give --task"):
        evaluate.read_tasks(path)
    assert [e["task"] for e in evaluate.read_tasks(path, "exact")] == ["exact", "exact"]  # --task overrides the lines'
    path = write_lines(tmp_path / "x.jsonl", ("u", "a", {"task": "exact"}), ("u", "#### 1", {"task": "gsm9k"}))
    with pytest.raises(ValueError, match="line 2: unknown task 'gsm9k'"):
        evaluate.read_tasks(path)
    with open(tmp_path / "gaps.jsonl", "w") as f:  # line numbers are those of the file
        f.write("\n" + open(path).read().splitlines()[0] + "\n")
    (found,) = evaluate.read_tasks(tmp_path / "gaps.jsonl")
    assert found["line"] == 2 and found["record"]["task"] == "exact" and (found["user"], found["target"]) == ("u", "a")


# ---- SQL


@pytest.fixture
def database(tmp_path):
    """A folder of databases as Spider's, with an odd name."""
    folder = tmp_path / "data bases?#%41"
    (folder / "pets").mkdir(parents=True)
    connection = sqlite3.connect(folder / "pets" / "pets.sqlite")
    connection.execute("CREATE TABLE pet (name TEXT, age INTEGER)")
    connection.executemany("INSERT INTO pet VALUES (?, ?)", [("Tom", 3), ("Kim", 1), ("Kim", 1), (None, 2)])
    connection.execute("INSERT INTO pet VALUES (CAST(x'ff41' AS TEXT), 9)")  # not UTF-8
    connection.commit()
    connection.close()
    return folder


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("sql, error", [
    ("INSERT INTO pet VALUES ('x', 1)", "not authorized|readonly"), ("DELETE FROM pet", "not authorized"), ("DROP TABLE pet", "not authorized"), ("CREATE TABLE t (a)", "not authorized"),
    ("CREATE TEMP TABLE t (a)", "not authorized"), ("PRAGMA query_only=OFF", "not authorized"), ("PRAGMA user_version=7", "not authorized"), ("PRAGMA journal_mode=WAL", "not authorized"),
    ("SELECT * FROM pragma_table_info('pet')", "not authorized"), ("ATTACH 'other.sqlite' AS o", "not authorized"), ("VACUUM INTO 'copy.sqlite'", "authoriz"), ("BEGIN", "not authorized"),
    ("SELECT load_extension('x')", "not authorized"), ("SELECT Load_Extension('x')", "not authorized"), ("SELECT fts3_tokenizer('simple')", "not authorized|no such function"),
    ("SELECT 1; DROP TABLE pet", "one statement"), ("WITH t AS (SELECT 1) INSERT INTO pet SELECT 1, 2", "not authorized"), ("", "not a query"), ("-- nothing", "not a query"),
    (".shell touch made", "syntax error"), (".output made\nSELECT 1", "syntax error"), ("SELECT '\0'", "null character"), ("SELECT '\ud800'", "surrogates"),
    ("SELECT length(zeroblob(500000000))", "too big"), ("SELECT length(randomblob(500000000))", "too big"), ("SELECT * FROM nowhere", "no such table"),
    ("PRAGMA writable_schema=ON", "not authorized"), ("UPDATE sqlite_master SET sql = ''", "not authorized|may not be modified"), ("PRAGMA trusted_schema=ON", "not authorized"),
    ("PRAGMA temp_store_directory='.'", "not authorized"), ("CREATE VIRTUAL TABLE v USING fts5(a)", "not authorized"), ("CREATE TEMP TRIGGER t AFTER INSERT ON pet BEGIN SELECT 1; END", "not authorized"),
    ("CREATE TEMP VIEW v AS SELECT 1", "not authorized"), ("ALTER TABLE pet RENAME TO dog", "not authorized"), ("REINDEX pet", "not authorized|readonly|not a query"), ("ANALYZE", "not authorized"), ("VACUUM", "authoriz|readonly"),
    ("SAVEPOINT s", "not authorized"), ("ATTACH ':memory:' AS o", "not authorized"), ("ATTACH 'file:made.sqlite?mode=rwc' AS o", "not authorized"), ("DETACH main", "not authorized"),
    ("SELECT * FROM pragma_database_list", "not authorized"), ("SELECT readfile('/etc/hostname')", "no such function"), ("SELECT writefile('made', 'x')", "no such function"),
    ("SELECT edit('x', 'touch made')", "no such function"), ("SELECT fts3_tokenizer('simple', x'00')", "not authorized|no such function"), ("SELECT load_extension('x', 'y')", "not authorized"),
    ("SELECT (" + "(" * 100_000, "overflow|too large|too big"), ("SELECT 1" + " UNION SELECT 1" * 100_000, "too many terms|too big")])
def test_sql_that_does_more_than_read_fails_and_changes_nothing(database, monkeypatch, sql, error):
    monkeypatch.chdir(database)
    before = snapshot(database)
    with pytest.raises(scoring.SQL_ERRORS, match=error):
        scoring.run_sql(database / "pets" / "pets.sqlite", sql, 5)
    assert snapshot(database) == before


ENDLESS = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT "


@pytest.mark.parametrize("sql", [ENDLESS + "count(*) FROM t", ENDLESS + "n FROM t", ENDLESS + "n FROM t ORDER BY n DESC"])
def test_an_endless_query_is_stopped(database, sql):
    began = time.monotonic()
    with pytest.raises(sqlite3.Error, match="interrupted"):
        scoring.run_sql(database / "pets" / "pets.sqlite", sql, 0.3)
    assert 0.3 <= time.monotonic() - began < 3


@pytest.mark.parametrize("sql", ["SELECT instr(hex(zeroblob(490000)), hex(zeroblob(245000)) || 'b')", "SELECT length(printf('%.*c', 2000000000, 'x'))"])
def test_one_step_that_takes_long_is_ended_by_the_kernel(database, sql):
    """SQLite looks at the clock between the steps alone; left to themselves, these functions take ten seconds and more."""
    began = time.monotonic()
    try:
        scoring.run_sql(database / "pets" / "pets.sqlite", sql, 0.1)
    except sqlite3.Error as e:
        assert "interrupted" in str(e) or "too big" in str(e)
    assert time.monotonic() - began < 10  # 2 s of CPU, on a machine that does other things too


@pytest.mark.parametrize("sql", [f"SELECT {', '.join(['randomblob(999999)'] * 1500)}", ENDLESS + "randomblob(99999) AS b FROM t ORDER BY b",
                                 ENDLESS + "count(*) FROM (SELECT DISTINCT randomblob(99999) FROM t)"])
def test_memory_has_a_limit_and_no_file_takes_what_is_over_it(database, monkeypatch, sql):
    monkeypatch.setattr(scoring, "SQL_MEMORY", 2**28)
    monkeypatch.setenv("SQLITE_TMPDIR", str(database))
    before = snapshot(database)
    with pytest.raises(sqlite3.Error, match="MemoryError|memory"):
        scoring.run_sql(database / "pets" / "pets.sqlite", sql, 60)
    assert snapshot(database) == before


def test_an_endless_result_is_not_parsed(database, monkeypatch):
    """Rows that end with an error are nobody's result, and reading them takes longer than the query."""
    parsed = []
    monkeypatch.setattr(scoring, "SQL_ROW", SimpleNamespace(decode=lambda line: parsed.append(line) or [line]))
    loads = json.loads
    monkeypatch.setattr(scoring.json, "loads", lambda line, **more: parsed.append(line) or loads(line, **more))
    for sql, error in ((ENDLESS + "n FROM t", "interrupted"), ("SELECT n / 0 FROM (SELECT 1 AS n) UNION ALL SELECT abs(-9223372036854775808)", "overflow")):
        with pytest.raises(sqlite3.Error, match=error):
            scoring.run_sql(database / "pets" / "pets.sqlite", sql, 0.3)
    assert [loads(line)[:11] for line in parsed] == ["interrupted", "integer ove"]


def test_each_layer_against_writing_holds_alone(database, monkeypatch):
    """Without the authorizer a query can still write nowhere, not even in memory; nor may a view call what a query may."""
    file = str(database / "pets" / "pets.sqlite")
    run = lambda sql: list(scoring.query(file, sql, 5))
    connection = sqlite3.connect(file)
    if connection.execute("SELECT count(*) FROM pragma_function_list WHERE name = 'fts5_source_id'").fetchone() == (1,):
        connection.execute("CREATE VIEW v AS SELECT fts5_source_id()")
        connection.commit()
        assert run("SELECT fts5_source_id()")
        with pytest.raises(sqlite3.Error, match="unsafe use of fts5_source_id"):  # by trusted_schema=OFF
            run("SELECT * FROM v")
    connection.close()
    with pytest.raises(sqlite3.Error, match="not authorized"):
        run("CREATE TEMP TABLE t (a)")
    monkeypatch.setattr(scoring, "SQL_ACTIONS", set(range(100)))
    for sql in ("CREATE TEMP TABLE t (a)", "INSERT INTO pet VALUES ('x', 1)"):  # a temporary one stands in no file that mode=ro opens
        with pytest.raises(sqlite3.Error, match="readonly"):  # by query_only=ON
            run(sql)


def test_reading_a_database_with_a_write_ahead_log_leaves_no_file(database):
    connection = sqlite3.connect(database / "pets" / "pets.sqlite")
    assert connection.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
    connection.close()
    before = snapshot(database)
    assert scoring.run_sql(database / "pets" / "pets.sqlite", "SELECT count(*) FROM pet", 5) == [(5,)] and snapshot(database) == before


def test_a_large_result_is_stopped(database, monkeypatch):
    monkeypatch.setattr(scoring, "SQL_RESULT", 10_000)
    began = time.monotonic()
    with pytest.raises(sqlite3.Error, match="too large"):
        scoring.run_sql(database / "pets" / "pets.sqlite", ENDLESS + "n FROM t", 20)
    assert time.monotonic() - began < 5
    assert len(scoring.run_sql(database / "pets" / "pets.sqlite", ENDLESS + "n FROM t LIMIT 50", 60)) == 50


def test_queries_that_only_read_work(database):
    run = lambda sql: scoring.run_sql(database / "pets" / "pets.sqlite", sql, 5)
    assert run("SELECT count(*), upper('a') FROM pet") == [(5, "A")]
    assert run(ENDLESS + "max(n) FROM (SELECT n FROM t LIMIT 9)") == [(9,)]
    assert run("SELECT age FROM pet WHERE name = (SELECT max(name) FROM pet WHERE name LIKE 'T%')") == [(3,)]
    assert len(run("SELECT name FROM pet WHERE age = 9")[0][0]) == 2
    assert run("SELECT 1.5, x'00ff', NULL, 9223372036854775807, 'é' || char(10, 0), 1e999, -0.1, ''") == [(1.5, b"\x00\xff", None, 2**63 - 1, "é\n\0", float("inf"), -0.1, "")]
    assert run("SELECT 1 WHERE 0") == [] and len(scoring.run_sql(database / "pets" / "pets.sqlite", "SELECT 1", float("inf"))) == 1


@pytest.mark.parametrize("sql, ordered", [
    ("SELECT a FROM t ORDER BY a", True), ("select a from t order\n by a limit 3", True), ("SELECT a FROM t", False), ("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 3)", False),
    ("SELECT a FROM t WHERE b = ' order by '", False), ("SELECT a FROM t WHERE b = 'it''s order by x'", False), ('SELECT "order by" FROM t', False), ("SELECT [order by] FROM t", False),
    ("SELECT a FROM t -- order by a", False), ("SELECT a /* order by */ FROM t", False), ("SELECT a FROM t WHERE b = ')' ORDER BY (a)", True),
    ("SELECT a FROM t WHERE b IN (SELECT b FROM u WHERE c = '(' ORDER BY b) ORDER BY a", True), ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
    ("SELECT row_number() OVER (ORDER BY a) FROM t", False), ("SELECT reorder, byte FROM t", False), ("SELECT a FROM t /* ORDER BY a", False)])
def test_order_matters_where_the_query_orders(sql, ordered):
    assert scoring.is_ordered(sql) == ordered


def test_long_texts_are_judged_in_linear_time():
    """Numbers and queries of a megabyte; where each of n places is looked at n times, 8,000 characters took seconds."""
    n, began = 10**6, time.monotonic()
    assert scoring.number_behind_hashes("#### " + " " * n + "x", 0) is None and scoring.number_behind_hashes("#### " + " " * n + "7", 0) == 7
    assert scoring.is_ordered("SELECT " + "(" * n + "1" + ")" * n + " ORDER BY 1") and not scoring.is_ordered("(" * n + "ORDER BY 1" + ")" * n)
    for mark in ("[", "'", '"', "`", "/*", "/*/", "('"):
        scoring.is_ordered(mark * (n // len(mark)))
        scoring.first_statement(mark * (n // len(mark)))
    assert time.monotonic() - began < 10


@settings(deadline=None)
@given(st.text(" \n\t-+.,$%/^eE#0123456789x\u00a0", max_size=30))
def test_a_number_is_what_it_was_with_backtracking(text):
    end = re.sub(r"[$,%]|(?<=\d) (?=\d{3}(?!\d))", "", text.split("####")[0].split("\n")[0])
    number = re.match(r"\s*([-+]?)\s*(\d++(?:\.\d*+)?|\.\d++)(?!\s*[/^]|[eE]\d)", end)
    assert scoring.number_behind_hashes("####" + text.split("####")[0], 0) == (Decimal(number[1] + number[2]) if number else None)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["(", ")", " order by ", "order", " by ", "'it''s'", "')'", '"(a"', "[(]", "`)`", "/*)*/", "--(\n", "x"])).map("".join))
def test_order_is_what_it_was_with_the_innermost_parentheses_removed_again_and_again(sql):
    bare, inner = re.sub(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", " x ", sql, flags=re.DOTALL), None
    while bare != inner:
        bare, inner = re.sub(r"\([^()]*\)", " ", bare), bare
    assert scoring.is_ordered(sql) == bool(re.search(r"\border\s+by\b", bare, re.IGNORECASE))


@pytest.mark.parametrize("text, statement", [
    ("SELECT 1 /* ; not closed", "SELECT 1 /* ; not closed"), ("SELECT 1", "SELECT 1"), ("SELECT 1;;", "SELECT 1"), ("```sql\nSELECT 1;\n```", "SELECT 1"), ("Here:\n```SQL\nSELECT 1\n``` done; yes", "SELECT 1"), ("```\nSELECT 1", "SELECT 1"),
    ("SELECT ';' FROM t; DROP TABLE t", "SELECT ';' FROM t"), ("; SELECT 1", "SELECT 1"), ("```sqlite SELECT 1```", "SELECT 1"), ("", ""), (";", ""),
    ("SELECT `a;b` -- c;\nFROM t; x", "SELECT `a;b` -- c;\nFROM t")])
def test_first_statement(text, statement):
    assert scoring.first_statement(text) == statement


def test_spider_compares_results(database):
    def right(text, gold, timeout=5.0):
        return scoring.is_right("spider", text, scoring.answer_of(example("spider", gold, db_id="pets"), database, timeout), timeout)
    gold = "SELECT name, age FROM pet WHERE age < 9"
    assert right("```sql\nSELECT name, age FROM pet WHERE age < 9 ORDER BY age DESC;\n```", gold)  # in any order
    assert not right("SELECT DISTINCT name, age FROM pet WHERE age < 9", gold)  # a row twice counts twice
    assert not right("SELECT age, name FROM pet WHERE age < 9", gold) and not right("SELECT name FROM", gold)
    assert right("SELECT age FROM pet ORDER BY 1", "SELECT age FROM pet ORDER BY age") and not right("SELECT age FROM pet ORDER BY 1 DESC", "SELECT age FROM pet ORDER BY age")
    none = "SELECT name FROM pet WHERE age > 99"  # what has no result at all doesn't equal an empty one
    assert right("SELECT age FROM pet WHERE age = 77", none) and not right("", none) and not right("-- no", none) and not right("DELETE FROM pet", none)
    assert not right(ENDLESS + "n FROM t", gold, 0.2)


def test_spider_lines_that_cannot_be_judged(database):
    for record, gold, message in (({}, "SELECT 1", 'no "db_id"'), *(({"db_id": name}, "SELECT 1", 'no "db_id"') for name in ("../pets", "..", ".", "", "/etc", "pets/../pets", None, 5, ["pets"])), ({"db_id": "a\0b"}, "SELECT 1", "no database"),
                                  ({"db_id": "a" * 5000}, "SELECT 1", "no database"), ({"db_id": "a\nb"}, "SELECT 1", "no database"),
                                  ({"db_id": "cats"}, "SELECT 1", r"no database .*cats.sqlite"),
                                  ({"db_id": "pets"}, "SELECT x FROM pet", "its SQL fails on .*pets.sqlite .*no such column")):
        with pytest.raises(ValueError, match=message) as e:
            scoring.answer_of(example("spider", gold, **record), database)
        assert "\n" not in str(e.value) and len(str(e.value)) < 500
    with pytest.raises(ValueError, match="give --databases"):
        scoring.answer_of(example("spider", "SELECT 1", db_id="pets"))


# ---- models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose folder asks for sampling and for a punishment of repetitions."""
    folder = make_folder(tmp_path_factory.mktemp("hf") / "model", "llama")
    settings = {"do_sample": True, "temperature": 1.7, "top_p": 0.8, "repetition_penalty": 1.9, "eos_token_id": 5, "max_length": 20}
    open(f"{folder}/generation_config.json", "w").write(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return evaluate.open_model(folder, torch.float32, False, False)


@torch.no_grad()
def greedy(model, chat, prompt, limit):
    """The text, one plain forward pass a token, no padding and no cache."""
    new = []
    while len(new) < limit:
        token = model(torch.tensor([prompt + new])).logits[0, -1].argmax().item()
        if token in chat.stop_tokens:
            break
        new.append(token)
    return chat.tokenizer.decode(new, skip_special_tokens=True)


def references(loaded, limit=12):
    """What the model says to each question, where that is a text at all."""
    model, chat = loaded
    return [greedy(model, chat, chat.prompt(None, q), limit).strip() for q in QUESTIONS]


@pytest.fixture(scope="module")
def exact_file(folder, loaded, tmp_path_factory):
    """A file of five lines, of which the model gets the second and the last wrong, and a place for the output."""
    base = tmp_path_factory.mktemp("exact")
    said = references(loaded)
    assert len(set(said)) == len(said) and all(said)
    return write_messages(base / "data.jsonl", [(None, q, "no" if n in (1, 4) else text) for n, (q, text) in enumerate(zip(QUESTIONS, said))])


def test_batches_give_what_each_prompt_gives_alone(loaded):
    model, chat = loaded
    prompts = [chat.prompt("You answer in one word." if n % 2 else None, q) for n, q in enumerate(QUESTIONS)]
    assert len({len(p) for p in prompts}) > 2
    longest = max(map(len, prompts))
    new = evaluate.generate(model, chat, prompts, 12)[:, longest:].tolist()
    assert [evaluate.written(chat, row) for row in new] == [greedy(model, chat, p, 12) for p in prompts]


def test_generation_ends_at_the_first_stop_token(loaded):
    model, chat = loaded
    prompt = chat.prompt(None, QUESTIONS[0])
    full = evaluate.generate(model, chat, [prompt], 12)[0, len(prompt):].tolist()
    stops = SimpleNamespace(tokenizer=chat.tokenizer, stop_tokens=[full[4]])  # no special token, so decoding would keep it
    new = evaluate.generate(model, stops, [prompt, chat.prompt(None, QUESTIONS[2])], 12)[0, -12:].tolist()
    assert evaluate.written(stops, new) == chat.tokenizer.decode(full[:full.index(full[4])])


def test_decoding_keeps_every_space():
    tokenizer = make_tokenizer("llama")
    tokenizer.clean_up_tokenization_spaces = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    chat = Chat(tokenizer)
    text = "( a . b ) , do n't ? "
    assert evaluate.written(chat, chat.encode(text) + [chat.end] + chat.encode("more")) == text


def test_choice_is_the_relative_probability_of_four_letters(loaded):
    model, chat = loaded
    prompts = [chat.prompt(None, q) for q in QUESTIONS]
    likely = evaluate.letter_probabilities(model, chat, prompts)
    for row, prompt in zip(likely, prompts):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        odds = torch.tensor([logits[chat.tokenizer.convert_tokens_to_ids(letter)] for letter in "ABCD"]).exp()
        torch.testing.assert_close(row, odds / odds.sum(), rtol=1e-4, atol=1e-5)
    assert len(set(likely.argmax(-1).tolist())) > 1 or likely.std(0).max() > 1e-3
    one = SimpleNamespace(encode=lambda letter: [1, ord(letter)], stop_tokens=chat.stop_tokens, tokenizer=chat.tokenizer)
    with pytest.raises(ValueError, match="can't choose"):
        evaluate.letter_probabilities(model, one, prompts)


def test_accuracy_of_a_folder(folder, exact_file, tmp_path, capfd):
    output = tmp_path / "out.jsonl"
    result = evaluated("--model", folder, "--data", exact_file, "--task", "exact", "--output", output, "--tokens", 12, "--batch_size", 2)
    assert (result["task"], result["accuracy"], result["n"]) == ("exact", 3 / 5, 5) and result["wilson95"] == evaluate.wilson(3, 5)
    assert json.loads((tmp_path / "accuracy-data-exact.json").read_text()) == result
    header, *lines = map(json.loads, output.read_text().splitlines())
    assert header["task"] == "exact" and len(header["data_sha256"]) == 64 and {line["line"]: line["correct"] for line in lines} == {1: True, 2: False, 3: True, 4: True, 5: False}
    assert not [word for word in ("temperature", "do_sample", "top_p", "flags") if word in capfd.readouterr().err]


def test_a_killed_run_goes_on_where_it_stopped(folder, loaded, tmp_path, monkeypatch):
    output, said = tmp_path / "out.jsonl", references(loaded)
    data = write_lines(tmp_path / "data.jsonl", *((q, "no" if n == 1 else said[n][:8 if n == 2 else 1], {}) for n, q in enumerate(QUESTIONS)))
    flags = ("--model", folder, "--data", data, "--task", "startswith", "--output", output, "--batch_size", 2)  # without --tokens: the number is that of all lines
    whole = evaluated(*flags)
    assert whole["accuracy"] == 4 / 5
    lines = output.read_bytes().splitlines(keepends=True)
    asked, original = [], evaluate.generate
    monkeypatch.setattr(evaluate, "generate", lambda model, chat, prompts, *more, **options: asked.extend(prompts) or original(model, chat, prompts, *more, **options))
    for kept in (3, 1, 0):  # lines that are whole; the next is torn
        asked.clear()
        output.write_bytes(b"".join(lines[:kept]) + lines[kept][:10])
        again = evaluated(*flags)
        assert {**again, "seconds": 0} == {**whole, "seconds": 0} and len(asked) == 5 - max(0, kept - 1)
        assert sorted(output.read_bytes().splitlines(keepends=True)) == sorted(lines)
    monkeypatch.setattr(evaluate, "open_model", None)  # a finished file needs no model
    assert evaluated(*flags)["accuracy"] == whole["accuracy"]


def test_an_output_of_something_else_is_left_alone(folder, exact_file, tmp_path):
    output = tmp_path / "out.jsonl"
    flags = ["--model", folder, "--data", exact_file, "--output", str(output), "--tokens", "2"]
    evaluated(*flags, "--task", "exact")
    before = output.read_bytes()
    with pytest.raises(SystemExit, match="is of another task, tokens; choose another --output, or remove it"):
        evaluate.main([*flags, "--task", "startswith", "--tokens", "3"])
    assert output.read_bytes() == before
    for foreign in (b"my notes", b"my notes\n", b'{"line": 3}\n', before + b"{}\n", b"[1]\n"):
        output.write_bytes(foreign)
        with pytest.raises(SystemExit, match="choose another --output, or remove it") as e:
            evaluate.main([*flags, "--task", "exact"])
        assert output.read_bytes() == foreign and "\n" not in str(e.value)


@pytest.mark.parametrize("old, new", [
    ('"correct"', '"corrfct"'), ('"prediction"', '"predictiom"'), ('"line"', '"linf"'), ('"correct": true', '"correct": 1'), ('"correct": true', '"correct": "true"'),
    ('"correct": true', '"correct": null'), ('"line": 1', '"line": 1.0'), ('"line": 1', '"line": true'), ('"line": 1', '"line": [1]'), ('"probability"', '"probabilitx"'),
    ('"probability": 0.5', '"probability": "0.5"'), ('{', ''), ('{"line"', '\xff{"line"')])
def test_a_damaged_prediction_is_named_by_its_line(tmp_path, old, new):
    header, path = {"task": "choice"}, tmp_path / "p.jsonl"
    lines = [json.dumps({"line": n, "prediction": "A", "correct": True, "probability": 0.5}) for n in (3, 1)]
    path.write_text("\n".join([json.dumps(header), *lines, '{"line": 2, "pre']))
    done, file = evaluate.open_output(path, header)
    file.close()
    assert done == {n: json.loads(line) for n, line in zip((3, 1), lines)}
    path.write_text("\n".join([json.dumps(header), lines[0], lines[1].replace(old, new), ""]), encoding="latin-1")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"p\.jsonl, line 3: not JSON with [^\n]*$"):
        evaluate.open_output(path, header)
    assert path.read_bytes() == before


def test_a_model_trained_anew_does_not_inherit_predictions(loaded, tmp_path):
    data = write_lines(tmp_path / "d.jsonl", ("u", "a", {}))
    evaluated("--model", make_folder(tmp_path / "m", "llama"), "--data", data, "--task", "exact", "--tokens", 2)
    make_model("llama", 320, seed=1).save_pretrained(tmp_path / "m")
    with pytest.raises(SystemExit, match="is of another weights"):
        evaluate.main(["--model", str(tmp_path / "m"), "--data", data, "--task", "exact", "--tokens", "2"])


def test_tasks_of_a_file_are_reported_each_and_together(folder, loaded, database, tmp_path):
    said, chat = references(loaded), loaded[1]
    likely = evaluate.letter_probabilities(*loaded, [chat.prompt(None, q) for q in QUESTIONS[:2]])
    best = "ABCD"[likely[0].argmax()]
    worst = "ABCD"[likely[1].argmin()]
    data = write_lines(tmp_path / "mixed.jsonl", (QUESTIONS[0], best, {"task": "choice"}), (QUESTIONS[1], worst, {"task": "choice"}), (QUESTIONS[2], said[2], {"task": "exact"}),
                       (QUESTIONS[3], said[3][:2], {"task": "startswith"}), (QUESTIONS[4], "SELECT 1", {"task": "spider", "db_id": "pets"}), (QUESTIONS[4], "#### 4", {"task": "gsm8k"}))
    result = evaluated("--model", folder, "--data", data, "--databases", database, "--tokens", 12, "--output", tmp_path / "p.jsonl")
    assert (result["task"], result["n"], result["accuracy"]) == ("mixed", 6, 3 / 6) and {t: r["accuracy"] for t, r in result["tasks"].items()} == {
        "choice": 0.5, "exact": 1, "startswith": 1, "spider": 0, "gsm8k": 0}
    assert result["tasks"]["choice"]["probability"] == pytest.approx((likely[0].max() + likely[1].min()).item() / 2, abs=1e-5) and "probability" not in result["tasks"]["exact"]
    with pytest.raises(SystemExit, match=r"mixed.jsonl, line 5: its task is spider; give --databases"):
        evaluate.main(["--model", folder, "--data", data, "--output", str(tmp_path / "q.jsonl")])


def test_settings_of_the_folder_are_followed(loaded, tmp_path):
    model, _ = loaded
    folder = make_folder(tmp_path / "m", "llama")
    chat = Chat(make_tokenizer("llama"), plain=True)
    said = greedy(model, chat, chat.prompt(None, QUESTIONS[0]), 12).strip()
    assert said != references(loaded)[0]
    data = write_lines(tmp_path / "d.jsonl", (QUESTIONS[0], f"<think>hm</think>{said}", {"task": "exact"}))
    run = lambda name, *flags: evaluated("--model", folder, "--data", data, "--tokens", 12, "--output", tmp_path / name, *flags)["accuracy"]
    assert run("1") == 0 and run("2", "--plain") == 1
    (tmp_path / "m" / "config.yaml").write_text("dataset: {plain: true, remove_thinking: true}")
    assert run("3") == 1
    (tmp_path / "m" / "config.yaml").write_text("dataset: {plain: true, remove_thinking: false}")
    assert run("4") == 0


def test_a_prompt_that_fills_the_window_is_named(folder, tmp_path, monkeypatch):
    data = write_lines(tmp_path / "d.jsonl", ("u", "a", {}), ("7 " * 300, "a", {}))
    with pytest.raises(SystemExit, match="line 2 of --data: its prompt has .* tokens, the model takes 256"):
        evaluate.main(["--model", folder, "--data", data, "--task", "exact", "--output", str(tmp_path / "o")])
    data, sizes, original = write_lines(tmp_path / "e.jsonl", ("7 " * 105, "a", {})), [], evaluate.generate
    monkeypatch.setattr(evaluate, "generate", lambda model, chat, prompts, limit: sizes.append(len(prompts[0]) + limit) or original(model, chat, prompts, limit))
    evaluated("--model", folder, "--data", data, "--task", "exact", "--tokens", 999, "--output", tmp_path / "p")
    assert sizes == [256]  # the window cuts the generation, not the run


def test_an_adapter_answers_as_the_merged_model(loaded, tmp_path):
    peft = pytest.importorskip("peft")
    from finetune import add_pred_tokens
    base = make_folder(tmp_path / "base", "llama")
    model, tokenizer = make_model("llama", 320), make_tokenizer("llama")
    model.config._name_or_path = model.name_or_path = base
    add_pred_tokens(tokenizer, model, 3)  # the adapter's tokenizer has tokens that the base's embedding lacks
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    model.peft_config["default"].base_model_name_or_path = base
    for name in ("adapter", "merged"):
        (model if name == "adapter" else model.merge_and_unload()).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    data = write_messages(tmp_path / "d.jsonl", [(None, q, "a") for q in QUESTIONS])
    def predictions(name):
        evaluated("--model", tmp_path / name, "--data", data, "--task", "exact", "--tokens", 12)
        return (tmp_path / name / "predictions-d-exact.jsonl").read_text().splitlines()[1:]
    assert predictions("adapter") == predictions("merged") != predictions("base")


# ---- views


def random_views(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)


def test_statistics_of_views_against_loops():
    u, v = random_views(9, 4)
    group = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5])
    found = evaluate.view_statistics(u, v, group)
    cosine = lambda a, b: (a @ b / a.norm() / b.norm()).item()
    matched = sorted(cosine(u[i], v[i]) for i in range(9))
    shuffled = [cosine(u[i], v[(i - 4) % 9]) for i in range(9) if group[i] != group[(i - 4) % 9]]
    assert found["matched"]["mean"] == pytest.approx(sum(matched) / 9, abs=1e-6) and found["matched"]["q50"] == pytest.approx(matched[4], abs=1e-6)
    assert found["shuffled"]["mean"] == pytest.approx(sum(shuffled) / len(shuffled), abs=1e-6) and found["pairs"] == 9
    energy = sum(s * s for s in found["singular_values"])
    assert len(found["singular_values"]) == 4 and energy == pytest.approx((u - v).square().sum().item(), rel=1e-5)
    torch.testing.assert_close(torch.tensor(found["singular_values"][0]), torch.linalg.matrix_norm(u - v, 2), rtol=1e-5, atol=0)
    assert len(evaluate.view_statistics(*random_views(130, 120), torch.arange(130))["singular_values"]) == 100


def test_linear_map_error_is_honest_about_examples_it_has_not_seen():
    (u, noise), (matrix, _) = random_views(60, 8), random_views(8, 8, 1)
    linear = lambda u, v, group=None: evaluate.view_statistics(u, v, torch.arange(len(u)) if group is None else group)["linear_map_error"]
    assert linear(u, u @ matrix)["fit"] < 1e-6 and linear(u, u @ matrix)["held_out"] < 1e-6 and linear(u, u @ matrix)["fit_pairs"] == 30
    assert 0.7 < linear(u, noise)["fit"] < 1 < linear(u, noise)["held_out"]
    assert linear(*random_views(20, 40))["fit"] < 1e-6 and linear(*random_views(20, 40))["held_out"] > 0.8  # fewer examples than dimensions
    flat = torch.cat((u, torch.zeros(60, 3)), 1)  # rank 8 of 11
    assert linear(flat, flat @ random_views(11, 11)[0])["held_out"] < 1e-6 and linear(torch.ones(9, 3), torch.ones(9, 3))["held_out"] < 1e-6
    paraphrases = [a.repeat_interleave(4, 0) for a in random_views(20, 40)]  # each four times: halves that shared examples would know the answer
    assert linear(*paraphrases, torch.arange(20).repeat_interleave(4))["held_out"] > 0.8
    for wrong, message in ((torch.zeros(60), "needs two examples"), (torch.arange(60), "infinities or NaN")):
        with pytest.raises(ValueError, match=message):
            linear(u / (wrong[0] if wrong.any() else 1), u, wrong)


@pytest.fixture
def plots():
    """What --plot needs; one thread, since t-SNE's wait for each other at thousands of barriers, for minutes where cores are busy."""
    pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")
    torch.set_num_threads(1)


def test_similarity_of_a_model_and_its_plot(plots, folder, exact_file, tmp_path, monkeypatch):
    seen = []
    def views_of(model, chat, of, records, batch_size):
        seen.extend(records)
        assert (of, batch_size) == (folder, 3) and model.config.hidden_size and not chat.plain
        return *random_views(len(records), 16), torch.arange(len(records))
    monkeypatch.setitem(sys.modules, "finetune", SimpleNamespace(views_of=views_of))
    result = evaluated("--model", folder, "--data", exact_file, "--similarity", "--batch_size", 3, "--plot", tmp_path / "p.png")
    assert sorted(r[0] for r in seen) == [1, 2, 3, 4, 5] and result["skipped"] == 0 and result["pairs"] == 5
    assert {k: v for k, v in result.items() if k not in ("seconds", "skipped")} == evaluate.view_statistics(*random_views(5, 16), torch.arange(5))
    assert json.loads(open(f"{folder}/similarity-data.json").read()) == result
    picture = (tmp_path / "p.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    evaluate.plot(tmp_path / "q.png", torch.ones(2, 3), torch.ones(2, 3), [1e-9, 0.0])  # views that have become one vector
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(SystemExit, match=r'--plot needs sklearn.*: pip install -e "\.\[eval\]"'):
        evaluate.main(["--model", folder, "--data", exact_file, "--similarity", "--plot", str(tmp_path / "r.png")])


def test_a_run_of_train_gpt_has_intervals_and_all_statistics(plots, folders, run_id, tmp_path):
    assert run_cli(folders["pairs"], f"--run_id={run_id}", "--iterations=2", "--grad_accum_steps=1", "--jepa_lambda=0.1", "--jepa_objective=pair").returncode == 0
    run = ROOT / "logs" / run_id
    data = write_messages(tmp_path / "d.jsonl", [(None, text, text[::-1]) for text in ("abc", "fed", "cab", "deaf", "fade", "bad")])
    result = evaluated("--run", run, "--data", data)
    assert result["exact_wilson95"] == evaluate.wilson(round(6 * result["exact"]), 6) and result["startswith_wilson95"] == evaluate.wilson(round(6 * result["startswith"]), 6)
    result = evaluated("--run", run, "--data", data, "--similarity", "--plot", tmp_path / "p.png")
    assert result["pairs"] == 6 and result["linear_map_error"]["fit"] < 1e-6 < result["linear_map_error"]["held_out"] and len(result["singular_values"]) == 6
    assert (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags, message", [
    ([], "give either --run or --model"), (["--run", "x", "--model", "y"], "give either --run or --model"), (["--model", "FOLDER"], "give either --data"),
    (["--model", "FOLDER", "--prompt", "x"], "give either --data"), (["--run", "x", "--data", "DATA", "--task", "exact"], "--task belongs to the accuracy of a --model"),
    (["--model", "FOLDER", "--data", "DATA", "--similarity", "--dtype", "bf16"], "--dtype belongs to"), (["--model", "FOLDER", "--data", "DATA", "--plot", "x"], "--plot draws"),
    (["--model", "FOLDER", "--data", "DATA"], "line 1: no task"), (["--model", "/nowhere", "--data", "DATA"], "/nowhere: no such folder"),
    (["--model", "EMPTY", "--data", "DATA", "--task", "exact"], "cannot be loaded"), (["--model", "FOLDER", "--data", "/nowhere.jsonl"], "check the path"),
    (["--model", "FOLDER", "--data", "DATA", "--task", "exact", "--tokens", "0"], "--tokens 0: must lie above 0"),
    (["--model", "FOLDER", "--data", "DATA", "--task", "gsm8k"], r'data.jsonl, line 1: no "#### number"')])
def test_misuse(folder, exact_file, tmp_path, flags, message):
    names = {"FOLDER": folder, "DATA": exact_file, "EMPTY": str(tmp_path)}
    output = ["--output", str(tmp_path / "o")] if "--task" in flags and "--model" in flags else []
    with pytest.raises(SystemExit, match=message) as e:
        evaluate.main([names.get(f, f) for f in flags] + output)
    assert "\n" not in str(e.value)
