"""leaderboard.py on made-up runs in a folder of their own: what it takes, refuses and finds."""

import hashlib
import json
import re
import shutil
import tarfile
from types import SimpleNamespace

import pytest
from scipy import stats

import leaderboard
from conftest import ROOT, run_cli
from nanojepa import studies
from nanojepa.files import sha256_file
from nanojepa.stats import Summary, markdown, prediction_interval, wilson
from nanojepa.stored import Run, read_run

PAGE = "by hand\n<!-- table -->\n<!-- /table -->\nby hand\n"
TRACKS = {
    "steps": """
about: fewest steps to a val_loss of 2.5
rules: Anything goes.
metric: steps
data_sha256: abab
fixed: {num_layers: 3, init_from: ""}
at_most: {val_loss: 2.5, train_flops: 1.0e+13}
""",
    "pairs": """
about: highest accuracy
rules: Anything goes.
metric: startswith
higher_is_better: true
evaluate: test.jsonl
data_sha256: abab
fixed: {test_sha256: cdcd}
""",
    "gpu": """
about: lowest val_loss
rules: Anything goes.
metric: val_loss
waiting: a GPU
""",
}
CONFIG = {
    "data_path": "data/stdlib",
    "init_from": "",
    "num_layers": 3,
    "matrix_lr": 0.04,
    "jepa_lambda": 0.0,
    "jepa_objective": "span",
}
RESULT = {
    "val_loss": 2.4,
    "val_bpb": 1.9,
    "train_seconds": 290.0,
    "train_flops": 9e12,
    "steps": 1000,
    "compiled": True,
    "data_sha256": "abab",
}
SOURCE = "print('the first')\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    return project(tmp_path, monkeypatch)


def project(folder, monkeypatch):
    """The folder, as a project of its own, in which every record is a day younger than the last."""
    for page in ("records/README.md", "docs/studies.md"):
        (folder / page).parent.mkdir(exist_ok=True)
        (folder / page).write_text(PAGE)
    (folder / "records" / "tracks").mkdir()
    for name, text in TRACKS.items():
        (folder / "records" / "tracks" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(leaderboard, "ROOT", folder)
    days = iter(range(1, 28))
    clock = SimpleNamespace(
        strftime=lambda *_: f"2026-01-{next(days):02}T10:00:00Z", gmtime=lambda: None
    )
    monkeypatch.setattr(leaderboard, "time", clock)
    return folder


def make_run(root, name, seed=1, source=SOURCE, startswith=None, **values):
    """logs/<name> as train_gpt.py leaves it; its path.

    values: settings and results that aren't the defaults.
    """
    config = CONFIG | {k: v for k, v in values.items() if k in CONFIG} | {"seed": seed}
    result = RESULT | {k: v for k, v in values.items() if k in RESULT}
    result |= {"seed": seed, "config": config | {"run_id": name}}
    folder = root / "logs" / name
    (folder / "source").mkdir(parents=True)
    (folder / "source" / "train_gpt.py").write_text(source)
    hashes = {"train_gpt.py": hashlib.sha256(source.encode()).hexdigest()}
    (folder / "environment.json").write_text(json.dumps([{"step": 0, "sources": hashes}]))
    steps = [{"step": n, "train_loss": 3.0 - n / 10} for n in (1, 2, 3)]
    end = {name: result[name] for name in ("val_loss", "val_bpb", "train_flops")}
    end |= {"step": result["steps"], "train_time": result["train_seconds"]}
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*steps, end])))
    (folder / "result.json").write_text(json.dumps(result))
    if startswith is not None:
        evaluation = {"startswith": startswith, "n": 1000, "test_sha256": "cdcd"}
        evaluation["startswith_wilson95"] = wilson(round(1000 * startswith), 1000)
        (folder / "accuracy-test.json").write_text(json.dumps(evaluation))
    return folder


def new(*runs, track="steps", name="n"):
    leaderboard.main(["new", *map(str, runs), "--track", track, "--name", name])
    return leaderboard.ROOT / "records" / track / name


def enter(root, name, scores, track="steps", metric="steps", **more):
    """A record of runs with these scores and seeds 1, 2, ...; its folder."""
    runs = [
        make_run(root, f"{name}-{seed}", seed, **{metric: score}, **more)
        for seed, score in enumerate(scores, 1)
    ]
    folder = new(*runs, track=track, name=name)
    page = folder / "README.md"
    page.write_text(page.read_text().replace(leaderboard.TODO, f"what {name} changed"))
    leaderboard.main(["add", str(folder)])
    return folder


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def check(capsys):
    """The faults that check finds."""
    capsys.readouterr()
    try:
        leaderboard.main(["check"])
    except SystemExit as e:
        assert e.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert not lines or lines[-1] == f"{len(lines) - 1} fault(s)"
    return lines[:-1]


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ----------------------------------------------------------------------------------------- records

FIRST, BETTER = [300, 301, 299, 302, 298], [290, 291, 289, 292, 288]


def test_records_ties_and_what_they_are_compared_with(root, capsys):
    first = result_of(enter(root, "first", FIRST))
    assert first["is_record"] and first["best_before"] is first["p"] is None
    assert first["mean"] == 300 and first["interval"] == list(prediction_interval(FIRST))
    folder = enter(root, "better", BETTER, source=SOURCE + "print(2)\n")
    better = result_of(folder)
    p = stats.ttest_ind(BETTER, FIRST, equal_var=False, alternative="less").pvalue
    assert better["is_record"] and better["best_before"] == "first" and better["p"] == p < 0.01
    tie = result_of(enter(root, "tie", [s - 1 for s in BETTER]))  # fewer, but no evidence
    assert not tie["is_record"] and 0.01 < tie["p"] < 0.5
    assert (
        "tie, steps 289 ± 1.6 over 5 seeds; better than better: p = 0.17" in capsys.readouterr().out
    )
    last = result_of(enter(root, "last", [280, 281, 279, 282, 278]))
    assert last["is_record"] and last["best_before"] == "better"
    page = (root / "records" / "README.md").read_text()
    rows = re.findall(
        r"^\| (2026\S+) \| \[(\w+)\]\(\S+ \| (\w+) \| (.*?) \| 5 \| (.*?) \|", page, re.M
    )
    assert [row[1:4] for row in rows] == [
        ("last", "record", "280 ± 1.6"),
        ("tie", "tie", "289 ± 1.6"),
        ("better", "record", "290 ± 1.6"),
        ("first", "record", "300 ± 1.6"),
    ]
    assert rows[2][0] == "2026-01-02" and rows[2][4] == f"{p:.2g}"
    assert page.startswith("by hand\n<!--") and page.endswith("-->\nby hand\n")
    assert "It waits for a GPU." in page
    own = (folder / "README.md").read_text()
    assert "what better changed" in own and "rerun records/steps/better --seed N" in own
    assert "+print(2)\n" in (folder / "source.diff").read_text()
    assert (folder / "config.yaml").read_text().count("num_layers: 3\n") == 1
    for picture in (folder / "scores.png", root / "records" / "steps" / "history.png"):
        assert picture.stat().st_size > 5_000
    assert check(capsys) == []


def test_higher_may_be_better(root, capsys):
    scores = [0.80, 0.81, 0.79, 0.80, 0.81]
    for name, gain, is_record in (("first", 0, True), ("worse", -0.1, False), ("best", 0.1, True)):
        values = [score + gain for score in scores]
        result = result_of(enter(root, name, values, "pairs", "startswith"))
        assert result["is_record"] is is_record
    assert check(capsys) == []


@pytest.mark.parametrize(
    "track, change, message",
    [
        ("steps", {"data_sha256": "ffff"}, "data_sha256 is 'ffff'; steps wants 'abab'"),
        ("steps", {"num_layers": 4}, "num_layers is 4; steps wants 3"),
        ("steps", {"init_from": "logs/x"}, "init_from is 'logs/x'; steps wants ''"),
        ("steps", {"val_loss": 2.6}, "val_loss is 2.6; steps wants at most 2.5"),
        ("steps", {"train_flops": 2e13}, r"train_flops is 2e\+13; steps wants at most 1e\+13"),
        ("pairs", {}, "test_sha256 is None; pairs wants 'cdcd'"),
        ("gpu", {}, "track gpu waits for a GPU"),
    ],
)
def test_rules_of_a_track(root, track, change, message):
    """Each is one line; nothing is left of the folder."""
    runs = [make_run(root, f"run{seed}", seed, **change) for seed in range(5)]
    with pytest.raises(SystemExit, match=f"^error: .*{message}$"):
        new(*runs, track=track)
    assert not list((root / "records").glob("*/n"))


def test_what_else_new_and_add_refuse(root):
    runs = [make_run(root, f"run{seed}", seed) for seed in range(5)]
    with pytest.raises(SystemExit, match="^error: 4 different seeds; a record has 5 at least$"):
        new(*runs[:4])
    again = make_run(root, "again", 3)
    with pytest.raises(SystemExit, match="^error: 4 different seeds; a record has 5 at least$"):
        new(*runs[:4], again)
    odd = make_run(root, "odd", 9, matrix_lr=0.05)
    with pytest.raises(
        SystemExit, match="seed 9: config.yaml: matrix_lr is 0.04, its runs give 0.05"
    ):
        new(*runs, odd)
    folder = new(*runs)
    with pytest.raises(SystemExit, match="^error: .*records/steps/n exists; choose another --name"):
        new(*runs)
    with pytest.raises(SystemExit, match="README.md: say what changed and why it helps"):
        leaderboard.main(["add", str(folder)])
    (runs[0] / "result.json").unlink()
    with pytest.raises(SystemExit, match="^error: run0 has no result.json: did it finish?"):
        new(*runs, name="m")
    with pytest.raises(SystemExit, match="logs/none: no such folder"):
        new(root / "logs/none", name="m")


def edit_run(number, **values):
    return lambda folder: edit_json(
        folder / f"seed{number}" / "result.json", lambda result: result.update(values)
    )


def edit_record(**values):
    return lambda folder: edit_json(folder / "result.json", lambda result: result.update(values))


def edit_both(seed, key, old, new):
    """Edit a number in all files of a seed."""

    def edit(folder):
        for file in (folder / f"seed{seed}").iterdir():
            file.write_text(file.read_text().replace(f'"{key}": {old}', f'"{key}": {new}'))

    return edit


def resumed_with_other_source(folder):
    edit_json(
        folder / "seed2" / "environment.json",
        lambda starts: starts.append({"step": 9, "sources": {"train_gpt.py": "00"}}),
    )


FAULTS = {  # what is done to a record -> what check says of it
    "a seed's score": (
        edit_run(2, steps=250),
        "seed 2: steps is 250 in result.json, 291 in metrics.jsonl",
    ),
    "a seed's loss, everywhere": (
        edit_both(2, "val_loss", 2.4, 2.6),
        "seed 2: val_loss is 2.6; steps wants at most 2.5",
    ),
    "a seed's steps, everywhere": (
        lambda f: (edit_run(2, steps=250)(f), edit_both(2, "step", 291, 250)(f)),
        "result.json: mean is 290.0, its runs give 281.8",
    ),
    "a budget": (
        edit_both(3, "train_flops", "9000000000000.0", 2e13),
        r"seed 3: train_flops is 2e\+13; steps wants at most 1e\+13",
    ),
    "another validation shard or tokenizer": (
        edit_run(1, data_sha256="ffff"),
        "seed 1: data_sha256 is 'ffff'; steps wants 'abab'",
    ),
    "a run of another config": (
        lambda f: edit_json(
            f / "seed4" / "result.json", lambda r: r["config"].update(matrix_lr=0.1)
        ),
        "seed 4: config.yaml: matrix_lr is 0.04, its runs give 0.1",
    ),
    "the config": (
        lambda f: (f / "config.yaml").write_text("matrix_lr: 9\n"),
        "seed 1: config.yaml: matrix_lr is 9, its runs give 0.04",
    ),
    "a missing seed": (
        lambda f: shutil.rmtree(f / "seed5"),
        "better: 4 different seeds; a record has 5 at least",
    ),
    "a run twice": (
        lambda f: (shutil.rmtree(f / "seed5"), shutil.copytree(f / "seed4", f / "seed5")),
        "better: 4 different seeds",
    ),
    "another seed's number": (
        edit_run(5, seed=6),
        "seed 6: seed is 6 in result.json, 5 in its config",
    ),
    "source that isn't what ran": (
        lambda f: (f / "source" / "train_gpt.py").write_text("print(3)\n"),
        "seed 1: source/train_gpt.py is not what ran",
    ),
    "a file of source too many": (
        lambda f: (f / "source" / "more.py").write_text(""),
        "seed 1: source/more.py is not what ran",
    ),
    "resumed with other source": (
        resumed_with_other_source,
        "seed 2: source/train_gpt.py is not what ran",
    ),
    "the diff": (
        lambda f: (f / "source.diff").write_text(""),
        "source.diff is not the difference to the source of the record before",
    ),
    "p": (edit_record(p=1e-9), "result.json: p is 1e-09, its runs give"),
    "the verdict": (
        edit_record(is_record=False),
        "result.json: is_record is False, its runs give True",
    ),
    "its date": (
        edit_record(date="2025-12-01T00:00:00Z"),
        "result.json: best_before is 'first', its runs give None",
    ),
    "the record before": (
        lambda f: shutil.rmtree(f.with_name("first")),
        "result.json: best_before is 'first', its runs give None",
    ),
    "no result": (
        lambda f: (f / "result.json").unlink(),
        "better: FileNotFoundError: .*result.json",
    ),
    "a torn file": (lambda f: (f / "seed1" / "result.json").write_text("{"), "JSONDecodeError"),
    "an empty file": (lambda f: (f / "seed1" / "result.json").write_text("{}"), "KeyError: 'seed'"),
    "no metrics": (
        lambda f: (f / "seed1" / "metrics.jsonl").unlink(),
        "seed1 has no metrics.jsonl",
    ),
    "the table": (
        lambda f: (f.parents[1] / "README.md").write_text(PAGE),
        "records/README.md is not what the result.json files give",
    ),
}


@pytest.fixture(scope="module")
def two_records(tmp_path_factory):
    """Two records, in a folder to be copied."""
    made = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        project(made, patch)
        enter(made, "first", FIRST)
        enter(made, "better", BETTER, source="print('better')\n")
    return made


def in_copy(made, folder, monkeypatch):
    """A copy of a project, which leaderboard.py then works on."""
    shutil.copytree(made, folder, dirs_exist_ok=True)
    monkeypatch.setattr(leaderboard, "ROOT", folder)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(two_records, tmp_path, monkeypatch, capsys, fault):
    """Each edit is a line that names the record and what was done to it, and no other record."""
    root = in_copy(two_records, tmp_path, monkeypatch)
    edit, message = FAULTS[fault]
    edit(root / "records" / "steps" / "better")
    lines = check(capsys)
    assert re.search(message, "\n".join(lines)), lines
    others = {"its date", "the table"}  # they concern other records too
    assert all("better" in line for line in lines) or fault in others


# In place of train_gpt.py: it leaves the files of a run with the steps of its seed.
TRAIN = """
import json, pathlib, sys
flags = dict(flag.lstrip("-").split("=") for flag in sys.argv[1:])
folder, seed = pathlib.Path("logs", flags["run_id"]), int(flags["seed"])
folder.mkdir(parents=True)
result = json.loads('''RESULT''')
result |= {"seed": seed, "steps": 288 + seed, "config": {"seed": seed, **result["config"]}}
end = {"step": result["steps"], "val_loss": result["val_loss"]}
for name, content in (("result", result), ("environment", []), ("metrics", end)):
    suffix = ".jsonl" if name == "metrics" else ".json"
    (folder / (name + suffix)).write_text(json.dumps(content))
"""


def test_only_rerun_executes_a_record_s_code(root, capfd):
    """It says whether the result lands in the interval. The project's train_gpt.py stays out."""
    source = TRAIN.replace("RESULT", json.dumps(RESULT | {"config": CONFIG}))
    folder = enter(root, "mine", BETTER, source=source)
    (root / "nanojepa").mkdir()
    (root / "train_gpt.py").write_text("raise SystemExit('the wrong one')\n")
    assert check(capfd) == []
    leaderboard.main(["table"])
    assert len(list((root / "logs").iterdir())) == 5
    low, high = result_of(folder)["interval"]
    for seed, where in ((2, "inside"), (50, "OUTSIDE")):
        leaderboard.main(["rerun", str(folder), "--seed", str(seed)])
        said = f"result: steps {288 + seed} lands {where} {low:.6g} .. {high:.6g}\n"
        assert said in capfd.readouterr().out


# ----------------------------------------------------------------------------------------- studies

# {(number of the arm, seed): val_bpb}
VALUES = {
    **{(0, 1): 1.90, (1, 1): 1.88, (2, 1): 1.93},
    **{(0, 2): 1.91, (1, 2): 1.88, (2, 2): 1.92},
    **{(0, 3): 1.89, (1, 3): 1.885, (2, 3): 1.95},
}


def make_grid(root, name="lambda", seeds=(1, 2, 3), baseline=None):
    """ablations/<name> of two weights and their twin; its path.

    Its numbers are missing: a study's come out of the runs.
    """
    arms = [f"jepa_lambda={weight}" for weight in (0, 0.1, 0.2)]
    runs = []
    for seed in seeds:
        for n, arm in enumerate(arms):
            run, weight = f"{name}-{n}-seed{seed}", float(arm.split("=")[1])
            runs.append({"arm": arm, "seed": seed, "run": run, "finished": True})
            make_run(root, run, seed, jepa_lambda=weight, val_bpb=VALUES[n, seed])
    twin = baseline or arms[0]
    rows = [
        {
            "arm": arm,
            "settings": [arm.split("=")],
            "files": [],
            "twin": twin if arm != twin else None,
        }
        for arm in arms
    ]
    grid = {
        "command": ["--arms", "jepa_lambda=0.1,0.2", "--config", f"{root}/configs/x.yaml"],
        "script": "train_gpt.py",
        "baseline": baseline,
        "tables": [{"metric": "val_bpb", "arms": rows}],
        "runs": runs,
    }
    folder = root / "ablations" / name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(grid))
    return str(folder)


def make_study(root, *grids):
    leaderboard.main(["study", *grids, "--name", "S", "--question", "Does it help?"])
    folder = root / "records" / "studies" / "S"
    (folder / "run.sh").write_text("python ablate.py ...\n")
    return folder


def test_a_study_of_two_grids(root, capsys):
    """The second chooses a setting: its two seeds claim nothing, so it isn't in docs/studies.md."""
    folder = make_study(root, make_grid(root), make_grid(root, "choice", (1, 2)))
    grid, _ = result_of(folder)["grids"]
    test = stats.ttest_rel([1.88, 1.88, 1.885], [1.90, 1.91, 1.89])
    table = grid["tables"][0]
    row = table["arms"][1]
    assert row["arm"] == "jepa_lambda=0.1" and row["twin"] == "jepa_lambda=0"
    assert row["paired"]["p"] == pytest.approx(test.pvalue)
    assert grid["data"] == {"data/stdlib": "abab"}
    assert grid["command"][-1] == "configs/x.yaml"  # no place of this machine
    page, top = (folder / "README.md").read_text(), (root / "docs" / "studies.md").read_text()
    assert "Does it help?" in page and "![lambda](lambda.png)" in page and "## choice" in page
    assert markdown(Summary(**table)) in page
    assert (folder / "lambda.png").stat().st_size > 10_000
    low, high = (f"{x:+.5f}" for x in test.confidence_interval(0.95))
    assert (
        "| [lambda](../records/studies/S/README.md) | jepa_lambda=0.1 | 3 | val_bpb | -0.01833 | "
        f"{low} .. {high} | {row['paired']['holm']:.3g} | 1.00x |" in top
    )
    assert top.count("[lambda]") == 2 and "[choice]" not in top
    assert check(capsys) == []
    (folder / "README.md").write_text(page.replace("Does it help?", "Does it, though?"))
    assert check(capsys) == []  # words are free


def test_a_baseline_stands_for_the_twin(root, capsys):
    folder = make_study(root, make_grid(root, baseline="jepa_lambda=0.2"))
    table = result_of(folder)["grids"][0]["tables"][0]
    differences = [row.get("paired", {}).get("difference") for row in table["arms"]]
    assert differences == [pytest.approx(-0.1 / 3), pytest.approx(-0.155 / 3), None]
    assert "difference to the baseline" in (folder / "README.md").read_text()
    assert check(capsys) == []


def edit_archive(run, old, new):
    """Replace text in a stored run, and seal the archive as one who hides it would."""

    def edit(folder):
        runs = studies.read_archive(folder / "logs.tar.xz")
        files = {n: b.replace(old.encode(), new.encode()) for n, b in runs[run].files.items()}
        studies.write_archive(folder / "logs.tar.xz", (runs | {run: Run(run, files)}).values())
        edit_record(logs_sha256=sha256_file(folder / "logs.tar.xz"))(folder)

    return edit


def drop_run(folder):
    runs = studies.read_archive(folder / "logs.tar.xz")
    del runs["lambda-2-seed3"]
    studies.write_archive(folder / "logs.tar.xz", runs.values())


def edit_grid(change):
    return lambda folder: edit_json(folder / "result.json", lambda r: change(r["grids"][0]))


def swap(grid):
    """Exchange the arms of two runs of one seed, as one who would like the other sign would do."""
    one, other = grid["runs"][:2]
    one["run"], other["run"] = other["run"], one["run"]


STUDY_FAULTS = {
    "a row": (
        edit_grid(lambda g: g["tables"][0]["arms"][1]["paired"].update(p=0.001)),
        r"grid lambda: tables\[0\] arms\[1\] paired p is 0.001, its runs give 0.12",
    ),
    "data": (edit_grid(lambda g: g["data"].update({"data/stdlib": "00"})), "data/stdlib is '00'"),
    "runs swapped": (
        edit_grid(swap),
        "lambda-1-seed1 has jepa_lambda 0.1, which is not jepa_lambda=0, seed 1",
    ),
    "no twin": (
        edit_grid(lambda g: g["tables"][0]["arms"].pop(0)),
        "jepa_lambda=0.1 has no twin: jepa_lambda=0 is not in the grid",
    ),
    "a run left out": (
        edit_grid(lambda g: g["runs"].pop()),
        "lambda-2-seed3 is a run of none of its grids",
    ),
    "a run gone": (drop_run, "logs.tar.xz is not the archive .*\n.*KeyError: 'lambda-2-seed3'"),
    "a run's number": (
        lambda f: edit_archive(
            "lambda-2-seed1", '"val_bpb": 1.93, "train_s', '"val_bpb": 1.83, "train_s'
        )(f),
        "lambda-2-seed1: val_bpb is 1.83 in result.json, 1.93 in metrics.jsonl",
    ),
    "another setting": (
        edit_archive("lambda-1-seed2", '"matrix_lr": 0.04', '"matrix_lr": 0.05'),
        "lambda-1-seed2 and lambda-0-seed1 differ in matrix_lr; a grid's",
    ),
    "another source": (
        edit_archive("lambda-1-seed2", '"train_gpt.py": "', '"train_gpt.py": "00'),
        "lambda-1-seed2 and lambda-0-seed1 differ in train_gpt.py",
    ),
    "other data": (
        edit_archive("lambda-1-seed2", '"abab"', '"ffff"'),
        "lambda-1-seed2 and lambda-0-seed1 differ in data_sha256",
    ),
    "no archive": (lambda f: (f / "logs.tar.xz").write_bytes(b"x"), "not the archive|ReadError"),
    "no command": (lambda f: (f / "run.sh").unlink(), "no run.sh"),
    "no picture": (lambda f: (f / "lambda.png").unlink(), "no lambda.png"),
    "top table": (
        lambda f: (f.parents[2] / "docs" / "studies.md").write_text(PAGE),
        "docs/studies.md is not what",
    ),
}


@pytest.fixture(scope="module")
def one_study(tmp_path_factory):
    made = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        project(made, patch)
        make_study(made, make_grid(made))
    return made


@pytest.mark.parametrize("fault", STUDY_FAULTS)
def test_check_finds_in_a_study(one_study, tmp_path, monkeypatch, capsys, fault):
    root = in_copy(one_study, tmp_path, monkeypatch)
    edit, message = STUDY_FAULTS[fault]
    edit(root / "records" / "studies" / "S")
    lines = check(capsys)
    assert re.search(message, "\n".join(lines)), lines


def test_archives_are_the_same_bytes_for_the_same_files(root):
    runs = [read_run(make_run(root, f"r{n}", n)) for n in range(3)]
    for name, some in (("one", runs), ("two", runs[::-1])):
        studies.write_archive(root / f"{name}.tar.xz", some)
    assert (root / "one.tar.xz").read_bytes() == (root / "two.tar.xz").read_bytes()
    with tarfile.open(root / "one.tar.xz") as archive:
        assert len(archive.getnames()) == 9
    stored = studies.read_archive(root / "one.tar.xz")
    assert {name: run.files for name, run in stored.items()} == {r.name: r.files for r in runs}


# -------------------------------------------------------------------------------------------- real


def test_the_files_of_a_real_run(data_path, run_id):
    """What train_gpt.py leaves is read as it is meant, and an edited number is found."""
    assert run_cli(data_path, f"--run_id={run_id}").returncode == 0
    run = read_run(ROOT / "logs" / run_id)
    assert list(run.contradictions()) == []
    for name, sha256 in run.starts[0]["sources"].items():
        assert sha256_file(ROOT / "logs" / run_id / "source" / name) == sha256
    for key in ("val_loss", "val_bpb", "steps", "train_seconds", "train_flops"):
        edited = json.dumps(run.result | {key: run.result[key] * 1.01}).encode()
        (fault,) = Run(run_id, run.files | {"result.json": edited}).contradictions()
        assert fault.startswith(f"{key} is ")


def test_what_is_committed(capsys):
    """Every number of the records and studies comes out of their runs."""
    assert check(capsys) == []
    tracks = leaderboard.read_tracks()
    assert {name for name, track in tracks.items() if not track.waiting} == {
        "steps",
        "short",
        "pairs",
    }
