"""ablate.py: arms, the names of runs, and grids of a trainer that takes no time.

The tests marked slow make grids of the real trainers.
"""

import hashlib
import inspect
import json
import shutil
import threading
import time
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import pytest

import ablate
import train_gpt
from ablate import parse_arms
from conftest import TINY
from nanojepa import settings, stats
from nanojepa.hf.settings import Config as FinetuneConfig
from nanojepa.records import prepare_pairs
from nanojepa.runlog import project_sources
from nanojepa.stats import Arm

ROOT = ablate.ROOT
GPT, HF = "train_gpt.py", "finetune.py"

# A project whose trainer only computes a number from its settings and its source.
FAKE = {
    "train_gpt.py": """
import json, os, sys
from dataclasses import asdict, dataclass
from pathlib import Path

from nanojepa.settings import load_settings
from nanojepa.term import gain

@dataclass
class Config:
    # ---- JEPA
    jepa_lambda: float = 0.0  # x
    jepa_objective: str = "toy"  # x
    jepa_layer: int = -1  # x
    # ---- the rest
    num_layers: int = 6  # x
    iterations: int = 9  # x
    train_flops: float = 1e9  # x
    max_wallclock_seconds: float = 5.0  # x
    train_seq_len: int = 64  # x
    matrix_lr: float = 0.04  # x
    compile: bool = True  # x
    data_path: str = "data/stdlib"  # x
    tokenizer: str = ""  # x
    init_from: str = ""  # x
    seed: int = 1  # x
    run_id: str = ""  # x
    resume: str = ""  # x

    def __post_init__(self):
        if self.jepa_layer >= self.num_layers:
            raise ValueError(f"JEPA_LAYER={self.jepa_layer}: must be -1, or a block")

def main():
    cfg = load_settings(Config, sys.argv[1:], os.environ).config
    loss = 2 + 0.01 * cfg.seed - gain(cfg.jepa_lambda)
    folder = Path(__file__).resolve().parent / "logs" / cfg.run_id
    folder.mkdir(exist_ok=cfg.resume == "auto")
    rows = [{"step": n, "train_loss": loss + 1 / n} for n in range(1, cfg.iterations + 1)]
    (folder / "metrics.jsonl").write_text("\\n".join(map(json.dumps, rows)))
    result = {"val_bpb": loss, "quantized_val_bpb": loss + 0.1, "train_seconds": 1.0, "steps": 9}
    result |= {"train_flops": 1e9, "config": asdict(cfg)}
    (folder / "result.json").write_text(json.dumps(result))

if __name__ == "__main__":
    main()
""",
    "model.py": "RIGHT = 0.25\n",
    "evaluate.py": """
import json, sys
import model
assert sys.argv[1] == "accuracy" and "--run" in sys.argv
print("so:")
print(json.dumps({"startswith": model.RIGHT}))
""",
    "finetune.py": "import nanojepa.hf.settings\n",
    "nanojepa/__init__.py": "",
    "nanojepa/unused.py": "",
    "nanojepa/term.py": "def gain(weight):\n    return 0.1 * weight\n",
    "nanojepa/settings.py": inspect.getsource(settings),
    "nanojepa/runlog.py": "import sys\nfrom pathlib import Path\n\n"
    + inspect.getsource(project_sources),
    "nanojepa/hf/__init__.py": "",
    "nanojepa/hf/settings.py": """
from dataclasses import dataclass, field
ALIASES = {"seed": "general.finetune_seed"}

@dataclass
class General:
    finetune_seed: int = 1  # x

@dataclass
class Training:
    # ---- JEPA
    lbd: float = 0.1  # x
    # ---- cost
    same_flop: bool = False  # x
    output_dir: str = ""  # x

@dataclass
class Config:
    general: General = field(default_factory=General)
    training: Training = field(default_factory=Training)
""",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The folder of a project of its own, which ablate.py takes for its project."""
    folder = tmp_path / "project"
    for name, text in FAKE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(ablate, "ROOT", folder)
    return folder


def plan(project, flags=(), **changes):
    """(arms, runs) of these of ablate.py's flags."""
    given = dict(arms=["jepa_lambda=0.1"], arm=[], baseline=None, script=GPT, config=None)
    given |= dict(budget="steps=3", seeds=1, first_seed=1, name="n", evaluate=None, task=None)
    given |= dict(metric="val_bpb")
    return ablate.plan(Namespace(**{**given, **changes}), list(flags), project / "out")


# ---- arms


def labels(*given, **more):
    return [arm.label for arm in parse_arms(*given, **more)]


def test_arms_are_a_grid_with_its_twins_first(tmp_path):
    edited, file = tmp_path / "mine.py", "nanojepa/objectives/span.py"
    edited.write_text("")
    assert labels(["JEPA_LAMBDA=0.005,0.1"], GPT) == [
        "jepa_lambda=0",
        "jepa_lambda=0.005",
        "jepa_lambda=0.1",
    ]
    once = parse_arms(["JEPA_LAMBDA=0.1"], GPT)
    assert parse_arms(["JEPA_LAMBDA=0.0,0.1"], GPT) == once  # the twin, however it is written
    grid = parse_arms(["jepa_lambda=0,0.1", "JEPA_LAYER=-1,2", "num_layers=3,4"], GPT)
    twins = ["jepa_lambda=0 num_layers=3", "jepa_lambda=0 num_layers=4"]
    assert [arm.label for arm in grid if arm.twin is None] == twins and len(grid) == 6
    assert {arm.twin for arm in grid[2:]} == set(twins)
    arm = parse_arms([f"{file}:{edited}"], GPT)[1]
    assert arm == Arm((), ((file, str(edited)),), "jepa_lambda=0")
    assert labels(["lbd=0.1,1", "step_jepa=true"], HF) == [
        "lbd=0",
        "lbd=0.1 step_jepa=true",
        "lbd=1 step_jepa=true",
    ]
    assert labels(["JEPA_OBJECTIVE=toy,other", "JEPA_LAMBDA=1"], GPT) == [  # a new one: a setting
        "jepa_lambda=0",
        "jepa_lambda=1 jepa_objective=toy",
        "jepa_lambda=1 jepa_objective=other",
    ]
    for text, message in [
        ("JEPA_LAMBDA", "must be NAME=value"),
        ("JEPA_LAMBDA=", "must be NAME=value"),
        ("span.py:x.py", "span.py is no file; name it from the project"),
        (f"{file}:x.py", "x.py is no file; name it from this folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_arms([text], GPT)


def test_arms_one_by_one_and_a_baseline(tmp_path):
    """Each arm once, however its settings are ordered and called."""
    edited = tmp_path / "my file.py"
    edited.write_text("")
    twice = ["JEPA_LAYER=2 JEPA_LAMBDA=0.1", "jepa_lambda=0.1 jepa_layer=2"]
    assert labels([], GPT, twice) == ["jepa_lambda=0", "jepa_lambda=0.1 jepa_layer=2"]
    singles = ["JEPA_LAMBDA=0.1 JEPA_LAYER=3", "JEPA_LAMBDA=1 JEPA_LAYER=-1,2"]
    assert labels(["JEPA_LAYER=2,3", "JEPA_LAMBDA=0.1"], GPT, singles) == [
        "jepa_lambda=0",
        "jepa_lambda=0.1 jepa_layer=2",
        "jepa_lambda=0.1 jepa_layer=3",
        "jepa_lambda=1 jepa_layer=-1,2",  # here a comma belongs to the value
    ]
    singles = ["training.lbd=0.1 dataset.predictors=2", "use_lora=true lbd=1 gamma=0.5"]
    assert labels([], HF, singles) == [
        "lbd=0",
        "lbd=0 use_lora=true",
        "lbd=0.1 predictors=2",
        "lbd=1 gamma=0.5 use_lora=true",
    ]
    twin, off = parse_arms([], GPT, [f"model.py:'{edited}' JEPA_LAMBDA=0 JEPA_LAYER=1"])
    assert twin == Arm((("jepa_lambda", "0"),))  # without the term its settings mean nothing
    assert off == Arm(twin.settings, (("model.py", str(edited)),), twin.label)
    baseline = "ITERATIONS=9 JEPA_LAMBDA=0"
    arms = parse_arms(["JEPA_LAMBDA=0,0.1"], GPT, ["JEPA_LAMBDA=0.1 ITERATIONS=5"], baseline)
    assert [(arm.label, arm.twin) for arm in arms] == [
        ("jepa_lambda=0 iterations=9", None),
        ("jepa_lambda=0", "jepa_lambda=0 iterations=9"),
        ("jepa_lambda=0.1", "jepa_lambda=0 iterations=9"),
        ("jepa_lambda=0.1 iterations=5", "jepa_lambda=0 iterations=9"),
    ]
    for singles, baseline, message in [
        (["JEPA_LAMBDA=0.1 JEPA_LAYER"], None, "--arm JEPA_LAMBDA=0.1 JEPA_LAYER: must be NAME"),
        ([f"data/mine.py:'{edited}'"], None, "data/mine.py is no file; name it from the project"),
        (["JEPA_LAMBDA=1"], "", "--baseline : must be NAME"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_arms([], GPT, singles, baseline)


def test_a_term_s_settings_are_the_group_jepa_of_its_script():
    of_term = {script: set(ablate.term_settings(script)) for script in (GPT, HF)}
    known = {field.name for field in fields(train_gpt.Config)}
    assert of_term[GPT] == {name for name in known if name.startswith("jepa_")}
    sections = [section.type for section in fields(FinetuneConfig)]
    known = {field.name for section in sections for field in fields(section)}
    assert {"lbd", "gamma", "objective", "predictors", "views", "jepa_ratio"} <= of_term[HF] < known
    assert not of_term[HF] & {"batch_size", "plain", "same_flop", "use_lora"}


def test_budgets():
    flags = ["--train_flops=0", "--max_wallclock_seconds=0", "--iterations=200"]
    assert ablate.budget_flags("steps=200", GPT) == flags
    assert ablate.budget_flags("seconds", GPT) == ["--train_flops=0"]
    assert ablate.budget_flags("flops", HF) == ["--same_flop=true"]
    assert ablate.budget_flags(None, GPT) == []
    for text, script, message in (("epochs=2", GPT, "steps or flops"), ("seconds", HF, "flops")):
        with pytest.raises(ValueError, match=f"--budget {text}: for {script} it must be {message}"):
            ablate.budget_flags(text, script)


# ---- the names of runs


def names(project, **changes):
    """[(name of a run, name of its evaluation)]"""
    found = plan(project, **changes)[1]
    return [(run.folder.name, run.evaluation and run.evaluation.name) for run in found]


def test_a_run_is_another_one_if_a_setting_or_an_input_is(project, tmp_path, monkeypatch):
    """Wherever a setting comes from; an evaluation is another one by its file and its task."""
    config, test, ranks = (tmp_path / name for name in ("c.yaml", "test.jsonl", "ranks"))
    config.write_text("seed: 1\n")
    test.write_text("x")
    base = dict(config=str(config), evaluate=str(test))

    def now(**changes):
        return names(project, **{**base, **changes})

    def same(a, b):
        return bool({run for run, _ in a} & {run for run, _ in b})

    first = now()
    assert first == now() and len(set(first)) == 2
    assert not same(first, now(budget="steps=4"))
    assert not same(first, now(flags=["--num_layers=3"]))
    task = now(task="exact")
    assert same(task, first) and task != first
    assert now(arms=["jepa_lambda=0.05,0.1"])[::2] == first  # an arm more: the others are done
    config.write_text("# a comment\nnum_layers: 6\n")  # the default
    assert now() == first
    config.write_text("seed: 1\nnum_layers: 2\n")
    assert not same(first, now())
    config.write_text("seed: 1\n")
    with monkeypatch.context() as environment:
        environment.setenv("TRAIN_SEQ_LEN", "128")
        assert not same(first, now())
    with monkeypatch.context() as environment:
        environment.setenv("JEPA_LAMBDA", "3")  # every arm, and so the twin, has its own
        assert now() == first
    monkeypatch.chdir(tmp_path)
    ranks.write_text("one")
    with_file = now(flags=["--tokenizer", "ranks"])
    ranks.write_text("two")
    assert not same(with_file, now(flags=["--tokenizer", "ranks"]))
    for folder in ("a", "b"):
        (tmp_path / folder / "data").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / folder)
        in_folder = now(flags=["--data_path", "data"])  # another folder of that name
        assert not same(with_file, in_folder)
        with_file = in_folder


def test_a_run_is_another_one_if_its_source_is(project, tmp_path):
    """And an arm runs a copy of the source of now, with its own file in it."""
    (tmp_path / "mine.py").write_text("def gain(weight):\n    return 7\n")
    arm = dict(arms=["jepa_lambda=0.1", f"nanojepa/term.py:{tmp_path / 'mine.py'}"])
    first, with_file = names(project), plan(project, **arm)[1][1]
    (project / "nanojepa" / "unused.py").write_text("# edited\n")
    assert names(project) == first  # the trainer doesn't import it
    train_gpt_file = project / "train_gpt.py"
    train_gpt_file.write_text(f"{train_gpt_file.read_text()}\n# edited\n")
    assert not set(names(project)) & set(first)
    changed = plan(project, **arm)[1][1]
    assert changed.folder != with_file.folder
    for run, edited in ((with_file, False), (changed, True)):
        script = Path(run.command[1])
        assert script.read_text().endswith("# edited\n") == edited
        term = (script.parent / "nanojepa" / "term.py").read_text()
        assert term == (tmp_path / "mine.py").read_text()


def test_data_is_another_input_if_its_shards_are(tmp_path):
    def make(name, code):
        examples = [(1, "pairs", None, ["a", code])]
        prepare_pairs(tmp_path / name, examples, examples, source="x.jsonl", vocab_size=258)
        return ablate.content(str(tmp_path / name))

    assert make("here", "b") == make("there", "b") != make("other", "c")
    assert ablate.content("data/stdlib") == "data/stdlib"  # which may be there or not


def test_runs_are_interleaved_over_the_arms(project):
    _, runs = plan(project, arms=["jepa_lambda=0.1,0.2"], seeds=2, first_seed=4)
    assert [(run.arm.label, run.seed) for run in runs] == [
        (f"jepa_lambda={weight}", seed) for seed in (4, 5) for weight in ("0", "0.1", "0.2")
    ]
    assert len({run.folder for run in runs}) == 6
    for run in runs:
        assert {f"--seed={run.seed}", f"--run_id={run.folder.name}"} <= set(run.command)
    arms, runs = plan(
        project,
        baseline="jepa_lambda=0 iterations=2",
        arms=[],
        arm=["jepa_lambda=0.1 iterations=1"],
        budget="steps",
    )
    assert [run.arm for run in runs] == arms and "--max_wallclock_seconds=0" in runs[0].command
    # A flag may be valid only together with the arms' settings; {seed} is each run's seed.
    deep = dict(arms=[], arm=["num_layers=9 jepa_lambda=1"], baseline="num_layers=12")
    chained = ["--jepa_layer=8", "--init_from=logs/a-seed{seed}"]
    for run in plan(project, flags=chained, **deep, seeds=2)[1]:
        assert f"--init_from=logs/a-seed{run.seed}" in run.command


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(arms=["jepa_lambda=0.1,0.10"]), "jepa_lambda=0.10 is the same run as arm jepa_lam"),
        (dict(arms=["num_layers=6"]), "num_layers=6 is the same run as arm jepa_lambda=0 num_lay"),
        (dict(arms=["jepa_lambda=1", "seed=3,4"]), "seed=4 is the same run as"),
        (dict(flags=["--num_layers=3"], arms=["jepa_layer=4"]), "^JEPA_LAYER=4: must be"),
        (dict(arms=["jepa_lamda=4"]), "^unknown argument --jepa_lamda=4; did you mean jepa_lambda"),
    ],
)
def test_a_grid_that_can_t_be_is_refused_before_its_first_run(project, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(project, **changes)


def test_a_file_that_can_t_be_imported_is_refused_before_the_first_run(project, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    arm = [f"nanojepa/term.py:{tmp_path / 'broken.py'}"]
    with pytest.raises(ValueError, match="source-.*/train_gpt.py: ZeroDivisionError: division by"):
        plan(project, arms=arm)


# ---- grids


@pytest.fixture
def run(project):
    """Run a grid of the project, named g."""
    return lambda *flags: ablate.run_grid(["--name", "g", "--budget", "steps", *flags])


def test_a_grid_is_stopped_and_continued(run, project, tmp_path, capsys, monkeypatch):
    """With an edited file, and one whose run fails at first and succeeds when it is tried again."""
    monkeypatch.setenv("SEED", "9")  # which every run has its own of
    edited, failing = tmp_path / "edited.py", tmp_path / "failing.py"
    edited.write_text("def gain(weight):\n    return weight\n")
    mended = f"__import__('pathlib').Path({str(tmp_path / 'mended')!r}).exists()"
    failing.write_text(f"def gain(weight):\n    assert {mended}\n    return 0.3 * weight\n")
    own = project / "nanojepa" / "term.py"
    arms = ["--arms", f"nanojepa/term.py:{own},{failing},{edited}", "--arms", "jepa_lambda=0.5"]
    arms += ["--seeds", "1", "--metric", "val_bpb,quantized_val_bpb"]
    twin, plain, failed, changed = run(*arms)
    printed, out = capsys.readouterr().out, project / "ablations" / "g"
    assert "3 of 4 runs, 0:00:" in printed and printed.count("FAILED, see") == 1
    assert "seed 1: val_bpb 1.96\n" in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("result: val_bpb: too few seeds") and "no claim is possible" in printed
    means = [row["mean"] for row in (twin, plain, changed)]
    assert means == pytest.approx([2.01, 1.96, 1.51])
    assert (failed["failed"], failed["mean"]) == (1, None)
    assert changed["paired"]["difference"] == pytest.approx(-0.5)
    result = json.loads((out / "result.json").read_text())
    assert (result["script"], result["baseline"]) == (GPT, None)
    assert [t["metric"] for t in result["tables"]] == ["val_bpb", "quantized_val_bpb"]
    assert result["tables"][1]["arms"][0]["mean"] == pytest.approx(2.11)
    row = result["tables"][0]["arms"][3]
    assert (row["settings"], row["twin"]) == ([["jepa_lambda", "0.5"]], "jepa_lambda=0")
    assert row["files"] == [["nanojepa/term.py", str(edited)]]
    text = (out / "table.md").read_text()
    for table in result["tables"]:
        assert stats.markdown(stats.Summary(**table)) in text
    folders = {one["arm"]: project / "logs" / one["run"] for one in result["runs"]}
    assert [one["arm"] for one in result["runs"] if not one["finished"]] == [failed["arm"]]

    def times():
        return {f: f.stat().st_mtime_ns for f in (project / "logs").glob("g-*/result.json")}

    before = times()
    (folders[plain["arm"]] / "result.json").unlink()  # as if it had been stopped there
    (tmp_path / "mended").touch()
    rows = run(*arms)
    assert [row["mean"] for row in rows] == pytest.approx([2.01, 1.96, 1.86, 1.51])
    again = [f.parent for f, then in before.items() if times()[f] != then]
    assert again == [folders[plain["arm"]]] and len(before) == 3
    log = (out / f"{folders[failed['arm']].name}.log").read_text()
    assert log.count("AssertionError") == 1 and log.count("train_gpt.py --") == 2  # both tries
    assert (out / "ablation.png").stat().st_size > 10_000


def test_runs_share_the_gpus_in_order(run, monkeypatch, capsys):
    """Each GPU has one run at a time, the next run takes the first that is free.

    A run that fails doesn't stop the others.
    """
    lock, busy, started = threading.Lock(), set(), []

    def execute(run, args, gpu):
        with lock:
            assert gpu not in busy
            busy.add(gpu)
            started.append((run.seed, run.arm.label, gpu))
        time.sleep(0.6 if gpu == "3" else 0.05)
        if run.seed != 2:
            run.folder.mkdir(parents=True)
            (run.folder / "metrics.jsonl").write_text("")
            value = run.seed + 0.1 * (run.arm.twin is None)
            result = {"val_bpb": value, "train_seconds": 1.0, "steps": 1}
            (run.folder / "result.json").write_text(json.dumps(result))
        with lock:
            busy.remove(gpu)

    monkeypatch.setattr(ablate, "execute", execute)
    rows = run("--arms", "JEPA_LAMBDA=0.1", "--seeds", "4", "--gpus", "3,5")
    assert [(seed, label) for seed, label, _ in started] == [
        (seed, f"jepa_lambda={weight}") for seed in range(1, 5) for weight in ("0", "0.1")
    ]
    gpus = [gpu for *_, gpu in started]
    assert gpus[:2] == ["3", "5"] and gpus.count("5") > 5  # the quick one makes the most
    printed = capsys.readouterr().out
    assert "8 of 8 runs, 0:00:00 left" in printed and printed.count("FAILED, see") == 2
    assert [row["failed"] for row in rows] == [1, 1] and "val_bpb 4.1" in printed


def test_an_edited_model_is_evaluated_by_its_own_source(run, project, tmp_path):
    """And a metric that no result has stops the grid after the first seed, with all runs kept."""
    edited, test = tmp_path / "model.py", tmp_path / "test.jsonl"
    edited.write_text("RIGHT = 0.75\n")
    test.write_text("")
    flags = ["--arms", f"model.py:{edited}", "--evaluate", str(test)]
    message = "--metric x: no such number in .*; there are .*startswith.*; the 2 finished runs are"
    with pytest.raises(ValueError, match=message):
        run(*flags, "--metric", "x", "--seeds", "2")
    done = {f: f.stat().st_mtime_ns for f in (project / "logs").glob("g-*/result.json")}
    rows = run(*flags, "--seeds", "1")
    assert [row["mean"] for row in rows] == [0.25, 0.75] and 2 <= len(done) < 4
    assert all(file.stat().st_mtime_ns == then for file, then in done.items())


def make_run(tmp_path):
    """A run with an evaluation, whose folder is there and empty."""
    folder = tmp_path / "run"
    folder.mkdir()
    evaluation, log = folder / "evaluation-1.json", tmp_path / "log"
    return ablate.Run(Arm(()), 1, folder, ["python", GPT], log, evaluation)


def test_an_evaluation_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    run, args = make_run(tmp_path), Namespace(evaluate="x.jsonl", script=GPT, task=None)
    (run.folder / "result.json").write_text("{}")
    done = Namespace(returncode=0, stdout=b'so\n{"startswith": 1}\n')
    monkeypatch.setattr(ablate.subprocess, "run", lambda *_, **__: done)
    with monkeypatch.context() as stopped:
        stopped.setattr("os.fsync", lambda _: 1 / 0)  # before it is on the disk
        with pytest.raises(ZeroDivisionError):
            ablate.execute(run, args, "")
    assert [file.name for file in run.folder.iterdir()] == ["result.json"]
    ablate.execute(run, args, "")
    assert run.result() == {"startswith": 1}


def test_the_settings_of_a_fine_tuning_run_stand_in_its_config_yaml(tmp_path):
    run = make_run(tmp_path)._replace(evaluation=None)
    (run.folder / "result.json").write_text('{"eval_loss": 1.0}')
    (run.folder / "config.yaml").write_text("model: {name: x}\ntraining: {batch_size: 4}\n")
    assert run.result()["config"] == {"name": "x", "batch_size": 4}


# ---- other commands


def test_the_best_arms_of_a_grid(tmp_path, capsys):
    """One arm for each combination of the other settings, by the metric's better direction."""
    other = "jepa_layer=2"
    means = {"jepa_lambda=0": 3.0, "jepa_lambda=4": 4.0}
    means |= {f"jepa_lambda=1 {other}": 2.0, f"jepa_lambda=2 {other}": 1.0}
    rows = []
    for label, mean in means.items():
        pairs = [setting.split("=") for setting in label.split()]
        rows.append({"arm": label, "settings": pairs, "files": [], "mean": mean, "failed": 0})

    def best(metric):
        table = {"metric": metric, "arms": rows}
        (tmp_path / "result.json").write_text(json.dumps({"tables": [table]}))
        ablate.main(["best", str(tmp_path), "--over", "JEPA_LAMBDA"])
        return capsys.readouterr().out.splitlines()

    lowest = best("val_bpb")
    assert lowest == ["jepa_lambda=0", f"jepa_lambda=2 {other}"]
    assert labels([], GPT, lowest)[-2:] == lowest  # what --arm reads
    assert best("startswith") == ["jepa_lambda=4", f"jepa_lambda=1 {other}"]
    rows[2]["failed"] = 1
    with pytest.raises(SystemExit, match="error: not all runs of jepa_lambda=1 .* have a val_bpb"):
        best("val_bpb")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--arms JEPA_LAMBDA=0.1 --seeds 0", "--seeds 0: must be at least 1"),
        ("--arms JEPA_LAMBDA=0.1 --first_seed -1 --num_layers x", "'x' is not a valid int"),
        ("--arms JEPA_LAMBDA=0.1 --config no.yaml", "no.yaml: .*No such file"),
        ("--arms JEPA_LAMBDA=0.1 --evaluate no.jsonl", "no.jsonl: No such file"),
        ("--arms JEPA_LAYER=9", "JEPA_LAYER=9: must be -1"),
        ("--arms JEPA_LAMBDA=0.1 --num_layer 3", "unknown argument --num_layer"),
        ("--arms lbbd=0.1 --script finetune.py", "did you mean lbd"),
        ("--seeds 3", "no arms: give --arms"),
        ("--arm JEPA_LAMBDA=0.1 --seed 3", "--seed: every run gets its own"),
        ("--arm lbd=0.1 --script finetune.py --output_dir=x", "--output_dir: every run gets its"),
        ("--arm JEPA_LAMBDA=x", "'x' is not a valid float"),
        ("best . --over x", "result.json: No such file"),
    ],
)
def test_misuse_is_one_line(project, flags, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as error:
        ablate.main(flags.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, value", [("eval_file", "e.jsonl"), ("data_file", "d.jsonl")])
def test_a_grid_whose_runs_have_no_eval_loss_is_refused(name, value):
    ablate.check_metric("eval_loss", {"eval_file": "", "data_file": "", name: value}, "lbd=0.1")
    ablate.check_metric("startswith", {"eval_file": "", "data_file": ""}, "lbd=0.1")
    with pytest.raises(ValueError, match="lbd=0.1 has no eval_loss: set eval_file or data_file"):
        ablate.check_metric("eval_loss", {"eval_file": "", "data_file": ""}, "lbd=0.1")


# ---- the real trainers


@pytest.fixture
def name(tmp_path):
    """The name of a grid, whose folders are removed afterwards."""
    name = f"test-{tmp_path.name}"
    yield name
    shutil.rmtree(ROOT / "ablations" / name, ignore_errors=True)
    for folder in (ROOT / "logs").glob(f"{name}-*"):
        shutil.rmtree(folder)


@pytest.mark.slow
def test_an_arm_s_file_is_what_its_runs_import(name, data_path, tmp_path):
    """A distance of 3 - cos has a term larger by 2, the same gradients, and so the same model."""
    file, edited = "nanojepa/objectives/distance.py", tmp_path / "mine.py"
    source = (ROOT / file).read_text()
    edited.write_text(source.replace("return 1 - (unit", "return 3 - (unit"))
    assert edited.read_text() != source
    tiny = {**TINY, "iterations": 4, "num_layers": 1, "data_path": data_path}
    flags = [f"--{key}={value}" for key, value in tiny.items()]
    arms = ["--arms", f"{file}:{ROOT / file},{edited}", "--arms", "jepa_lambda=0.5"]
    twin, plain, changed = ablate.run_grid(["--name", name, *arms, "--seeds", "1", *flags])
    assert plain["mean"] == changed["mean"] != twin["mean"] and changed["time_ratio"] > 0
    runs = json.loads((ROOT / "ablations" / name / "result.json").read_text())["runs"]
    folders = {run["arm"]: ROOT / "logs" / run["run"] for run in runs}
    sources = json.loads((folders[changed["arm"]] / "environment.json").read_text())[0]["sources"]
    assert sources[file] == hashlib.sha256(edited.read_bytes()).hexdigest()
    terms = [ablate.read_log(folders[row["arm"]])[0]["jepa_loss"] for row in (plain, changed)]
    assert terms[1] == pytest.approx(terms[0] + 2, rel=1e-5)


@pytest.mark.slow
def test_a_grid_of_fine_tuning_runs(name, tmp_path, monkeypatch, capsys):
    """Trained to answer B alone, a model has as many of the choices right as there are Bs.

    All paths are seen from another folder.
    """
    import hf

    monkeypatch.chdir(tmp_path)
    hf.make_folder(tmp_path / "model", "llama")

    def write_test(answers):
        records = [(None, f"What is {n} + 3?", answers[n % 4]) for n in range(8)]
        hf.write_messages(tmp_path / "test.jsonl", records)

    write_test("ABCD")
    hf.write_messages("train.jsonl", [(None, f"What is {n} + 2?", "B") for n in range(8)])
    Path("c.yaml").write_text(
        "model: {name: model}\ndataset: {train_file: train.jsonl}\n"
        "training: {dtype: float32, num_epochs: 5, learning_rate: 0.01, batch_size: 2, "
        "grad_accum: 2, save_steps: 1000}\n"
    )
    flags = ["--script", HF, "--name", name, "--config", "c.yaml", "--seeds", "1"]
    flags += ["--evaluate", "test.jsonl", "--task", "choice"]
    twin, arm = ablate.run_grid([*flags, "--arms", "lbd=0.5", "--arms", "predictors=1"])
    result = json.loads((ROOT / "ablations" / name / "result.json").read_text())
    assert result["tables"][0]["metric"] == "accuracy" and twin["mean"] == arm["mean"] == 0.25
    assert arm["time_ratio"] > 0 and arm["flops"] > twin["flops"] > 0 and arm["refused"] is None
    folder = ROOT / "logs" / result["runs"][1]["run"]
    assert (folder / "model.safetensors").is_file()
    assert "jepa_loss" in json.loads((folder / "result.json").read_text())
    then = (folder / "result.json").stat().st_mtime_ns
    write_test("ABBB")
    capsys.readouterr()
    arm = "lbd=0.5 predictors=1"
    rows = ablate.run_grid([*flags, "--arm", "predictors=1 lbd=0.5", "--baseline", arm])
    assert [row["mean"] for row in rows] == [0.75]  # another test of the same run
    assert (folder / "result.json").stat().st_mtime_ns == then
    assert "1 of 1 runs" in capsys.readouterr().out
    assert json.loads((ROOT / "ablations" / name / "result.json").read_text())["baseline"] == arm
