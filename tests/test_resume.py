"""Runs that survive: resume bit for bit, signals, kills, damaged checkpoints, full disks, bad numbers."""
import json
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import checkpoint
import loader
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
    """Has received SIGTERM after this many steps; evaluating: while it evaluates then, not before."""

    def __init__(self, folder, after, evaluating=False):
        super().__init__(folder, 0, 0.0, 0, MemoryLog())
        self.after, self.evaluating, self.step, self.asked = after, evaluating, None, 0

    def due(self, step, done):
        if step != self.step:
            self.step, self.asked = step, 0
        return super().due(step, done)

    @property
    def signal(self):
        self.asked += 1
        return signal.SIGTERM if self.step >= self.after and self.asked > 2 * self.evaluating else 0

    @signal.setter
    def signal(self, number):
        pass


def same_weights(a, b):
    return all(torch.equal(w, b.state_dict()[name]) for name, w in a.state_dict().items())


@pytest.mark.parametrize("kind, changes", SETTINGS)
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(data_path, folders, tmp_path, kind, changes):
    """Weights and everything that is logged, but the time, are those of the run that nobody stopped."""
    cfg = make_config({"text": data_path, **folders}[kind], **({"train_seq_len": 64} if kind != "text" else {}), **changes)
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
        assert same_weights(whole, resumed)
        assert first.rows + second.rows == log.rows and first.costs + second.costs == log.costs


@pytest.mark.parametrize("stop", [4, 8])
def test_a_signal_ends_an_evaluation_which_is_made_again(data_path, tmp_path, stop):
    """Of the middle and of the end, with a diagnosis at the same step; every row is logged once."""
    cfg = make_config(data_path, jepa_lambda=0.1, val_loss_every=4, diag_every=4)
    whole, log = train_in_process(cfg)
    with pytest.raises(SystemExit):
        train_in_process(cfg, log=(first := MemoryLog()), checkpoints=Stopping(tmp_path, stop, evaluating=True))
    manifest, tensors = newest_checkpoint(tmp_path, [])
    resumed, second = train_in_process(cfg, resumed=(manifest, tensors))
    assert manifest["step"] == stop and same_weights(whole, resumed) and first.rows + second.rows == log.rows


def test_a_compiled_run_goes_on_bit_for_bit(data_path, tmp_path):
    cfg = make_config(data_path, jepa_lambda=0.1, jepa_start_frac=0.5, num_layers=1)
    compiled = torch.compile(train_gpt.training_loss, fullgraph=True, dynamic=False)
    whole, log = train_in_process(cfg, compiled)
    with pytest.raises(SystemExit):
        train_in_process(cfg, compiled, log=(first := MemoryLog()), checkpoints=Stopping(tmp_path, 3))
    resumed, second = train_in_process(cfg, compiled, resumed=newest_checkpoint(tmp_path, []))
    assert same_weights(whole, resumed) and first.rows + second.rows == log.rows


def test_a_checkpoint_holds_all_that_a_step_changes(data_path, tmp_path):
    """With a buffer of an optimizer set to zero the run goes on to other weights: the test above can fail."""
    cfg = make_config(data_path)
    with pytest.raises(SystemExit):
        train_in_process(cfg, checkpoints=Stopping(tmp_path, 4))
    manifest, tensors = newest_checkpoint(tmp_path, [])
    whole, _ = train_in_process(cfg, resumed=(manifest, tensors))
    for name in ("momentum", "exp_avg", "exp_avg_sq", "step"):
        left, _ = train_in_process(cfg, resumed=(manifest, {key: 0 * w if key.endswith(f".{name}") else w for key, w in tensors.items()}))
        assert not same_weights(whole, left), name


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
    train_in_process(make_config(data_path, iterations=12), resumed=newest_checkpoint(tmp_path, []),
                     checkpoints=(again := Checkpoints(tmp_path, 7, 0.0, 0, log := MemoryLog())))
    again.wait()
    assert [path.name for path in checkpoint.found(tmp_path / "checkpoint")] == ["step_00000007", "step_00000012"] and not log.lines
    for path, name in zip(checkpoint.found(tmp_path / "checkpoint"), (older, newest)):
        path.rename(name)
    file.unlink()
    (older / "manifest.json").write_text((older / "manifest.json").read_text().replace('"step": 7', '"step": 5'))
    with pytest.raises(ValueError, match="no checkpoint of this run is whole"):
        newest_checkpoint(tmp_path, [])


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_mutation_of_a_checkpoint_is_silent(saved, tmp_path_factory, data):
    """A byte changed, cut, added or zeroed anywhere in it; both files."""
    folder = tmp_path_factory.mktemp("mutated") / saved.name
    shutil.copytree(saved, folder)
    file = folder / data.draw(st.sampled_from(["manifest.json", "tensors.safetensors"]))
    blob = file.read_bytes()
    at, kind = data.draw(st.integers(0, len(blob) - 1)), data.draw(st.sampled_from(["flip", "cut", "add", "zero"]))
    changed = {"flip": blob[:at] + bytes([blob[at] ^ data.draw(st.integers(1, 255))]) + blob[at + 1:], "cut": blob[:at],
               "add": blob[:at] + data.draw(st.binary(min_size=1, max_size=9)) + blob[at:], "zero": blob[:at] + bytes(16) + blob[at + 16:]}[kind]
    assume(changed != blob)
    file.write_bytes(changed)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        checkpoint.read_checkpoint(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def saved(data_path, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    with Checkpoints(run, 8, 0.0, 0, MemoryLog()) as checkpoints:
        train_in_process(make_config(data_path), checkpoints=checkpoints)
    return checkpoint.found(run / "checkpoint")[-1]


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
    """Start the run, kill it some random steps and moments later, start it again, and so on; then let it finish."""
    rng, flags = random.Random(seed), (*flags, f"--run_id={run_id}", "--resume=auto")
    for _ in range(kills):
        process = start(data_path, *flags, ranks=ranks)
        first = int(re.match(r"step:(\d+)/", read_until(process, r"step:\d+/")[-1])[1])
        read_until(process, rf"step:{first + rng.randint(1, ITERATIONS // (kills + 1))}/")
        time.sleep(rng.random() * 0.05)
        if one_rank:
            workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
            os.kill(int(rng.choice(workers)), signal.SIGKILL)
        else:
            process.kill()
        process.stdout.read()
        assert process.wait(timeout=60) == (1 if one_rank else -signal.SIGKILL)
    done = start(data_path, *flags, ranks=ranks)
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0 and output.splitlines()[-1].startswith("result: "), output[-3000:]
    assert len(re.findall(r"^resumed at step [1-9]", (ROOT / "logs" / run_id / "log.txt").read_text(), re.M)) >= kills - 1  # the first may come before a checkpoint


@pytest.fixture(scope="module")
def whole(data_path):
    """The name of a run that nobody stops."""
    name = f"test-{os.getpid()}-whole"
    done = run_cli(data_path, *RUN, f"--run_id={name}", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    yield name
    shutil.rmtree(ROOT / "logs" / name)


def test_a_run_killed_three_times_is_the_run_that_was_not(data_path, run_id, whole):
    kill_and_resume(data_path, run_id, 3, 0, *RUN)
    assert same_run(whole, run_id)


@pytest.mark.nightly
@pytest.mark.parametrize("ranks, flags", [(0, ["--checkpoint_every=1"]), (0, ["--val_loss_every=1", "--val_tokens=3000"]), (0, ["--compile=1", "--grad_accum_steps=2"]),
                                          (2, ["--checkpoint_every=1"]), (2, ["--compile=1", "--jepa_start_frac=0.5"])])
def test_a_run_killed_five_times_is_the_run_that_was_not(data_path, run_id, ranks, flags):
    """25 kills in all: while it saves, while it evaluates, compiled, one rank of two."""
    done = run_cli(data_path, *RUN, *flags, f"--run_id={run_id}-whole", ranks=ranks, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    kill_and_resume(data_path, f"{run_id}-killed", 5, 1, *RUN, *flags, ranks=ranks, one_rank=bool(ranks))
    assert same_run(f"{run_id}-whole", f"{run_id}-killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_from_there(data_path, run_id, whole, number):
    stop_and_resume(data_path, run_id, number, *RUN)
    assert same_run(whole, run_id)


def test_a_signal_behind_the_last_validation_lets_the_run_finish(data_path, run_id):
    process = start(data_path, f"--run_id={run_id}")
    read_until(process, rf"step:{TINY['iterations']}/.* val_loss:")
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0].splitlines()[-1].startswith("result: ") and process.returncode == 0


def test_a_signal_stops_two_ranks_at_one_step(data_path, run_id):
    flags = [*RUN, "--jepa_update=decoupled"]
    done = run_cli(data_path, *flags, f"--run_id={run_id}-whole", ranks=2)
    assert done.returncode == 0, done.stderr
    stop_and_resume(data_path, run_id, signal.SIGTERM, *flags, ranks=2)
    assert same_run(f"{run_id}-whole", run_id)


def stop_and_resume(data_path, run_id, number, *flags, ranks=0):
    """Send a run a signal, which makes its only checkpoint, and let it go on to its end."""
    flags = [*flags, "--checkpoint_every=0", f"--run_id={run_id}"]
    process = start(data_path, *flags, ranks=ranks)
    read_until(process, r"step:5/")
    process.send_signal(number)
    output = process.stdout.read()
    assert process.wait(timeout=60) == (128 + number if not ranks else 1), output
    step = int(re.search(rf"stopped by {signal.Signals(number).name} at step (\d+); go on with RESUME=logs/{run_id}\n", output)[1])
    done = run_cli("data/never-read", "--resume=auto", *flags, f"--data_path={data_path}", ranks=ranks, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and f"resumed at step {step}\n" in done.stdout, done.stderr


def test_resume_continues_what_it_should_and_refuses_the_rest(data_path, run_id):
    """Settings and rank counts that would make another run; no run at all; a run without a checkpoint; a finished one."""
    flags = [f"--run_id={run_id}", "--jepa_lambda=0.1", "--iterations=30", "--train_batch_tokens=192"]

    def found(*more):
        """What find_run makes of the command, as a user would give it."""
        given = [*(f"--{key}={value}" for key, value in {**TINY, "data_path": data_path, "compile": 0}.items()), *flags[1:], *more]
        return train_gpt.find_run(*train_gpt.load_config(train_gpt.Config, given, {}), 0)

    with pytest.raises(ValueError, match="no such run"):
        found(f"--resume=logs/{run_id}")
    with pytest.raises(ValueError, match="needs RUN_ID"):
        found("--resume=auto")
    process = start(data_path, *flags, "--resume=auto")
    read_until(process, r"step:3/")
    process.kill()
    process.wait()
    folder = ROOT / "logs" / run_id
    assert not (folder / "checkpoint").exists()
    for more, message in (["--seed=5"], r"SEED=5 \(flag --seed\): the run began with 1337"), (["--iterations=40"], "ITERATIONS=40"), (["--run_id=other"], "leave RUN_ID out"):
        with pytest.raises(ValueError, match=message):
            found(f"--resume=logs/{run_id}", *more)
    cfg, origin, manifest, tensors = found(f"--resume=logs/{run_id}", "--grad_accum_steps=2", "--checkpoint_every=7", "--nan_policy=skip")
    assert (cfg.grad_accum_steps, cfg.checkpoint_every, cfg.nan_policy, cfg.jepa_lambda, manifest, tensors) == (2, 7, "skip", 0.1, {}, None) and origin["seed"] == f"{run_id}/config.yaml"
    done = run_cli(data_path, *flags, "--resume=auto", ranks=4)
    assert done.returncode != 0 and "TRAIN_BATCH_TOKENS=192 must be a multiple of ranks x GRAD_ACCUM_STEPS x TRAIN_SEQ_LEN = 4 x 1 x 32" in done.stderr
    process = start(data_path, *flags[1:], f"--resume=logs/{run_id}", ranks=2)  # 3 rows each: the same global batch
    assert "resumed at step 0\n" in read_until(process, "step:7/")
    process.send_signal(signal.SIGTERM)
    step = int(re.search(r"stopped by SIGTERM at step (\d+)", process.communicate()[0])[1])
    done = run_cli(data_path, *flags, "--resume=auto")  # and one process goes on with what two have done
    assert done.returncode == 0 and f"resumed at step {step}\n" in done.stdout, done.stderr
    whole = run_cli(data_path, f"--run_id={run_id}-whole", *flags[1:])
    losses, expected = ([row["train_loss"] for row in metrics(name) if "train_loss" in row] for name in (run_id, f"{run_id}-whole"))
    assert whole.returncode == 0 and losses == pytest.approx(expected, abs=1e-3)  # 8e-5 by sums in another order; two steps' losses differ by 8e-3 and more
    again = run_cli(data_path, *flags, "--resume=auto")
    assert again.returncode == 0 and again.stdout == done.stdout.splitlines()[-1] + "\n"
    assert [row["step"] for row in metrics(run_id)] == [*range(1, 31), 30]
    with pytest.raises(ValueError, match="SEED=5"):  # not even of a finished run
        found(f"--resume=logs/{run_id}", "--seed=5")


def test_resume_says_that_the_source_changed_and_refuses_other_data(data_path, tmp_path, run_id):
    root = tmp_path / "copy"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns("logs", "records", "tests", ".git", "stdlib*"))
    shutil.copytree(data_path, tmp_path / "data")
    flags = ["--iterations=400", "--checkpoint_every=2", f"--run_id={run_id}", "--resume=auto"]
    process = start(str(tmp_path / "data"), *flags, root=root)
    read_until(process, r"step:4/")
    process.terminate()
    process.wait()
    text = (root / "jepa.py").read_text()
    (root / "jepa.py").write_text(text + "# edited\n")
    process = start(str(tmp_path / "data"), *flags, root=root)
    read_until(process, r"warning: jepa.py is not what it was before step \d+: from here on this is another run")
    process.kill()
    process.wait()
    assert text + "# edited" in (root / "logs" / run_id / "log.txt").read_text()
    meta = tmp_path / "data" / "meta.json"
    shutil.rmtree(tmp_path / "data")
    from conftest import texts
    from data.shards import prepare
    prepare(tmp_path / "data", "tiny", lambda: iter(texts()), source="conftest.py", licence="MIT", val_fraction=0.2, vocab_size=300)
    output = start(str(tmp_path / "data"), *flags, root=root).communicate()[0]
    assert "not the data that" in output and meta.exists()


def test_a_run_that_is_still_trained_is_not_begun_again(data_path, run_id):
    """torchrun alone is killed, and its workers live on."""
    flags = [f"--run_id={run_id}", "--resume=auto", "--iterations=100000", "--train_log_every=50", "--checkpoint_every=50"]
    process = start(data_path, *flags, ranks=2)
    read_until(process, r"step:50/")
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    process.kill()
    try:
        one_line_error(run_cli(data_path, *flags), f"RUN_ID={run_id}: another process is training this run; end it first")
    finally:
        for worker in workers:
            os.kill(int(worker), signal.SIGKILL)
    process.stdout.read()  # they have ended
    second = start(data_path, *flags)
    assert any(line.startswith("resumed at step ") for line in read_until(second, r"step:\d+/"))
    second.kill()
    second.wait()


def test_foreign_data_is_the_same_data_too(data_path, tmp_path, run_id):
    """Shards without meta.json: other ones elsewhere, or one more beside them."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for file in [path for path in os.scandir(data_path) if path.name.endswith(".bin")]:
            shutil.copy(file, tmp_path / name)
    flags = [f"--run_id={run_id}", "--resume=auto", f"--tokenizer={data_path}/tokenizer.tiktoken", "--doc_token=299"]
    process = start(str(tmp_path / "a"), *flags, "--iterations=100000")
    read_until(process, r"step:3/")
    process.terminate()
    assert process.communicate() and process.returncode == 143
    one_line_error(run_cli(str(tmp_path / "b"), *flags, "--iterations=100000"), "not the data that")
    shutil.copy(next((tmp_path / "a").glob("*_train_*.bin")), tmp_path / "a" / "tiny_train_000007.bin")
    one_line_error(run_cli(str(tmp_path / "a"), *flags, "--iterations=100000"), "not the data that")


# ---- bad numbers


def poison(monkeypatch, at, change, part=None):
    """Let change(model, losses) spoil what the backward passes of one step leave, those of a part alone where it is given; returns the losses."""
    original = train_gpt.accumulate_gradients

    def spoilt(model, loss_fn, cfg, data, share, step, jepa_lambda, *rest, **more):
        losses, flops = original(model, loss_fn, cfg, data, share, step, jepa_lambda, *rest, **more)
        return change(model, losses) if step == at and (part is None or part in rest) else losses, flops

    monkeypatch.setattr(train_gpt, "accumulate_gradients", spoilt)


def bad_gradient(model, losses):
    next(p for p in model.blocks.parameters() if min(p.shape[-2:]) > 2).grad[1, 2] = float("nan")
    return losses


def infinite_gain(model, losses):
    [p for p in model.parameters() if p.dim() < 2][0].grad.fill_(float("inf"))
    return losses


SPOILT = {"loss": lambda model, losses: losses * float("nan"), "matrix": bad_gradient, "gain": infinite_gain}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw"}, {"jepa_lambda": 0.1, "jepa_update": "decoupled"}])
def test_bad_numbers_never_reach_the_weights(data_path, monkeypatch, changes, what):
    """Weights and optimizers after the bad step are those before it, and stop names the step."""
    cfg = make_config(data_path, iterations=5, **changes)
    poison(monkeypatch, 4, SPOILT[what])
    seen = []
    original = train_gpt.training_step

    def watched(model, loss_fn, updates, *rest):
        before = {name: t.clone() for name, t in train_gpt.run_tensors(model, updates, torch.zeros(1)).items()}
        out = original(model, loss_fn, updates, *rest)
        after = train_gpt.run_tensors(model, updates, torch.zeros(1))
        seen.append({name for name, t in before.items() if not torch.equal(t, after[name])})
        return out

    monkeypatch.setattr(train_gpt, "training_step", watched)
    with pytest.raises(ValueError, match="non-finite loss or gradient at step 5 "):
        train_in_process(cfg)
    assert seen[3] and not seen[4]


@pytest.mark.parametrize("what", SPOILT)
def test_bad_numbers_of_the_term_s_own_step_stop_the_run_too(data_path, monkeypatch, what):
    poison(monkeypatch, 4, SPOILT[what], "term")
    with pytest.raises(ValueError, match="non-finite loss or gradient at step 5 "):
        train_in_process(make_config(data_path, jepa_lambda=0.1, jepa_update="decoupled"))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_optimizer_told_of_bad_numbers_on_the_device_changes_nothing(data_path, optimizer):
    """What a GPU does, where the step is taken before anybody has looked: the optimizers' own way out, from their first step on."""
    cfg = make_config(data_path, optimizer=optimizer)
    data = loader.open_data(cfg)
    share = train_gpt.divide_batch(cfg, 0, 1, torch.device("cpu"), 1)
    ends = []
    for rounds in (("bad", "good", "bad", "good"), ("good", "good")):
        model = train_gpt.build_model(cfg, data.vocab_size, share.device)
        (optimizers,) = train_gpt.build_updates(model, cfg)
        for n, kind in enumerate(rounds):
            train_gpt.accumulate_gradients(model, train_gpt.training_loss, cfg, data, share, rounds[:n].count("good"), None)
            for p in model.parameters():
                p.grad.view(-1)[0] = float("nan") if kind == "bad" else p.grad.view(-1)[0]
            for o in optimizers:
                o.found_inf = torch.tensor(float(kind == "bad"))
                o.step()
                o.zero_grad()
        ends.append(train_gpt.run_tensors(model, [optimizers], torch.zeros(1)))
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(t, ends[1][name]) for name, t in ends[0].items())


def test_a_skipped_step_is_counted_and_the_run_goes_on(data_path, monkeypatch, tmp_path):
    poison(monkeypatch, 2, bad_gradient)
    cfg = make_config(data_path, nan_policy="skip")
    _, log = train_in_process(cfg)
    assert [line for line in log.lines if line.startswith("skipped: non-finite loss or gradient at step 3 ") and line.endswith("; 1 so far")]
    assert [step for step, values in log.rows if "train_loss" in values] == [1, 2, 4, 5, 6, 7, 8]


def test_a_spike_is_skipped_and_a_level_that_lasts_is_not(data_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "SPIKE_STEPS", 16)
    original = train_gpt.accumulate_gradients

    def spiking(model, loss_fn, cfg, data, share, step, *rest, **more):
        losses, flops = original(model, loss_fn, cfg, data, share, step, *rest, **more)
        if step == 20 or step >= 40:  # by then the first one has left the window
            for p in model.parameters():
                p.grad *= 1000
        return losses, flops

    monkeypatch.setattr(train_gpt, "accumulate_gradients", spiking)
    _, log = train_in_process(make_config(data_path, iterations=60, skip_sigma=6.0))
    skipped = [int(re.search(r"a spike at step (\d+) ", line)[1]) for line in log.lines if line.startswith("skipped")]
    assert skipped[:2] == [21, 41] and len(skipped) < 6
    monkeypatch.setattr(train_gpt, "accumulate_gradients", original)
    _, log = train_in_process(make_config(data_path, iterations=60, skip_sigma=6.0))
    assert not [line for line in log.lines if line.startswith("skipped")]


def test_two_ranks_stop_at_the_same_step_where_one_has_bad_numbers(data_path, run_id, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt
original = train_gpt.accumulate_gradients
def spoilt(model, loss_fn, cfg, data, share, step, *rest, **more):
    out = original(model, loss_fn, cfg, data, share, step, *rest, **more)
    if step == 4 and share.rank == 1:
        next(model.blocks.parameters()).grad.view(-1)[0] = float("nan")
    return out
train_gpt.accumulate_gradients = spoilt
train = train_gpt.train
def said(*arguments):
    try:
        return train(*arguments)
    except ValueError as e:
        os.write(1, f"rank {{os.environ['RANK']}} {{e}}\\n".encode())  # in one piece
        raise
train_gpt.train = said
train_gpt.main()
""")
    settings = {**TINY, "data_path": data_path, "compile": 0, "run_id": run_id}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(driver), *(f"--{k}={v}" for k, v in settings.items())],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert sorted(re.findall(r"rank (\d) non-finite loss or gradient at step (\d+) ", done.stdout)) == [("0", "5"), ("1", "5")], done.stdout + done.stderr


# ---- ranks that die, disks that are full


def test_a_rank_that_dies_ends_the_others_with_a_message(data_path, run_id):
    process = start(data_path, "--iterations=100000", "--train_log_every=50", f"--run_id={run_id}", ranks=2)
    read_until(process, r"step:50/")
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    began = time.perf_counter()
    os.kill(int(workers[1]), signal.SIGKILL)
    output = process.stdout.read()
    assert process.wait(timeout=60) != 0 and time.perf_counter() - began < 60
    assert "error: lost contact with another rank" in output, output


SMALL = """mount -t tmpfs -o size={size} none logs && {prepare} ; "$@"; code=$?; {after} cp -r logs saved; exit $code"""


def on_a_small_disk(data_path, tmp_path, size, *flags, prepare="true", after=""):
    """A run whose logs/ is a file system of this size: (the finished process, what it left there). Skips where nothing may be mounted."""
    root = tmp_path / "copy"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns("logs", "records", "tests", ".git", "stdlib*"))
    (root / "logs").mkdir()
    settings = {**TINY, "data_path": data_path, "compile": 0, "run_id": "small"}
    command = [sys.executable, str(root / "train_gpt.py"), *(f"--{k}={v}" for k, v in settings.items()), *flags]
    script = SMALL.format(size=size, prepare=prepare, after=after)
    if subprocess.run(["unshare", "-Urm", "sh", "-c", "mount -t tmpfs none /mnt"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script, "sh", *command], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    return done, root / "saved" / "small"


def whole_checkpoints(folder):
    """The steps of the checkpoints that load."""
    steps = []
    for path in checkpoint.found(folder / "checkpoint"):
        manifest, tensors = checkpoint.read_checkpoint(path)
        steps.append(manifest["step"])
    return steps


def test_a_full_disk_costs_checkpoints_and_not_the_run(data_path, tmp_path):
    """Room for the log and one checkpoint, not for a second one while the first is kept; then the run's own files don't fit."""
    done, folder = on_a_small_disk(data_path, tmp_path, "1900k", "--iterations=30", "--checkpoint_every=10", "--model_dim=64")
    assert "warning: no checkpoint could be written (step " in done.stdout and "No space left on device" in done.stdout, done.stdout + done.stderr
    assert len(whole_checkpoints(folder)) == 1  # found all load: none is cut
    assert done.stdout.splitlines()[-1].startswith("result: val_loss:")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and "No space left on device" in line and "RESUME=logs/small" in line


def test_a_log_that_cannot_be_written_is_said_once_and_made_up_for(data_path, tmp_path):
    """The disk is filled to the last byte while the run goes on, and freed again: no line is missing in the end."""
    fill = "(while [ ! -s logs/small/metrics.jsonl ]; do sleep 0.1; done; head -c 100m /dev/zero > logs/filler; sleep 3; rm logs/filler) 2> /dev/null &"
    done, folder = on_a_small_disk(data_path, tmp_path, "4m", "--iterations=600", "--train_log_every=1", prepare=f"true; {fill} true")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert len(re.findall(r"warning: \S+log.txt: No space left on device; the run goes on", done.stdout)) == 1
    assert "log.txt is written again, no line is lost" in done.stdout and "metrics.jsonl is written again" in done.stdout
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [*range(1, 601), 600]
    log = (folder / "log.txt").read_text()
    assert [int(n) for n in re.findall(r"^step:(\d+)/600 train_loss", log, re.M)] == list(range(1, 601))


def test_a_read_only_disk_costs_checkpoints_and_not_the_run(data_path, tmp_path):
    lock = "(while [ ! -s logs/small/metrics.jsonl ]; do sleep 0.1; done; mount --bind logs logs; mount -o remount,bind,ro logs) &"  # as log.txt is open
    done, folder = on_a_small_disk(data_path, tmp_path, "8m", "--iterations=200", "--checkpoint_every=50", prepare=f"true; {lock} true")
    assert "Read-only file system" in done.stdout and done.stdout.splitlines()[-1].startswith("result: "), done.stdout[-2000:] + done.stderr
    assert done.returncode == 1 and "RESUME=logs/small" in done.stderr


def test_a_console_that_takes_nothing_does_not_end_the_run(data_path, run_id):
    """Its file on a full disk: /dev/full. Python's own last flush fails, and says so."""
    with open("/dev/full", "w") as console:
        done = subprocess.run([sys.executable, "train_gpt.py", *(f"--{k}={v}" for k, v in {**TINY, "data_path": data_path, "run_id": run_id}.items())], cwd=ROOT, stdout=console, stderr=subprocess.PIPE)
    assert result_of(run_id)["steps"] == TINY["iterations"], done.stderr
    assert (ROOT / "logs" / run_id / "log.txt").read_text().splitlines()[-1].startswith("result: ")


def test_a_quota_is_a_full_disk(data_path, tmp_path, monkeypatch):
    """RLIMIT_FSIZE: no file above 64 KiB, where no file system can be mounted."""
    log = MemoryLog()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Checkpoints(tmp_path, 4, 0.0, 0, log) as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limit[1]))
            train_in_process(make_config(data_path), checkpoints=checkpoints)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not list((tmp_path / "checkpoint").iterdir())
    assert len(log.lines) == 2 and all("File too large); there is none" in line for line in log.lines)


@pytest.mark.nightly
def test_soak(data_path, run_id, tmp_path):
    """An hour (SOAK_SECONDS) of training with evaluations, checkpoints, diagnostics and text samples: memory and open files of the last
    quarter are those of the half before it; of the files the median, since a log may be open at the moment of a look."""
    seconds, driver = float(os.environ.get("SOAK_SECONDS", 3600)), tmp_path / "driver.py"
    driver.write_text(f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_gpt
evaluate, began = train_gpt.evaluate, time.time()
def sampled(model, eval_fn, data, *rest):
    train_gpt.sample_text(model, data, data.cfg)
    return evaluate(model, eval_fn, data, *rest)
train_gpt.evaluate = sampled
progress = train_gpt.run_progress
def bounded(*arguments):
    done, *rest = progress(*arguments)
    return max(done, (time.time() - began) / {seconds}), *rest
train_gpt.run_progress = bounded
train_gpt.main()
""")
    settings = {**TINY, "data_path": data_path, "compile": 0, "run_id": run_id, "iterations": 10**9, "val_loss_every": 20, "val_tokens": 2000, "checkpoint_every": 25, "diag_every": 200,
                "jepa_lambda": 0.1, "train_log_every": 1000}
    process = subprocess.Popen([sys.executable, str(driver), *(f"--{k}={v}" for k, v in settings.items())], cwd=ROOT, stdout=subprocess.DEVNULL)
    samples, proc = [], f"/proc/{process.pid}"
    while process.poll() is None:
        try:
            samples.append((int(open(f"{proc}/statm").read().split()[1]) * resource.getpagesize(), len(os.listdir(f"{proc}/fd"))))
        except OSError:
            break
        time.sleep(seconds / 200)
    assert process.wait(timeout=120) == 0
    quarter = len(samples) // 4
    (memory, files), (later, later_files) = ((max(m for m, _ in part), statistics.median(f for _, f in part)) for part in (samples[quarter:-quarter], samples[-quarter:]))
    print(f"memory {memory / 2**20:.1f} -> {later / 2**20:.1f} MiB, open files {files} -> {later_files}, {len(samples)} samples")
    assert later < memory * 1.02 and later_files <= files
