"""Checkpoints and the run's log on disks that are damaged, full or in use."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import types

import pytest
import torch
from hypothesis import given, settings

from conftest import MemoryLog, make_config, make_run, train_run
from mutations import mutations
from nanojepa import runlog
from nanojepa.checkpoint import (
    Checkpoints,
    checkpoints_in,
    newest_checkpoint,
    restore,
    run_tensors,
)
from nanojepa.runlog import RunLog, Timer, project_sources, say, source_hashes


def steps_in(folder):
    return [int(path.name.removeprefix("step_")) for path in checkpoints_in(folder / "checkpoint")]


def save_checkpoints(data_path, folder, every, **settings):
    """Train in process with a checkpoint every so many steps; returns the lines of the log."""
    log = MemoryLog()
    with Checkpoints(folder, every, 0.0, 0, log) as checkpoints:
        train_run(make_run(data_path, **settings), checkpoints=checkpoints)
    return log.lines


# ---- writing and reading


def test_checkpoints_are_written_while_the_run_goes_on_and_two_are_kept(data_path, tmp_path):
    assert save_checkpoints(data_path, tmp_path, 3) == [] and steps_in(tmp_path) == [6, 8]
    other = tmp_path / "other"  # no rank but the first writes
    with Checkpoints(other, 0, 1e-9, 1, MemoryLog()) as checkpoints:
        train_run(make_run(data_path), checkpoints=checkpoints)
    assert not other.exists()


def test_a_checkpoint_is_due_by_steps_by_seconds_and_at_the_end(tmp_path):
    never, by_step = Checkpoints(tmp_path, 0, 0, 0, None), Checkpoints(tmp_path, 4, 0, 0, None)
    assert [by_step.due(step, False) for step in (4, 5, 8)] == [True, False, True]
    assert by_step.due(5, done=True) and not never.due(4, done=True)
    by_second = Checkpoints(tmp_path, 0, 0.05, 0, None)
    assert not by_second.due(1, False)
    time.sleep(0.06)
    assert by_second.due(2, False)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(data_path, tmp_path):
    save_checkpoints(data_path, tmp_path, 4)
    older, newest = checkpoints_in(tmp_path / "checkpoint")
    file = newest / "tensors.safetensors"
    blob = file.read_bytes()
    for damaged in (blob[:-1], blob[:-9] + bytes([blob[-9] ^ 1]) + blob[-8:], b""):
        file.write_bytes(damaged)
        warnings = []
        manifest, _ = newest_checkpoint(tmp_path, warnings)
        assert manifest["step"] == 4 and len(warnings) == 1 and str(file) in warnings[0]
    # The run that goes on from there writes over the damaged one.
    with Checkpoints(tmp_path, 7, 0.0, 0, MemoryLog()) as checkpoints:
        resumed = newest_checkpoint(tmp_path, [])
        train_run(make_run(data_path), checkpoints=checkpoints, resumed=resumed)
    assert steps_in(tmp_path) == [7, 8] and newest_checkpoint(tmp_path, [])[0]["step"] == 8
    older, newest = checkpoints_in(tmp_path / "checkpoint")
    (newest / "tensors.safetensors").unlink()
    manifest = (older / "manifest.json").read_text()
    (older / "manifest.json").write_text(manifest.replace('"step": 7', '"step": 5'))
    with pytest.raises(ValueError, match="no checkpoint of this run is whole: remove "):
        newest_checkpoint(tmp_path, [])
    assert newest_checkpoint(tmp_path / "nowhere", []) is None


def test_what_a_killed_process_left_is_cleared_and_never_read(data_path, tmp_path):
    for name in ("step_00000099.part", "step_00000098.old.part"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path, []) is None
    save_checkpoints(data_path, tmp_path, 8)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step_00000008"]


@pytest.fixture(scope="module")
def saved(data_path, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    save_checkpoints(data_path, run, 8)
    return run / "checkpoint" / "step_00000008"


@pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors"])
def test_no_mutation_of_a_checkpoint_is_silent(saved, tmp_path, name):
    copy = shutil.copytree(saved, tmp_path / "checkpoint" / saved.name)
    content = (copy / name).read_bytes()

    @settings(max_examples=60, derandomize=True, deadline=None, database=None)
    @given(mutations(content))
    def refused(changed):
        (copy / name).write_bytes(changed)
        warnings = []
        with pytest.raises(ValueError, match="no checkpoint of this run is whole"):
            newest_checkpoint(tmp_path, warnings)
        (warning,) = warnings
        assert str(copy / name) in warning and "\n" not in warning

    refused()


def test_a_checkpoint_of_another_network_is_one_line(data_path, saved):
    tensors = newest_checkpoint(saved.parents[1], [])[1]
    for changes in ({"model_dim": 64}, {"num_layers": 2}, {"optimizer": "adamw"}):
        run = make_run(data_path, **changes)
        with pytest.raises(ValueError, match="the checkpoint doesn't fit this code: ") as e:
            restore(run.modules(), run.optimizers, tensors)
        assert "\n" not in str(e.value)


def test_a_restored_run_has_its_own_tensors(data_path, saved):
    """What is loaded stays as it is when the run that it was restored into trains."""
    manifest, tensors = newest_checkpoint(saved.parents[1], [])
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    run = make_run(data_path, iterations=10)
    train_run(run, resumed=(manifest, tensors))
    after = run_tensors(run.modules(), run.optimizers)
    assert after.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], before[name]) for name in before)
    assert not torch.equal(after["model.embed.weight"], before["model.embed.weight"])


# ---- signals


def test_a_signal_is_held_and_a_sigint_after_it_ends_at_once(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Checkpoints(tmp_path, 0, 0, 0, MemoryLog()) as checkpoints:
        assert checkpoints.signal == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert checkpoints.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# ---- full disks


def test_a_quota_is_a_full_disk(data_path, tmp_path):
    """RLIMIT_FSIZE: no file above 64 KiB. The run goes on, and says what it has lost."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limit[1]))
        lines = save_checkpoints(data_path, tmp_path, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not list((tmp_path / "checkpoint").iterdir())
    assert len(lines) == 2 and all("File too large); there is none" in line for line in lines)


def new_log(folder, resumed=None, sources=None, **settings):
    cfg = make_config("", **settings)
    origin = dict.fromkeys(vars(cfg), "default") | {"iterations": "flag --iterations"}
    return RunLog(folder, cfg, origin, 0, sources or {}, resumed)


def rows_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


def test_a_log_that_cannot_be_written_is_said_once_and_made_up_for(tmp_path, capsys):
    folder = tmp_path / "run"
    log = new_log(folder)
    log.metrics(1, 1.0, {"train_loss": 2.0})
    os.rename(folder / "metrics.jsonl", folder / "kept")
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    for step in (2, 3):
        log.metrics(step, 1.0, {"train_loss": 2.0})
    assert log.size("metrics.jsonl") > 0
    os.rename(folder / "kept", folder / "metrics.jsonl")
    log.metrics(4, 1.0, {"train_loss": 2.0})
    assert rows_of(folder) == [1, 2, 3, 4]
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl: No space left on device; the run goes on") == 1
    assert said.count("metrics.jsonl is written again, no line is lost") == 1


def test_a_console_that_takes_nothing_does_not_end_the_run(monkeypatch):
    with contextlib.suppress(OSError), open("/dev/full", "w") as console:
        monkeypatch.setattr(sys, "stdout", console)
        with pytest.raises(OSError, match="No space"):
            print("x", flush=True)
        say("x")
        monkeypatch.undo()


# ---- what the log says of a run


def test_the_console_prints_what_is_not_default_and_the_log_everything(tmp_path, capsys):
    (tmp_path / "code.py").write_text("print('hello')\n")
    log = new_log(tmp_path / "run", sources={"code.py": tmp_path / "code.py"}, iterations=9)
    shown = capsys.readouterr().out.splitlines()
    assert "iterations: 9 (flag --iterations)" in shown
    assert not [line for line in shown if line.startswith("seed")]
    text = (log.folder / "log.txt").read_text()
    assert "config iterations: 9 (flag --iterations)" in text
    assert "config seed: 1337 (default)" in text
    assert "code.py\nprint('hello')\n" in text and f'"torch": "{torch.__version__}"' in text


def test_environment_json_has_an_entry_for_each_start(tmp_path):
    folder, code = tmp_path / "run", tmp_path / "code.py"
    code.write_text("1\n")
    sources = {"code.py": code}
    new_log(folder, sources=sources)
    new_log(folder, {"step": 5, "sources": source_hashes(sources)}, sources)
    first, second = json.loads((folder / "environment.json").read_text())
    assert (first.pop("step"), second.pop("step")) == (0, 5)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", first.pop("started"))
    del second["started"]
    assert first == second
    assert first["origin"]["iterations"] == "flag --iterations"
    assert first["sources"] == source_hashes(sources) and first["torch"] == torch.__version__
    assert first["world_size"] == 1 and first["threads"] == 1 and first["gpus"] == []
    names = "git_commit uncommitted python numpy platform cpu cpu_capability"
    assert set(names.split()) < first.keys()


def test_a_resumed_log_goes_on_at_its_checkpoint(tmp_path, capsys):
    """What was logged after it goes from metrics.jsonl; what is missing or has changed is said."""
    folder, code = tmp_path / "run", tmp_path / "code.py"
    code.write_text("1\n")
    sources = {"code.py": code}
    log = new_log(folder, sources=sources)
    for step in (1, 2):
        log.metrics(step, 1.0, {"train_loss": 2.0})
    manifest = {"step": 2, "metrics_bytes": log.size("metrics.jsonl"), "sources": log.sources}
    log.metrics(3, 1.0, {"train_loss": 2.0})
    code.write_text("2\n")
    assert log.sources == manifest["sources"]  # of what runs, not of what was edited meanwhile
    del log
    new_log(folder, manifest, sources)
    said, text = capsys.readouterr().out, (folder / "log.txt").read_text()
    assert rows_of(folder) == [1, 2] and "resumed at step 2" in said
    assert "warning: code.py is not what it was before step 2: from here on this is" in said
    assert "code.py, changed\n2\n" in text and "step:3/8" in text
    new_log(folder, {**manifest, "metrics_bytes": 10**6, "sources": {"gone.py": "0"}}, sources)
    said = capsys.readouterr().out
    assert "metrics.jsonl has lost its last lines" in said and "is not what it was" not in said
    new_log(folder, {}, sources)  # no checkpoint yet: from the beginning
    assert rows_of(folder) == [] and "resumed at step 0" in capsys.readouterr().out


def test_a_folder_is_never_overwritten_and_held_while_the_run_lives(tmp_path):
    log = new_log(tmp_path / "run")
    with pytest.raises(ValueError, match="RUN_ID=run: .* exists and is never overwritten"):
        new_log(tmp_path / "run")
    with pytest.raises(ValueError, match="RUN_ID=run: another process is training this run"):
        new_log(tmp_path / "run", {})
    del log
    assert new_log(tmp_path / "run", {}).folder == tmp_path / "run"


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / "run", make_config(""), {}, 1, {})
    log.line("x")
    log.note("x")
    log.metrics(1, 1.0, {"train_loss": 2.0})
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_what_takes_long_says_how_long(monkeypatch):
    now, log = 0.0, MemoryLog()
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: now)
    timer = Timer(log, "evaluating")
    for now, done in ((0, 0.1), (5, 0.15), (30, 0.4), (40, 0.5), (60, 0.7)):  # noqa: B007
        timer.report(done)
    assert log.lines == ["evaluating: 40%, 60 s left", "evaluating: 70%, 30 s left"]


def test_sources_are_the_project_s_own_even_if_a_virtual_environment_lies_inside(
    tmp_path, monkeypatch
):
    for name in ("own.py", ".venv/lib/site-packages/other.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        module = types.ModuleType(path.stem)
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, path.stem, module)
    assert list(project_sources(tmp_path)) == ["own.py"]
