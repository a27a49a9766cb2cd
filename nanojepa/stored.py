"""Finished runs as records/ keeps them, and the generated part of a page."""

import functools
import json
import math
import re

NEEDED = ("environment.json", "metrics.jsonl", "result.json")
KEPT = re.compile(
    r"environment\.json|metrics\.jsonl|result\.json|(accuracy|evaluation)-[\w.-]+\.json"
)
# What result.json has -> what the last validation in metrics.jsonl has.
AT_THE_END = {
    "val_loss": "val_loss",
    "val_bpb": "val_bpb",
    "steps": "step",
    "train_seconds": "train_time",
    "train_flops": "train_flops",  # older runs haven't logged it there
}
BEGIN, END = "<!-- table -->\n", "<!-- /table -->"


class Run:
    """A finished run, of its stored files: {name: bytes}."""

    def __init__(self, name, files):
        if absent := [needed for needed in NEEDED if needed not in files]:
            raise ValueError(f"{name} has no {', '.join(absent)}: did it finish?")
        self.name, self.files = name, files

    @functools.cached_property
    def result(self):
        """Its result.json, with the numbers of its evaluation if there is one."""
        evaluations = sorted(self.files.keys() - {*NEEDED, "log.txt"})
        result = {}
        for name in (*evaluations, "result.json"):
            result |= json.loads(self.files[name])
        return result

    @functools.cached_property
    def rows(self):
        """The lines of its metrics.jsonl."""
        return [json.loads(line) for line in self.files["metrics.jsonl"].splitlines()]

    @functools.cached_property
    def starts(self):
        """Its environment.json: one object for each start of the process."""
        return json.loads(self.files["environment.json"])

    @property
    def settings(self):
        """The settings that another run may repeat: all but seed, name and what it resumed."""
        own = ("seed", "run_id", "resume")
        return {name: value for name, value in self.result["config"].items() if name not in own}

    def contradictions(self):
        """Yield where result.json contradicts metrics.jsonl or its own settings."""
        end = next(row for row in reversed(self.rows) if "val_loss" in row)
        for key, logged in AT_THE_END.items():
            if logged in end and self.result[key] != end[logged]:
                yield f"{key} is {self.result[key]} in result.json, {end[logged]} in metrics.jsonl"
        seed = self.result["config"]["seed"]
        if self.result["seed"] != seed:
            yield f"seed is {self.result['seed']} in result.json, {seed} in its config"


def read_run(folder, root=None, more=()):
    """The Run in a folder; root: the place of this project, which is cut from its paths.

    more: names of files to keep beside those that a program reads.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give those of finished runs, logs/<run>")
    files = {}
    for file in sorted(folder.iterdir()):
        if KEPT.fullmatch(file.name) or file.name in more:
            files[file.name] = file.read_bytes()
            if root is not None:
                files[file.name] = files[file.name].replace(f"{root}/".encode(), b"")
    return Run(folder.name, files)


def differences(stored, computed, where):
    """Yield a line for every place where two values of JSON differ.

    Numbers may differ by a millionth, as p-values do between versions of scipy.
    """
    if isinstance(stored, dict) and isinstance(computed, dict):
        for key in stored | computed:
            yield from differences(stored.get(key), computed.get(key), f"{where} {key}")
    elif isinstance(stored, list) and isinstance(computed, list) and len(stored) == len(computed):
        for i, pair in enumerate(zip(stored, computed, strict=True)):
            yield from differences(*pair, f"{where}[{i}]")
    else:
        same = stored == computed
        if {type(stored), type(computed)} <= {int, float}:
            same = math.isclose(stored, computed, rel_tol=1e-6)
        if not same:
            yield f"{where} is {stored!r}, its runs give {computed!r}"


def with_table(page, lines):
    """The text of a page, with lines between its marks <!-- table --> and <!-- /table -->."""
    text = page.read_text(encoding="utf-8")
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ValueError(f"{page} has lost its lines {BEGIN.strip()} and {END}; put them back")
    return before + begun + "".join(f"{line}\n" for line in lines) + END + after
