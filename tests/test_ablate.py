"""ablate.py: its statistics against slow references, its grids on real runs of a tiny GPT."""
import json
import shutil
import statistics
from argparse import Namespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import ablate
from ablate import Arm
from conftest import ROOT, TINY

GPT, HF = "train_gpt.py", "finetune.py"


def test_arms_are_a_grid_with_its_twins_first(tmp_path):
    edited = tmp_path / "mine.py"
    edited.write_text("")
    arms = ablate.parse_arms(["JEPA_LAMBDA=0.005,0.1"], GPT)
    assert [a.label for a in arms] == ["jepa_lambda=0", "jepa_lambda=0.005", "jepa_lambda=0.1"]
    assert ablate.parse_arms(["JEPA_LAMBDA=0.0,0.1"], GPT) == ablate.parse_arms(["JEPA_LAMBDA=0.1"], GPT)  # the twin once, however it is written
    grid = ablate.parse_arms(["jepa_lambda=0,0.1", "JEPA_LAYER=-1,2", "num_layers=3,4"], GPT)
    assert [a.label for a in grid if a == a.twin(GPT)] == ["jepa_lambda=0 num_layers=3", "jepa_lambda=0 num_layers=4"] and len(grid) == 6
    assert all(a.twin(GPT) in grid for a in grid)
    arm = ablate.parse_arms([f"jepa.py:{edited}"], GPT)[1]
    assert arm.files == (("jepa.py", str(edited)),) and arm.twin(GPT) == Arm((("jepa_lambda", "0"),))
    assert [a.label for a in ablate.parse_arms(["lbd=0.1,1", "step_jepa=true"], HF)] == ["lbd=0", "lbd=0.1 step_jepa=true", "lbd=1 step_jepa=true"]
    for text, message in [("JEPA_LAMBDA", "must be NAME=value"), ("JEPA_LAMBDA=", "must be NAME=value"), ("nothing.py:x.py", "nothing.py is no file"), ("jepa.py:x.py", "x.py is no file")]:
        with pytest.raises(ValueError, match=message):
            ablate.parse_arms([text], GPT)


def test_budgets():
    assert ablate.budget_flags("steps=200", GPT) == ["--train_flops=0", "--max_wallclock_seconds=0", "--iterations=200"]
    assert ablate.budget_flags("seconds", GPT) == ["--train_flops=0"] and ablate.budget_flags("flops", HF) == ["--same_flop=true"]
    for text, script in (("epochs=2", GPT), ("seconds=3", HF)):
        with pytest.raises(ValueError, match="must be steps, flops or seconds"):
            ablate.budget_flags(text, script)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=12).filter(lambda x: len({round(b - a, 6) for a, b in x}) > 2))
@settings(deadline=None)
def test_paired_comparison_is_the_textbook_s(pairs):
    twin, arm = zip(*pairs)
    found, d, n = ablate.compare(twin, arm), np.subtract(arm, twin), len(pairs)
    error = d.std(ddof=1) / n**0.5
    assert found["difference"] == pytest.approx(d.mean(), abs=1e-12)
    assert (found["low"], found["high"]) == pytest.approx([d.mean() + s * stats.t.ppf(0.975, n - 1) * error for s in (-1, 1)], rel=1e-6, abs=1e-9)
    assert found["p"] == pytest.approx(2 * stats.t.sf(abs(d.mean() / error), n - 1), rel=1e-6, abs=1e-12)


def test_comparison_of_few_or_equal_seeds():
    assert ablate.compare([1.0], [2.0]) == {"n": 1, "difference": 1.0, "low": None, "high": None, "p": None, "wilcoxon": None}
    assert ablate.compare([1.0, 2.0], [1.0, 2.0])["p"] == 1.0 and ablate.compare([1.0, 2.0], [2.0, 3.0])["p"] is None and ablate.compare([], [])["difference"] is None
    assert min(ablate.compare([0.0] * 7, [1.0 + 0.1 * i for i in range(7)])["wilcoxon"] for _ in (0,)) > 0.01  # as the docstring says of 7 seeds
    assert ablate.compare([0.0] * 8, [1.0 + 0.1 * i for i in range(8)])["wilcoxon"] < 0.01


@given(st.lists(st.none() | st.floats(0, 1), max_size=7))
def test_holm_against_its_definition(p_values):
    """Corrected p = the smallest level at which the step-down procedure rejects, found by trying."""
    found, known = ablate.holm(p_values), [p for p in p_values if p is not None]
    for p, corrected in zip(p_values, found):
        if p is None:
            assert corrected is None
            continue
        smaller = sorted(known)
        steps = [(len(known) - i) * q for i, q in enumerate(smaller) if q <= p]
        assert corrected == pytest.approx(min(1.0, max(steps)))


def test_detectable_difference_is_found_that_often():
    rng, n, spread = np.random.default_rng(0), 6, 0.3
    d = ablate.detectable(spread, n)
    trials = rng.normal(d, spread, (20000, n))
    assert np.mean(stats.ttest_1samp(trials, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)  # four standard errors of 20,000 trials
    assert ablate.detectable(2 * spread, n) == pytest.approx(2 * d) and ablate.detectable(spread, 3) > d


@pytest.fixture
def grid(data_path, tmp_path):
    """(run a grid of tiny GPTs called `name`, its folder); what it leaves in logs/ and ablations/ goes."""
    name = f"test-{tmp_path.name}"
    settings = {**TINY, "iterations": 4, "num_layers": 1, "data_path": data_path}
    def run(*flags):
        return ablate.run_grid(["--name", name, "--budget", "steps", *flags, *(f"--{k}={v}" for k, v in settings.items())])
    yield run, ROOT / "ablations" / name
    shutil.rmtree(ROOT / "ablations" / name, ignore_errors=True)
    for folder in (ROOT / "logs").glob(f"{name}-*"):
        shutil.rmtree(folder)


def test_a_grid_of_real_runs(grid, tmp_path, capsys):
    """An edited file, and one that fails; stopped and continued."""
    run, out = grid
    broken_file = tmp_path / "broken.py"
    broken_file.write_text("raise RuntimeError('broken')")
    edited = tmp_path / "edited.py"
    edited.write_text((ROOT / "jepa.py").read_text().replace("d = 1 - (unit", "d = 3 - (unit"))
    rows = run("--arms", f"jepa.py:{ROOT / 'jepa.py'},{broken_file},{edited}", "--arms", "jepa_lambda=0.5", "--arms", "jepa_layer=0", "--seeds", "1")
    printed = capsys.readouterr().out
    assert "no claim is possible" in printed and printed.count("FAILED, see") == 1 and printed.strip().splitlines()[-1].startswith("result: ")
    twin, plain, broken, changed = rows
    assert twin["twin"] is None and broken["failed"] == 1 and broken["mean"] is None and plain["mean"] == changed["mean"]  # a constant more in the loss: the same gradients
    assert twin["mean"] != plain["mean"] and plain["paired"]["difference"] == plain["mean"] - twin["mean"]
    result = json.loads((out / "result.json").read_text())
    folders = {(r["arm"], r["finished"]): ROOT / "logs" / r["run"] for r in result["runs"]}
    log = (folders[changed["arm"], True] / "log.txt").read_text()
    assert "d = 3 - (unit" in log  # the edited source
    loss = lambda row: json.loads((folders[row["arm"], True] / "metrics.jsonl").read_text().splitlines()[0])["jepa_loss"]
    assert loss(changed) == pytest.approx(loss(plain) + 2, rel=1e-5)
    before = {f: (f / "result.json").stat().st_mtime_ns for f in (ROOT / "logs").glob(f"{out.name}-*") if (f / "result.json").exists()}
    (folders[plain["arm"], True] / "result.json").unlink()  # as if stopped there
    rows = run("--arms", f"jepa.py:{ROOT / 'jepa.py'},{broken_file},{edited}", "--arms", "jepa_lambda=0.5", "--arms", "jepa_layer=0", "--seeds", "1")
    assert rows[1]["mean"] == plain["mean"]
    after = {f: (f / "result.json").stat().st_mtime_ns for f in before}
    assert [f for f in before if before[f] != after[f]] == [folders[plain["arm"], True]]
    assert (out / "ablation.png").stat().st_size > 10_000 and "| twin" not in (out / "table.md").read_text()
    picture = tmp_path / "curves.png"
    ablate.main(["plot", str(folders[plain["arm"], True]), str(folders[changed["arm"], True]), "--out", str(picture)])
    assert picture.stat().st_size > 10_000


def test_a_run_is_another_one_where_anything_that_makes_it_is(tmp_path, monkeypatch):
    """Settings, budget, the config's text, the project's own source; the evaluation by its file and task."""
    monkeypatch.setattr(ablate, "check_settings", lambda flags, script: None)
    config, test = tmp_path / "c.yaml", tmp_path / "test.jsonl"
    config.write_text("seed: 1\n")
    test.write_text("x")
    def names(budget="steps=3", flags=(), task=None):
        args = Namespace(arms=["jepa_lambda=0.1"], script=GPT, config=str(config), budget=budget, seeds=1, first_seed=1, name="n", evaluate=str(test), task=task)
        return [(run.folder.name, run.evaluation.name) for run in ablate.plan(args, list(flags), tmp_path)[1]]
    first = names()
    assert first == names() and len(set(first)) == 2
    runs = lambda found: {run for run, _ in found}
    assert not runs(first) & runs(names(budget="steps=4")) and not runs(first) & runs(names(flags=["--num_layers=3"]))
    assert runs(names(task="exact")) == runs(first) and names(task="exact") != first
    config.write_text("seed: 1\nnum_layers: 2\n")
    assert not runs(first) & runs(names())
    config.write_text("seed: 1\n")
    copy = tmp_path / "project"
    copy.mkdir()
    for file in ablate.CODE[GPT]:
        shutil.copy(ROOT / file, copy)
    monkeypatch.setattr(ablate, "ROOT", copy)
    assert runs(names()) == runs(first)
    (copy / "model.py").write_text("# edited\n")
    assert not runs(first) & runs(names())


def test_table_and_summary_of_known_values(tmp_path, monkeypatch):
    """Twelve runs whose results are made up: what the table says is what a calculation by hand gives."""
    arms = ablate.parse_arms(["jepa_lambda=0.1,0.2"], GPT)
    made = {arms[0]: [1.0, 1.2, 1.1, 0.9], arms[1]: [1.1, 1.25, 1.22, 0.98], arms[2]: [0.5, 0.7, 0.62, 0.41]}
    runs = []
    for arm, values in made.items():
        for seed, value in enumerate(values):
            folder = tmp_path / f"{arms.index(arm)}-{seed}"
            folder.mkdir()
            (folder / "result.json").write_text(json.dumps({"val_bpb": value, "train_seconds": 2.0 + arms.index(arm), "steps": 10, "train_flops": 1e9}))
            runs.append(ablate.Run(arm, seed, folder, [], tmp_path / "x.log"))
    rows, line = ablate.summarise(arms, runs, GPT, "val_bpb")
    assert line.startswith("val_bpb of the twin, jepa_lambda=0: mean 1.05, standard deviation 0.13 over 4 seeds; the smallest difference") and "no claim" not in line
    assert rows[2]["paired"]["difference"] == pytest.approx(statistics.fmean(made[arms[2]]) - 1.05) and rows[1]["time_ratio"] == pytest.approx(1.5)
    p = [row["paired"]["p"] for row in rows[1:]]
    assert [row["paired"]["holm"] for row in rows[1:]] == [max(p[0], 2 * p[1]), 2 * p[1]]  # the second is the smaller one
    table = ablate.markdown(rows, "val_bpb").splitlines()
    assert len(table) == 5 and table[2].startswith("| jepa_lambda=0 (twin) | 4 | 1.05 | 0.13 |  |") and "-0.49250" in table[4]
    with pytest.raises(ValueError, match="--metric val_loss: no such number in result.json; there are .*val_bpb"):
        ablate.summarise(arms, runs, GPT, "val_loss")


def test_misuse_is_one_line(tmp_path):
    for flags, message in [(["--arms", "JEPA_LAMBDA=0.1", "--seeds", "0"], "--seeds 0"), (["--arms", "JEPA_LAMBDA=0.1", "--config", "no.yaml"], "no.yaml: no such file"),
                           (["--arms", "JEPA_LAYER=9"], "JEPA_LAYER=9: must be -1"), (["--arms", "JEPA_LAMDA=0.1"], "unknown argument --jepa_lamda=0.1; did you mean jepa_lambda"),
                           (["--arms", "JEPA_LAMBDA=0.1", "--num_layer", "3"], "unknown argument --num_layer"), (["--arms", "lbbd=0.1", "--script", "finetune.py"], "did you mean lbd"),
                           (["plot", str(tmp_path)], "no metrics.jsonl in it")]:
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            ablate.main(flags)
