"""The rules of the house, which keep later work readable. Each failure says what to do.

`ruff format --check` and `ruff check` hold too; .ci/run begins with them.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

from nanojepa.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
LONGEST_FUNCTION, LONGEST_LINE = 60, 100  # lines, columns

# Scripts import nanojepa/ and no other script, but for these.
MAY_IMPORT = {
    "train_gpt.py": {"model"},
    "bench.py": {"train_gpt", "model"},
    "evaluate.py": {"train_gpt", "model"},
}

# An objective's name may be a string in its own file, in the table and in the settings.
NAMES_STAND_IN = ("nanojepa/objectives/", "nanojepa/hf/settings.py", "tests/")
OFTEN_A_KEY = {"step"}  # of metrics.jsonl and manifests too: refused only if compared with

# A machine's own paths, and the hosts and options of package indexes.
PRIVATE = re.compile(
    r"(?<![\w.])/(?:home|root|Users|work|mnt)/\w|\b[A-Z]:\\\w"
    r"|--(?:extra-)?index-url|--find-link[s]|\bpypi\.|\bdownload\.pytorch\.|artifactor[y]"
)


def tracked():
    """The paths, relative to the root, of all files that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = {Path(name) for name in listed.split("\0") if name}
    return sorted(path for path in paths if (ROOT / path).exists())


TRACKED = tracked()
# records/ holds the sources of finished runs as they were.
SOURCES = [p for p in TRACKED if p.suffix == ".py" and p.parts[0] != "records"]
SCRIPTS = {p.stem for p in SOURCES if len(p.parts) == 1} | {"data"}


def nodes(path):
    return list(ast.walk(ast.parse((ROOT / path).read_text())))


def text_lines(path):
    """(number, line) of a file; none if it is binary."""
    content = (ROOT / path).read_bytes()
    return enumerate([] if b"\0" in content else content.decode().splitlines(), 1)


def refuse(faults, advice):
    """Fail with every fault in a line of its own, and what to do about them."""
    assert not faults, "\n".join([*faults, advice])


def test_no_function_is_longer_than_a_screen():
    faults = []
    for path in SOURCES:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    faults.append(f"{path}:{node.lineno}: {node.name} has {lines} lines")
    refuse(faults, f"split it: a function has at most {LONGEST_FUNCTION} lines")


def imported(node):
    """The first parts of the names that a node imports."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return {node.module.split(".")[0]}
    return set()


def test_imports_go_one_way():
    faults = []
    for path in SOURCES:
        if path.parts[0] in ("tests", "docs"):
            continue
        refused = SCRIPTS - MAY_IMPORT.get(str(path), set())
        for node in nodes(path):
            faults += [f"{path}:{node.lineno}: imports {s}" for s in imported(node) & refused]
    refuse(faults, "move what is shared into nanojepa/, which imports no script")


def names_of_objectives(path):
    """The strings of a file that name an objective; those of a settings class don't count."""
    everything, settings, compared = nodes(path), set(), set()
    for node in everything:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            settings.update(ast.walk(node))
        if isinstance(node, ast.Compare):
            compared.update(part for right in node.comparators for part in ast.walk(right))
        if isinstance(node, ast.MatchValue):
            compared.add(node.value)
    strings = [n for n in everything if isinstance(n, ast.Constant) and n.value in OBJECTIVES]
    refused = [n for n in strings if n in compared or n.value not in OFTEN_A_KEY]
    return [n for n in refused if n not in settings]


def test_only_an_objective_knows_its_name():
    faults = [
        f"{path}:{node.lineno}: names the objective {node.value!r}"
        for path in SOURCES
        if not path.as_posix().startswith(NAMES_STAND_IN)
        for node in names_of_objectives(path)
    ]
    refuse(faults, "ask the objective instead: a method or an attribute of its class")


def test_the_settings_page_is_what_the_settings_say():
    command = [sys.executable, "docs/make_settings.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    advice = "docs/settings.md is stale: python docs/make_settings.py > docs/settings.md"
    assert done.stdout == (ROOT / "docs/settings.md").read_text(), advice


def test_every_promise_names_tests_that_exist():
    """In docs/guarantees.md, by file and name; a star after a name is a slow test."""
    faults = []
    for line in (ROOT / "docs/guarantees.md").read_text().splitlines():
        tests = {}
        for file, name, star in re.findall(r"(test_\w+\.py): |`(test_\w+)`(\\?)", line):
            if file:
                tests = {n.name: n for n in nodes(f"tests/{file}") if hasattr(n, "name")}
            elif name not in tests:
                faults.append(f"{name} is not there")
            else:
                marks = [ast.unparse(mark) for mark in tests[name].decorator_list]
                if ("pytest.mark.slow" in marks) != bool(star):
                    faults.append(f"{name}: its star and its mark disagree")
    refuse(faults, "docs/guarantees.md: name the test that proves it now, or take the promise back")


def test_ci_runs_the_readme_s_two_commands():
    blocks = (ROOT / "README.md").read_text().split("```")[1::2]
    train, test, *_ = [line for block in blocks for line in block.splitlines()[1:]]
    advice = "the README begins with two commands, to train and to test; .ci/run takes them from it"
    assert re.match(r"pip install .* && .*torchrun --standalone train_gpt\.py$", train), advice
    assert re.match(r"pip install .* && .*python -m pytest\b", test), advice
    run = (ROOT / ".ci/run").read_text()
    assert "readme_line 1" in run and "readme_line 2" in run, advice


def test_no_file_tells_a_machine_s_path_or_a_package_index():
    faults = [
        f"{path}:{number}: holds {found[0]}"
        for path in TRACKED
        for number, line in text_lines(path)
        if (found := PRIVATE.search(line))
    ]
    refuse(faults, "write a path relative to the root, and leave the index to pip's own settings")


def test_lines_fit_100_columns():
    faults = [
        f"{path}:{number}: {len(line)} columns"
        for path in TRACKED
        if path.suffix in (".py", ".yaml", ".toml") and path.parts[0] != "records"
        for number, line in text_lines(path)
        if len(line) > LONGEST_LINE
    ]
    refuse(faults, f"break the line: {LONGEST_LINE} columns at most")
