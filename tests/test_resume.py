"""Runs that survive: resume bit for bit, signals, kills, damaged checkpoints, full disks, bad numbers."""
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint
import train_gpt
from checkpoint import Checkpoints, newest_checkpoint
from conftest import ROOT, TINY, MemoryLog, make_config, result_of, run_cli, train_in_process
from test_run import one_line_error
from weights import from_safetensors

SETTINGS = [  # of the data, and of a run of eight steps
    ("text", {}), ("text", {"jepa_lambda": 0.1, "jepa_start_frac": 0.5, "grad_accum_steps": 2}), ("text", {"jepa_lambda": 0.1, "jepa_ratio": 0.5, "optimizer": "adamw"}),
    ("text", {"jepa_lambda": 0.3, "jepa_update": "decoupled", "jepa_start_frac": 0.25, "jepa_end_frac": 0.75, "diag_every": 2}),
    ("text", {"skip_sigma": 3.0, "nan_policy": "skip", "val_loss_every": 3, "train_log_every": 3}),
    ("pairs", {"jepa_lambda": 0.1, "jepa_objective": "pair", "jepa_predictor": "linear", "jepa_start_frac": 0.5}),
    ("groups", {"jepa_lambda": 0.1, "jepa_objective": "pair", "jepa_distance": "infonce", "grad_accum_steps": 2}),
    ("pairs", {"jepa_lambda": 0.1, "loss_on": "target"})]


class Stopping(Checkpoints):
    """Receives SIGTERM when it is asked after this many steps."""

    def __init__(self, folder, after, every=0):
        super().__init__(folder, every, 0.0, 0, MemoryLog())
        self.after = after

    def due(self, step, done):
        return super().due(step, done)

    @property
    def signal(self):
        self.after -= 1
        return signal.SIGTERM if self.after < 0 else 0

    @signal.setter
    def signal(self, number):
        pass


def weights_of(model):
    return {name: w.clone() for name, w in model.state_dict().items()}


@pytest.mark.parametrize("kind, settings", SETTINGS)
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(data_path, folders, tmp_path, kind, settings):
    """Weights and everything that is logged, but the time, are those of the run that nobody stopped."""
    cfg = make_config({"text": data_path, **folders}[kind], **({"train_seq_len": 64} if kind != "text" else {}), **settings)
    whole, log = train_in_process(cfg)
    for stop in (1, 3, 4, 7):
        run, first = tmp_path / str(stop), MemoryLog()
        run.mkdir()
        with pytest.raises(SystemExit) as e:
            train_in_process(cfg, log=first, checkpoints=Stopping(run, stop))
        assert e.value.code == 143
        manifest, tensors = newest_checkpoint(run, [])
        assert manifest["step"] == stop
        resumed, second = train_in_process(cfg, resumed=(manifest, tensors))
        assert all(torch.equal(w, resumed.state_dict()[name]) for name, w in weights_of(whole).items())
        assert first.rows + second.rows == log.rows and first.costs + second.costs == log.costs


def test_a_checkpoint_holds_all_that_a_step_changes(data_path, tmp_path):
    """A step more, with an optimizer's buffer left out of the checkpoint, gives other weights: the test above can fail."""
    cfg = make_config(data_path)
    with pytest.raises(SystemExit):
        train_in_process(cfg, checkpoints=Stopping(tmp_path, 4))
    manifest, tensors = newest_checkpoint(tmp_path, [])
    whole, _ = train_in_process(cfg, resumed=(manifest, tensors))
    for name in ("momentum", "exp_avg", "exp_avg_sq"):
        left, _ = train_in_process(cfg, resumed=(manifest, {key: w for key, w in tensors.items() if not key.endswith(f".{name}")}))
        assert not all(torch.equal(w, left.state_dict()[key]) for key, w in weights_of(whole).items()), name


def test_checkpoints_are_written_while_the_run_goes_on_and_two_are_kept(data_path, tmp_path):
    log = MemoryLog()
    with Checkpoints(tmp_path, 3, 0.0, 0, log) as checkpoints:
        train_in_process(make_config(data_path), checkpoints=checkpoints)
    assert [path.name for path in checkpoint.found(tmp_path / "checkpoint")] == ["step_00000006", "step_00000008"] and not log.lines
    with Checkpoints(tmp_path / "none", 0, 1e-9, 1, log) as checkpoints:  # no rank but the first writes
        train_in_process(make_config(data_path), checkpoints=checkpoints)
    assert not (tmp_path / "none").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(data_path, tmp_path):
    with Checkpoints(tmp_path, 4, 0.0, 0, MemoryLog()) as checkpoints:
        train_in_process(make_config(data_path), checkpoints=checkpoints)
    older, newest = checkpoint.found(tmp_path / "checkpoint")
    file = newest / "tensors.safetensors"
    blob = file.read_bytes()
    for damaged in (blob[:-1], blob[:-9] + bytes([blob[-9] ^ 1]) + blob[-8:], b""):
        file.write_bytes(damaged)
        warnings = []
        manifest, _ = newest_checkpoint(tmp_path, warnings)
        assert manifest["step"] == 4 and len(warnings) == 1 and str(file) in warnings[0]
    file.unlink()
    (older / "manifest.json").write_text((older / "manifest.json").read_text().replace('"step": 4', '"step": 5'))
    with pytest.raises(ValueError, match="no checkpoint of this run is whole"):
        newest_checkpoint(tmp_path, [])


# ---- the real process

ITERATIONS = 60
RUN = (f"--iterations={ITERATIONS}", "--jepa_lambda=0.1", "--checkpoint_every=3", "--val_loss_every=20", "--val_tokens=500")


def start(data_path, *flags, ranks=0, root=ROOT, env=None):
    """train_gpt.py as a process of its own, not waited for."""
    clean = {k: v for k, v in os.environ.items() if k.lower() not in train_gpt.Config.__dataclass_fields__}
    settings = {**TINY, "data_path": data_path, "compile": 0}
    command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []),
               str(root / "train_gpt.py"), *(f"--{k}={v}" for k, v in settings.items()), *flags]
    return subprocess.Popen(command, cwd=root, env={**clean, "OMP_NUM_THREADS": "1", **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_until(process, pattern):
    """The output up to a line that fits, which must come."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(pattern, line):
            return lines
    raise AssertionError("".join(lines))


def weights(run_id):
    return (ROOT / "logs" / run_id / "model.safetensors").read_bytes()


def metrics(run_id):
    rows = [json.loads(line) for line in (ROOT / "logs" / run_id / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "train_time"} for row in rows]


def same_run(a, b):
    """Weights, metrics and result but for times and names."""
    timed = ("train_seconds", "total_seconds", "peak_memory_bytes", "run_id", "config")
    return weights(a) == weights(b) and metrics(a) == metrics(b) and all(result_of(b)[k] == v for k, v in result_of(a).items() if k not in timed)


def kill_and_resume(data_path, run_id, kills, seed, *flags, ranks=0, one_rank=False):
    """Start the run, kill it at random moments of its training, start it again each time; then let it finish."""
    rng, flags = random.Random(seed), (*flags, f"--run_id={run_id}", "--resume=auto")
    for _ in range(kills):
        process = start(data_path, *flags, ranks=ranks)
        read_until(process, r"step:\d+/|result:")
        time.sleep(rng.random() * 0.6)
        if one_rank:
            workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(rng.choice(workers)), signal.SIGKILL) if workers else None
        else:
            process.kill()
        process.stdout.read()
        process.wait(timeout=60)
    done = start(data_path, *flags, ranks=ranks)
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0 and output.splitlines()[-1].startswith("result: "), output[-3000:]
    return output


def test_a_run_killed_three_times_is_the_run_that_was_not(data_path, run_id):
    assert run_cli(data_path, *RUN, f"--run_id={run_id}-whole", env={"OMP_NUM_THREADS": "1"}).returncode == 0
    kill_and_resume(data_path, f"{run_id}-killed", 3, 0, *RUN)
    assert same_run(f"{run_id}-whole", f"{run_id}-killed")


@pytest.mark.nightly
@pytest.mark.parametrize("ranks, flags", [(0, ["--checkpoint_every=1"]), (0, ["--val_loss_every=1", "--val_tokens=3000"]), (0, ["--compile=1", "--grad_accum_steps=2"]),
                                          (2, ["--checkpoint_every=1"]), (2, ["--compile=1", "--jepa_start_frac=0.5"])])
def test_a_run_killed_five_times_is_the_run_that_was_not(data_path, run_id, ranks, flags):
    """25 kills in all: while it saves, while it evaluates, compiled, one rank of two."""
    done = run_cli(data_path, *RUN, *flags, f"--run_id={run_id}-whole", ranks=ranks, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    kill_and_resume(data_path, f"{run_id}-killed", 5, 1, *RUN, *flags, ranks=ranks, one_rank=bool(ranks))
    assert same_run(f"{run_id}-whole", f"{run_id}-killed")


@pytest.mark.parametrize("ranks, number, flags", [(0, signal.SIGTERM, ["--compile=1"]), (0, signal.SIGINT, []), (2, signal.SIGTERM, ["--jepa_update=decoupled"])])
def test_a_signal_saves_and_the_run_goes_on_from_there(data_path, run_id, ranks, number, flags):
    flags = [*RUN, "--checkpoint_every=0", *flags]
    done = run_cli(data_path, *flags, f"--run_id={run_id}-whole", ranks=ranks, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    process = start(data_path, *flags, f"--run_id={run_id}-stopped", ranks=ranks)
    read_until(process, r"step:5/")
    process.send_signal(number)
    output = process.stdout.read()
    assert process.wait(timeout=60) == (128 + number if not ranks else 1), output
    name = signal.Signals(number).name
    step = int(re.search(rf"stopped by {name} at step (\d+); go on with RESUME=logs/{run_id}-stopped\n", output)[1])
    done = run_cli("data/never-read", "--resume=auto", f"--run_id={run_id}-stopped", *flags, f"--data_path={data_path}", ranks=ranks, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {step}" in (ROOT / "logs" / f"{run_id}-stopped" / "log.txt").read_text()
    assert same_run(f"{run_id}-whole", f"{run_id}-stopped")
