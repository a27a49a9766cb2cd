"""Runs that survive: stopped and killed they go on bit for bit; full disks; bad numbers."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

import train_gpt
from conftest import (
    ROOT,
    TINY,
    MemoryLog,
    make_run,
    make_text,
    metrics_of,
    result_of,
    run_cli,
    texts,
    train_run,
)
from nanojepa.checkpoint import Checkpoints, checkpoints_in, newest_checkpoint, run_tensors
from nanojepa.files import write_sealed
from nanojepa.records import prepare_pairs
from nanojepa.settings import load_settings
from nanojepa.shards import prepare

PAIR = {"train_seq_len": 64, "jepa_lambda": 0.1, "jepa_objective": "pair"}
SETTINGS = {  # the data, and what differs in a run of eight steps
    "plain": ("text", {}),
    "late": ("text", {"jepa_lambda": 0.1, "jepa_start_frac": 0.5, "grad_accum_steps": 2}),
    "ratio": ("text", {"jepa_lambda": 0.1, "jepa_ratio": 0.5, "optimizer": "adamw"}),
    "diagnosed": ("text", {"jepa_lambda": 0.3, "jepa_end_frac": 0.75, "diag_every": 2}),
    "validated": ("text", {"val_loss_every": 3}),
    "pairs": ("pairs", {**PAIR, "jepa_predictor": "linear", "jepa_start_frac": 0.5}),
    "groups": ("groups", {**PAIR, "jepa_distance": "infonce", "grad_accum_steps": 2}),
    "spans of pairs": ("pairs", {**PAIR, "jepa_objective": "span", "loss_on": "target"}),
    "steps": ("steps", {**PAIR, "jepa_objective": "step", "jepa_pred_position": "front"}),
}


def terminate():
    signal.raise_signal(signal.SIGTERM)


def train_until(run, folder, after, evaluating=False):
    """Train until SIGTERM comes in the step `after`, or in the evaluation that follows it."""
    log, load, step = MemoryLog(), run.data.load, 0

    def load_step(number, *rest):
        nonlocal step
        step = number + 1
        if step == after and not evaluating:
            terminate()
        return load(number, *rest)

    def terminated(function):
        if function is train_gpt.row_losses and step == after:
            terminate()
        return function

    run.data.load = load_step
    if evaluating:
        run.compile = terminated
    with Checkpoints(folder, 0, 0.0, 0, log) as checkpoints, pytest.raises(SystemExit) as e:
        train_run(run, log, checkpoints)
    assert e.value.code == 143
    return log


def state_of(run):
    """All that a step changes, copied."""
    tensors = run_tensors(run.modules(), run.optimizers)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def data(data_path, folders, tmp_path_factory):
    """{kind: data folder}."""
    rng, examples = np.random.default_rng(0), []
    for n in range(1, 40):
        word, first, second = ("".join("abcdef"[i] for i in rng.integers(0, 6, 5)) for _ in "abc")
        examples.append((n, "pairs", None, [word, f"{first}\n\n{second}\n\nend"]))
    steps = tmp_path_factory.mktemp("steps") / "steps"
    prepare_pairs(steps, examples, examples[:9], source="test_resume.py", vocab_size=258)
    return {"text": data_path, "steps": str(steps), **folders}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(data, tmp_path, name):
    """Weights, optimizers and all that is logged, but the time, are those of the whole run."""
    kind, settings = SETTINGS[name]
    whole = make_run(data[kind], **settings)
    log = train_run(whole)
    assert "jepa_lambda" not in settings or log.curve("jepa_loss")
    for stop in (1, 4, 7):
        folder = tmp_path / str(stop)
        folder.mkdir()
        first = train_until(make_run(data[kind], **settings), folder, stop)
        manifest, tensors = newest_checkpoint(folder, [])
        assert manifest["step"] == stop
        rest = make_run(data[kind], **settings)
        second = train_run(rest, resumed=(manifest, tensors))
        assert not changed(state_of(whole), state_of(rest))
        assert first.rows + second.rows == log.rows and first.costs + second.costs == log.costs


@pytest.mark.parametrize("stop", [4, 8])
def test_a_signal_ends_an_evaluation_which_is_made_again(data_path, tmp_path, stop):
    """In the middle and at the end, with a diagnosis at the same step; a row is logged once."""
    settings = dict(jepa_lambda=0.1, val_loss_every=4, diag_every=4)
    whole = make_run(data_path, **settings)
    log = train_run(whole)
    first = train_until(make_run(data_path, **settings), tmp_path, stop, evaluating=True)
    manifest, tensors = newest_checkpoint(tmp_path, [])
    assert manifest["step"] == stop
    rest = make_run(data_path, **settings)
    second = train_run(rest, resumed=(manifest, tensors))
    assert not changed(state_of(whole), state_of(rest)) and first.rows + second.rows == log.rows


@pytest.mark.slow
def test_a_compiled_run_goes_on_bit_for_bit(data_path, tmp_path):
    def compiled_run():
        settings = dict(jepa_lambda=0.1, jepa_start_frac=0.5, num_layers=1)
        run = make_run(data_path, **settings)
        run.compile = train_gpt.compiled
        return run

    whole = compiled_run()
    log = train_run(whole)
    first = train_until(compiled_run(), tmp_path, 3)
    rest = compiled_run()
    second = train_run(rest, resumed=newest_checkpoint(tmp_path, []))
    assert not changed(state_of(whole), state_of(rest)) and first.rows + second.rows == log.rows


def test_a_checkpoint_holds_all_that_a_step_changes(data_path, tmp_path):
    """With a buffer of an optimizer set to 0 a run ends elsewhere, so the tests above can fail."""
    train_until(make_run(data_path), tmp_path, 4)
    manifest, tensors = newest_checkpoint(tmp_path, [])
    ends = {}
    for buffer in ("none", "momentum", "exp_avg", "exp_avg_sq", "step"):
        held = {k: 0 * w if k.endswith(f".{buffer}") else w for k, w in tensors.items()}
        run = make_run(data_path)
        train_run(run, resumed=(manifest, held))
        ends[buffer] = {k: w for k, w in state_of(run).items() if k.startswith("model.")}
    assert all(changed(ends["none"], ends[buffer]) for buffer in list(ends)[1:])


# ---- the script itself, in this process


class Killed(BaseException):
    pass


@pytest.fixture
def command(data_path, tmp_path, monkeypatch):
    """train_gpt.py with logs/ in tmp_path and code.py as its source, called with its flags.

    at: {step: what happens before it}. Returns the result, or the exit status, or Killed.
    """
    code = tmp_path / "code.py"
    code.write_text("print(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    monkeypatch.setattr(train_gpt, "project_sources", lambda root: {"code.py": code})
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    original = train_gpt.training_step

    def run(*flags, at=None):
        def step(run, number, *rest):
            if run is not None and run.began and number in (at or {}):
                at[number]()
            return original(run, number, *rest)

        monkeypatch.setattr(train_gpt, "training_step", step)
        try:
            return train_gpt.train_gpt(*given(data_path, *flags))
        except SystemExit as e:
            return e.code
        except Killed:
            return Killed

    return run


def given(data_path, *flags):
    """The settings of a command line."""
    settings = {**TINY, "data_path": data_path}
    argv = [f"--{key}={value}" for key, value in settings.items()]
    return load_settings(train_gpt.Config, [*argv, *flags], {})


def interrupt():
    signal.raise_signal(signal.SIGINT)


def kill():
    raise Killed


def differences(a, b, root=ROOT):
    """What two runs differ in of weights, metrics and result, but for times and names."""
    timed = ("train_seconds", "total_seconds", "peak_memory_bytes", "run_id", "config")
    seen = []
    for name in (a, b):
        folder = root / "logs" / name
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        rows = [{k: v for k, v in row.items() if k != "train_time"} for row in rows]
        result = json.loads((folder / "result.json").read_text())
        weights = (folder / "model.safetensors").read_bytes()
        kept = {key: value for key, value in result.items() if key not in timed}
        seen.append({**kept, "number of rows": len(rows), "weights": weights})
        seen[-1] |= {f"row {n}": row for n, row in enumerate(rows)}
    return [key for key, value in seen[0].items() if value != seen[1].get(key)]


@pytest.mark.parametrize("what", [terminate, interrupt, kill])
def test_a_run_stopped_or_killed_twice_is_the_run_that_was_not(command, tmp_path, capsys, what):
    flags = ["--jepa_lambda=0.1", "--val_loss_every=3", "--checkpoint_every=2"]
    assert command(*flags, "--run_id=whole")["steps"] == 8
    flags += ["--run_id=run", "--resume=auto"]
    expected = {terminate: 143, interrupt: 130, kill: Killed}[what]
    assert command(*flags, at={3: what}) == expected
    assert command(*flags, at={7: what}) == expected
    assert command(*flags)["steps"] == 8
    assert not differences("whole", "run", tmp_path)
    said = capsys.readouterr().out
    stopped = "stopped by .* at step 4; go on with RESUME=logs/run\n"
    assert bool(re.search(stopped, said)) == (what is not kill)
    starts = json.loads((tmp_path / "logs/run/environment.json").read_text())
    assert [start["step"] for start in starts] == ([0, 2, 6] if what is kill else [0, 4, 8])
    # Once more, it only says its result.
    assert command(*flags) == 0
    assert capsys.readouterr().out == said.splitlines()[-1] + "\n"


def test_resume_continues_what_it_should_and_refuses_the_rest(command, data_path, tmp_path):
    """No run, a run without a checkpoint, a finished one; other settings, which are refused."""
    flags = ["--run_id=run", "--jepa_lambda=0.1"]

    def found(*more):
        loaded = given(data_path, "--jepa_lambda=0.1", *more)
        return train_gpt.find_run(loaded.config, loaded.origin, tmp_path / "logs", [], 0)

    with pytest.raises(ValueError, match="RESUME=logs/run: no such run"):
        found("--resume=logs/run")
    with pytest.raises(ValueError, match="RESUME=auto: needs RUN_ID"):
        found("--resume=auto")
    assert found("--resume=auto", "--run_id=run").manifest is None  # it is begun
    assert command(*flags, at={3: kill}) == Killed
    assert not (tmp_path / "logs/run/checkpoint").exists()
    for more, message in (
        (["--seed=5"], r"SEED=5 \(flag --seed\): the run began with 1337"),
        (["--iterations=40"], "ITERATIONS=40"),
        (["--run_id=other"], "RUN_ID=other: RESUME=logs/run goes on as run; leave RUN_ID out"),
    ):
        with pytest.raises(ValueError, match=message):
            found("--resume=logs/run", *more)
    more = ["--grad_accum_steps=2", "--checkpoint_every=7"]
    cfg, origin, manifest, tensors = found("--resume=logs/run", *more)
    assert (cfg.grad_accum_steps, cfg.checkpoint_every) == (2, 7)
    assert (cfg.run_id, cfg.jepa_lambda, manifest, tensors) == ("run", 0.1, {}, None)
    assert (
        origin["seed"] == "run/config.yaml"
        and origin["grad_accum_steps"] == "flag --grad_accum_steps"
    )
    assert command("--resume=logs/run")["steps"] == 8
    rows = [json.loads(line) for line in (tmp_path / "logs/run/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [*range(1, 9), 8]
    with pytest.raises(ValueError, match="SEED=5"):  # not even of a finished run
        found("--resume=logs/run", "--seed=5")
    with pytest.raises(ValueError, match="exists and is never overwritten"):
        command(*flags)


def test_settings_that_are_gone_are_refused_and_new_ones_have_their_default(command, tmp_path):
    assert command("--run_id=run", at={3: terminate}) == 143
    file = tmp_path / "logs/run/checkpoint/step_00000004/manifest.json"
    manifest, _ = newest_checkpoint(tmp_path / "logs/run", [])
    manifest["config"]["jepa_update"] = "decoupled"
    write_sealed(file, manifest)
    with pytest.raises(ValueError, match="settings that this code doesn't know: jepa_update"):
        command("--resume=logs/run")
    del manifest["config"]["jepa_update"], manifest["config"]["eval_stride"]
    write_sealed(file, manifest)
    with pytest.raises(ValueError, match="EVAL_STRIDE=8 .*: the run began with 0"):
        command("--resume=logs/run", "--eval_stride=8")
    assert command("--resume=logs/run")["steps"] == 8


def test_ranks_that_find_different_checkpoints_are_refused(data_path, tmp_path, monkeypatch):
    monkeypatch.setattr("nanojepa.checkpoint.all_ranks_max", lambda *values: [-2.0, 4.0])
    loaded = given(data_path, "--resume=auto", "--run_id=run")
    with pytest.raises(ValueError, match="the ranks find different checkpoints"):
        train_gpt.find_run(loaded.config, loaded.origin, tmp_path / "logs", [], 0)


def test_resume_says_that_the_source_changed_and_refuses_other_data(command, tmp_path, capsys):
    make_text(tmp_path / "data")
    flags = ["--run_id=run", "--resume=auto", f"--data_path={tmp_path / 'data'}"]
    assert command(*flags, at={3: terminate}) == 143
    (tmp_path / "code.py").write_text("print(2)\n")
    capsys.readouterr()
    assert command(*flags, at={5: terminate}) == 143
    assert "warning: code.py is not what it was before step 4: " in capsys.readouterr().out
    assert "code.py, changed\nprint(2)\n" in (tmp_path / "logs/run/log.txt").read_text()
    shutil.move(tmp_path / "data", tmp_path / "moved")  # it may lie elsewhere
    flags[-1] = f"--data_path={tmp_path / 'moved'}"
    assert command(*flags, at={6: terminate}) == 143
    shutil.rmtree(tmp_path / "moved")
    origin = dict(source="conftest.py", licence="MIT")
    sizes = dict(val_fraction=0.2, vocab_size=300)
    prepare(tmp_path / "moved", "tiny", lambda: iter(texts()), **origin, **sizes)
    with pytest.raises(ValueError, match="not the data that run began with"):
        command(*flags)


def test_foreign_data_is_the_same_data_too(command, data_path, tmp_path):
    """Shards without meta.json: others at another place, or one more beside them."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for file in os.scandir(data_path):
            if file.name.endswith(".bin"):
                shutil.copy(file, tmp_path / name)
    tokenizer = [f"--tokenizer={data_path}/tokenizer.tiktoken", "--doc_token=299"]
    flags = ["--run_id=run", "--resume=auto", *tokenizer]
    here, there = f"--data_path={tmp_path / 'a'}", f"--data_path={tmp_path / 'b'}"
    assert command(*flags, here, at={3: terminate}) == 143
    with pytest.raises(ValueError, match="not the data that"):
        command(*flags, there)
    shard = next((tmp_path / "a").glob("*_train_*.bin"))
    shutil.copy(shard, tmp_path / "a" / "tiny_train_000007.bin")
    with pytest.raises(ValueError, match="not the data that"):
        command(*flags, here)


def test_a_damaged_checkpoint_of_a_run_is_said_and_costs_the_steps_since_the_one_before(
    command, tmp_path, capsys
):
    flags = ["--run_id=run", "--resume=auto", "--checkpoint_every=2"]
    assert command(*flags, at={5: terminate}) == 143
    older, newest = checkpoints_in(tmp_path / "logs/run/checkpoint")
    assert (older.name, newest.name) == ("step_00000004", "step_00000006")
    (newest / "manifest.json").write_text("{}")
    assert command("--run_id=whole")["steps"] == 8
    assert command(*flags)["steps"] == 8
    said = capsys.readouterr().out
    assert "warning: damaged checkpoint: " in said and "resumed at step 4" in said
    assert not differences("whole", "run", tmp_path)


# ---- bad numbers


def poison(monkeypatch, at, what):
    """Let the loss, or a gradient, of one step be no number."""
    steps, name = itertools.count(), "training_loss" if what == "loss" else "update_weights"
    original = getattr(train_gpt, name)

    def spoilt_loss(*arguments):
        losses = original(*arguments)
        return losses._replace(loss=losses.loss * float("nan")) if next(steps) == at else losses

    def spoilt_gradients(run, scale):
        if next(steps) == at:
            next(run.model.blocks.parameters()).grad.view(-1)[1] = float("inf")
        return original(run, scale)

    spoilt = spoilt_loss if what == "loss" else spoilt_gradients
    monkeypatch.setattr(train_gpt, name, spoilt)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw"}, {"jepa_lambda": 0.1}])
@pytest.mark.parametrize("at", [4, 7])
def test_bad_numbers_end_the_run_and_are_never_saved(
    data_path, monkeypatch, tmp_path, settings, what, at
):
    """A checkpoint is due after the bad step; the newest one is of the step before it."""
    poison(monkeypatch, at, what)
    run, log = make_run(data_path, iterations=8, **settings), MemoryLog()
    with (
        Checkpoints(tmp_path, 1, 0.0, 0, log) as checkpoints,
        pytest.raises(ValueError, match=f"non-finite loss or gradient at step {at + 1} "),
    ):
        train_run(run, log, checkpoints)
    manifest, tensors = newest_checkpoint(tmp_path, [])
    assert manifest["step"] == at
    assert all(tensor.isfinite().all() for tensor in tensors.values())


# ---- real processes

ITERATIONS = 60
RUN = (
    f"--iterations={ITERATIONS}",
    "--jepa_lambda=0.1",
    "--checkpoint_every=3",
    "--val_loss_every=20",
    "--val_tokens=500",
)


def start(data_path, *flags, ranks=0, script="train_gpt.py"):
    """A script as a process of its own, which isn't waited for."""
    settings = {**TINY, "data_path": data_path, "compile": 0}
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(script), *(f"--{k}={v}" for k, v in settings.items()), *flags]
    clean = {k: v for k, v in os.environ.items() if k.lower() not in settings}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**clean, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process, pattern):
    """The output up to a line that fits, which must come."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(pattern, line):
            return lines
    raise AssertionError("".join(lines))


def children_of(process):
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def kill_and_resume(data_path, run_id, kills, *flags, ranks=0):
    """Kill a run some random moment after it has begun, again and again; then let it finish.

    With ranks, one of them is killed.
    """
    rng, flags = random.Random(kills), (*flags, f"--run_id={run_id}", "--resume=auto")
    for _ in range(kills):
        process = start(data_path, *flags, ranks=ranks)
        first = int(re.match(r"step:(\d+)/", read_until(process, r"step:\d+/")[-1])[1])
        read_until(process, rf"step:{first + rng.randint(1, ITERATIONS // (kills + 1))}/")
        time.sleep(rng.random() * 0.05)
        if ranks:
            os.kill(rng.choice(children_of(process)), signal.SIGKILL)
        else:
            process.kill()
        process.stdout.read()
        assert process.wait(timeout=60) == (1 if ranks else -signal.SIGKILL)
    done = start(data_path, *flags, ranks=ranks)
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0 and output.splitlines()[-1].startswith("result: "), output[-3000:]
    log = (ROOT / "logs" / run_id / "log.txt").read_text()
    # The first may have been killed before it had a checkpoint.
    assert len(re.findall(r"^resumed at step [1-9]", log, re.M)) >= kills - 1


def stop_and_resume(data_path, run_id, number, *flags, ranks=0):
    """Send a run a signal, which makes its only checkpoint, and let it go on to its end."""
    flags = [*flags, "--checkpoint_every=0", f"--run_id={run_id}"]
    process = start(data_path, *flags, ranks=ranks)
    read_until(process, r"step:5/")
    process.send_signal(number)
    output = process.stdout.read()
    assert process.wait(timeout=60) == (1 if ranks else 128 + number), output
    name = signal.Signals(number).name
    said = rf"stopped by {name} at step (\d+); go on with RESUME=logs/{run_id}\n"
    step = re.search(said, output)[1]
    done = run_cli(data_path, "--resume=auto", *flags, ranks=ranks)
    assert done.returncode == 0 and f"resumed at step {step}\n" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def whole(data_path):
    """The name of a run that nobody stops."""
    name = f"test-{os.getpid()}-whole"
    done = run_cli(data_path, *RUN, f"--run_id={name}")
    assert done.returncode == 0, done.stderr
    yield name
    shutil.rmtree(ROOT / "logs" / name)


@pytest.mark.slow
def test_a_run_killed_three_times_is_the_run_that_was_not(data_path, run_id, whole):
    kill_and_resume(data_path, run_id, 3, *RUN)
    assert not differences(whole, run_id)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, flags",
    [
        (0, ["--checkpoint_every=1", "--val_loss_every=1", "--val_tokens=3000"]),
        (2, ["--checkpoint_every=1"]),
        (2, ["--compile=1", "--jepa_start_frac=0.5", "--grad_accum_steps=2"]),
    ],
)
def test_a_run_killed_five_times_is_the_run_that_was_not(data_path, run_id, ranks, flags):
    """While it saves, while it evaluates, one rank of two, compiled."""
    done = run_cli(data_path, *RUN, *flags, f"--run_id={run_id}-whole", ranks=ranks)
    assert done.returncode == 0, done.stderr
    kill_and_resume(data_path, f"{run_id}-killed", 5, *RUN, *flags, ranks=ranks)
    assert not differences(f"{run_id}-whole", f"{run_id}-killed")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_from_there(data_path, run_id, whole, number):
    stop_and_resume(data_path, run_id, number, *RUN)
    assert not differences(whole, run_id)


@pytest.mark.slow
def test_a_signal_stops_two_ranks_at_one_step(data_path, run_id):
    done = run_cli(data_path, *RUN, f"--run_id={run_id}-whole", ranks=2)
    assert done.returncode == 0, done.stderr
    stop_and_resume(data_path, run_id, signal.SIGTERM, *RUN, ranks=2)
    assert not differences(f"{run_id}-whole", run_id)


@pytest.mark.slow
def test_a_signal_after_the_last_validation_lets_the_run_finish(data_path, run_id):
    process = start(data_path, f"--run_id={run_id}")
    read_until(process, rf"step:{TINY['iterations']}/.* val_loss:")
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert output.splitlines()[-1].startswith("result: ") and process.returncode == 0


@pytest.mark.slow
def test_two_ranks_go_on_with_what_one_began_and_one_with_what_two_have_done(data_path, run_id):
    flags = ["--jepa_lambda=0.1", "--iterations=30", "--train_batch_tokens=192"]
    whole = run_cli(data_path, f"--run_id={run_id}-whole", *flags)
    assert whole.returncode == 0, whole.stderr
    flags += [f"--run_id={run_id}", "--resume=auto", "--checkpoint_every=5"]
    process = start(data_path, *flags)
    read_until(process, "step:8/")
    process.kill()
    process.wait()
    done = run_cli(data_path, *flags, ranks=4)
    assert done.returncode != 0 and "GRAD_ACCUM_STEPS x TRAIN_SEQ_LEN = 4 x 1 x 32" in done.stderr
    process = start(data_path, *flags, ranks=2)  # 3 rows each: the same global batch
    read_until(process, "resumed at step 5")
    read_until(process, "step:12/")
    process.send_signal(signal.SIGTERM)
    step = re.search(r"stopped by SIGTERM at step (\d+)", process.communicate()[0])[1]
    done = run_cli(data_path, *flags)
    assert done.returncode == 0 and f"resumed at step {step}\n" in done.stdout, done.stderr
    losses, expected = (
        [row["train_loss"] for row in metrics_of(name) if "train_loss" in row]
        for name in (run_id, f"{run_id}-whole")
    )
    # Sums in another order differ by 8e-5; two steps' losses differ by 8e-3 and more.
    assert losses == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_a_run_that_is_still_trained_is_not_begun_again(data_path, run_id):
    """torchrun alone is killed, and its workers live on."""
    flags = [f"--run_id={run_id}", "--resume=auto", "--iterations=100000", "--checkpoint_every=50"]
    flags += ["--train_log_every=50"]
    process = start(data_path, *flags, ranks=2)
    read_until(process, r"step:50/")
    workers = children_of(process)
    process.kill()
    try:
        done = run_cli(data_path, *flags)
        message = f"error: RUN_ID={run_id}: another process is training this run; end it first"
        assert done.returncode == 1 and done.stderr == f"{message}\n"
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
    process.stdout.read()  # they have ended
    second = start(data_path, *flags)
    assert any(line.startswith("resumed at step ") for line in read_until(second, r"step:\d+/"))
    second.kill()
    second.wait()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_with_a_message(data_path, run_id):
    flags = ["--iterations=100000", "--train_log_every=50", f"--run_id={run_id}"]
    process = start(data_path, *flags, ranks=2)
    read_until(process, r"step:50/")
    began = time.perf_counter()
    os.kill(children_of(process)[1], signal.SIGKILL)
    output = process.stdout.read()
    assert process.wait(timeout=60) != 0 and time.perf_counter() - began < 60
    # Torchrun says which one it was and what ended it. It ends the other.
    assert "Signal 9 (SIGKILL) received" in output.split("Root Cause")[1], output


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step_where_one_has_bad_numbers(data_path, run_id, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(
        textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        import train_gpt

        update_weights, training_step = train_gpt.update_weights, train_gpt.training_step
        settle = train_gpt.Trainer.settle

        def spoilt_step(run, step, *rest):
            def spoilt(run, scale):
                if step == 4 and run.began and run.share.rank == 1:
                    next(run.model.blocks.parameters()).grad.view(-1)[0] = float("nan")
                return update_weights(run, scale)
            train_gpt.update_weights = spoilt
            return training_step(run, step, *rest)

        def told(self):
            try:
                return settle(self)
            except ValueError as e:
                os.write(1, f"rank {{os.environ['RANK']}} {{e}}\\n".encode())  # in one piece
                raise

        train_gpt.training_step, train_gpt.Trainer.settle = spoilt_step, told
        train_gpt.main()
        """)
    )
    process = start(data_path, f"--run_id={run_id}", ranks=2, script=driver)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    stopped = re.findall(r"rank (\d) non-finite loss or gradient at step (\d+) ", output)
    assert sorted(stopped) == [("0", "5"), ("1", "5")], output


# ---- disks that are full


@pytest.fixture
def small_disk(data_path, tmp_path):
    """A function that trains with logs/ on a file system of some size, and tells what is left.

    before: a shell command that is begun first. Returns the process and the run's folder.
    """
    unshare = ["unshare", "-Urm", "sh", "-c"]
    if subprocess.run([*unshare, "mount -t tmpfs none /mnt"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    root = tmp_path / "copy"
    (root / "logs").mkdir(parents=True)
    for name in ("train_gpt.py", "model.py"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "nanojepa", root / "nanojepa")

    def run(size, *flags, before="true"):
        settings = {**TINY, "data_path": data_path, "run_id": "small"}
        command = [sys.executable, "train_gpt.py", *(f"--{k}={v}" for k, v in settings.items())]
        script = f'mount -t tmpfs -o size={size} none logs && {{ {before} & }}; "$@"; code=$?'
        script += "; cp -r logs saved; exit $code"
        done = subprocess.run(
            [*unshare, script, "sh", *command, *flags],
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done, root / "saved" / "small"

    return run


WHEN_IT_TRAINS = "while [ ! -s logs/small/metrics.jsonl ]; do sleep 0.1; done"


@pytest.mark.slow
def test_a_full_disk_costs_checkpoints_and_not_the_run(small_disk):
    """There is room for the log and one checkpoint, but not for a second one beside it."""
    flags = ["--iterations=30", "--checkpoint_every=10", "--model_dim=64"]
    done, folder = small_disk("1900k", *flags)
    told = done.stdout + done.stderr
    assert "warning: no checkpoint could be written (step " in done.stdout, told
    assert "No space left on device" in done.stdout
    (left,) = checkpoints_in(folder / "checkpoint")
    assert newest_checkpoint(folder, [])[0]["step"] == int(left.name.removeprefix("step_"))
    assert done.stdout.splitlines()[-1].startswith("result: val_loss:")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and "RESUME=logs/small" in line
    assert "No space left on device" in line


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_no_line_of_the_log(small_disk):
    fill = "head -c 100m /dev/zero > logs/filler; sleep 3; rm logs/filler"
    done, folder = small_disk(
        "4m", "--iterations=600", before=f"({WHEN_IT_TRAINS}; {fill}) 2> /dev/null"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stdout.count("log.txt: No space left on device; the run goes on") == 1
    assert "log.txt is written again, no line is lost" in done.stdout
    assert "metrics.jsonl is written again" in done.stdout
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [*range(1, 601), 600]
    lines = re.findall(r"^step:(\d+)/600 train_loss", (folder / "log.txt").read_text(), re.M)
    assert [int(n) for n in lines] == list(range(1, 601))


@pytest.mark.slow
def test_a_read_only_disk_costs_checkpoints_and_not_the_run(small_disk):
    lock = "mount --bind logs logs; mount -o remount,bind,ro logs"  # as log.txt is open
    flags = ["--iterations=200", "--checkpoint_every=50"]
    done, _ = small_disk("8m", *flags, before=f"({WHEN_IT_TRAINS}; {lock})")
    told = done.stdout[-2000:] + done.stderr
    assert "Read-only file system" in done.stdout, told
    assert done.stdout.splitlines()[-1].startswith("result: "), told
    assert done.returncode == 1 and "RESUME=logs/small" in done.stderr


@pytest.mark.slow
def test_a_run_whose_console_takes_nothing_ends_well(data_path, run_id):
    """Its console is a file on a full disk. Python's own last flush fails, and says so."""
    settings = {**TINY, "data_path": data_path, "run_id": run_id}
    command = [sys.executable, "train_gpt.py", *(f"--{k}={v}" for k, v in settings.items())]
    with open("/dev/full", "w") as console:
        done = subprocess.run(command, cwd=ROOT, stdout=console, stderr=subprocess.PIPE)
    assert result_of(run_id)["steps"] == TINY["iterations"], done.stderr
    log = (ROOT / "logs" / run_id / "log.txt").read_text()
    assert log.splitlines()[-1].startswith("result: ")
