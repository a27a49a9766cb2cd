"""Checkpoints, logs/<run>/checkpoint/step_00000123/, and the rules of resuming.

A checkpoint is what the next steps depend on: weights and optimizer state in tensors.safetensors;
the step, the training clock and the rest in manifest.json, a sealed file. Data order, draws and
diagnostics are functions of SEED and step, so no generator is saved. It is written under another
name, synced and renamed, so it is there whole or not at all. The one before it is kept, in case the
newest is damaged.
"""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanojepa.device import all_ranks_max
from nanojepa.files import one_line, read_sealed, sync_folder, write_sealed
from nanojepa.results import result_line
from nanojepa.runlog import say
from nanojepa.settings import as_dict, load_settings
from nanojepa.weights import load_tensors, save_weights

KEPT = 2  # the newest, and the one before it
# What may change when a run is resumed: none of it changes more than rounding.
MAY_CHANGE = (
    "data_path",
    "grad_accum_steps",
    "wandb",
    "checkpoint_every",
    "checkpoint_seconds",
)


class Checkpoints:
    """When a run saves and stops: by steps, by seconds, after SIGTERM and SIGINT.

    Only rank 0 writes, in a thread. As a context it holds the signals back until the step is over:
    `signal` is then the one received, or 0. A SIGINT after another signal ends the process at once.
    """

    def __init__(self, folder, every, seconds, rank, log):
        self.folder, self.every, self.seconds = Path(folder) / "checkpoint", every, seconds
        self.rank, self.log = rank, log
        self.thread = self.error = self.saved = None
        self.since, self.signal = time.perf_counter(), 0

    def __enter__(self):
        numbers = signal.SIGTERM, signal.SIGINT
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.wait()

    def receive(self, number, frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def due(self, step, done):
        """Whether this process has a checkpoint to write before the next step."""
        if self.thread and not self.thread.is_alive():
            self.wait()
        if self.rank:
            return False
        if self.seconds and time.perf_counter() - self.since >= self.seconds:
            return True
        if done:
            return bool(self.every or self.seconds)
        return bool(self.every) and step % self.every == 0

    def save(self, step, tensors, state):
        """Copy {name: tensor} and write it while the run goes on; state: a dict for JSON."""
        self.wait()
        copied = {name: copy_to_host(t) for name, t in tensors.items()}
        self.since = time.perf_counter()
        self.thread = threading.Thread(target=self.write, args=(step, copied, state))
        self.thread.start()

    def wait(self):
        """Wait for the checkpoint that is being written; a failure is said in the log."""
        if self.thread is None:
            return
        self.thread.join()
        self.thread = None
        if self.error:
            newest = "there is none"
            if self.saved is not None:
                newest = f"the newest one is step {self.saved}"
            self.log.line(f"warning: no checkpoint could be written ({self.error}); {newest}")
            self.error = None

    def write(self, step, tensors, state):
        part = self.folder / f"step_{step:08d}.part"
        try:
            self.folder.mkdir(exist_ok=True)
            for left in self.folder.glob("*.part"):  # of a process that was killed
                shutil.rmtree(left)
            part.mkdir()
            save_weights(part / "tensors.safetensors", tensors)
            write_sealed(part / "manifest.json", {"step": step, **state})
            whole = part.with_suffix("")
            for other in checkpoints_in(self.folder):
                # This older copy was damaged. The run has repeated its steps; replace it.
                if other.name >= whole.name:
                    discard(other)
            os.rename(part, whole)
            sync_folder(self.folder)
            self.saved = step
            for old in checkpoints_in(self.folder)[:-KEPT]:
                discard(old)
        except Exception as e:  # a full disk, mostly
            self.error = f"step {step}: {getattr(e, 'strerror', None) or repr(e)}"
            shutil.rmtree(part, ignore_errors=True)  # it may be what fills the disk


def copy_to_host(tensor):
    """A copy in the host's memory, pinned for a GPU, which fills it faster."""
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach())


def discard(folder):
    """Remove a checkpoint; if killed in between, it is no longer taken for one."""
    part = folder.with_suffix(".old.part")
    os.rename(folder, part)
    shutil.rmtree(part)


def checkpoints_in(folder):
    """The checkpoints in a folder, oldest first, whole or damaged."""
    return sorted(path for path in Path(folder).glob("step_*") if path.suffix != ".part")


def newest_checkpoint(run_folder, warnings):
    """(manifest, tensors) of the newest whole checkpoint of a run, None if it has none at all.

    A damaged one is named in the warnings, a list; ValueError if all are damaged.
    """
    paths, last = checkpoints_in(Path(run_folder) / "checkpoint"), None
    for path in reversed(paths):
        try:
            manifest = read_sealed(path / "manifest.json")
            return manifest, load_tensors(path / "tensors.safetensors")
        except ValueError as e:
            warnings.append(f"warning: damaged checkpoint: {e}; trying the one before it")
            last = e
    if paths:
        raise ValueError(
            f"{last}; no checkpoint of this run is whole: remove {paths[0].parent} to begin again "
            "at step 0"
        )
    return None


# ---- what is in them


def run_tensors(modules, optimizers):
    """{name: tensor} of all that a step reads and writes; every rank has the same.

    modules: {name: module}.
    """
    held = {}
    for prefix, module in modules.items():
        held |= {f"{prefix}.{name}": w for name, w in module.state_dict().items()}
    for o, optimizer in enumerate(optimizers):
        for i, p in enumerate(parameters_of(optimizer)):
            for key, value in optimizer.state.get(p, {}).items():
                held[f"optimizer.{o}.{i}.{key}"] = value
    return held


def restore(modules, optimizers, tensors):
    """Put tensors, as run_tensors names them, where they were; ValueError if they don't fit."""
    try:
        for prefix, module in modules.items():
            start = f"{prefix}."
            state = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            module.load_state_dict(state)
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, o, i, key = name.split(".")
                p = parameters_of(optimizers[int(o)])[int(i)]
                optimizers[int(o)].state[p][key] = value.to(p.device, copy=True)
    except (RuntimeError, LookupError) as e:
        raise ValueError(f"the checkpoint doesn't fit this code: {one_line(e)}") from None


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


# ---- resuming


class Resumed(NamedTuple):
    """cfg and origin are those the run began with; manifest and tensors those of its checkpoint.

    manifest: {} if the run has no checkpoint yet, None for a new run.
    """

    cfg: Any
    origin: dict
    manifest: dict | None
    tensors: dict | None


def find_run(cfg, origin, logs, warnings, rank):
    """What RESUME asks for, as Resumed; logs is the folder of all runs.

    Prints the result of a finished run again and exits. ValueError if a run can't go on.
    """
    folder = resumed_folder(cfg, logs)
    if folder is None:
        return Resumed(cfg, origin, None, None)
    begun = (folder / "config.yaml").exists()  # not so if it is new, or was killed before that
    finished = (folder / "result.json").exists()
    manifest, tensors = {} if begun else None, None
    if begun and not finished:
        manifest, tensors = newest_checkpoint(folder, warnings) or ({}, None)
    check_same_step(manifest)
    if not begun:
        return Resumed(replace(cfg, run_id=folder.name), origin, None, None)
    cfg, origin = keep_settings(cfg, origin, folder, manifest)
    if finished:
        if rank == 0:
            say(result_line(json.loads((folder / "result.json").read_bytes()), folder))
        raise SystemExit(0)
    return Resumed(cfg, origin, manifest, tensors)


def resumed_folder(cfg, logs):
    """The folder of the run that RESUME names, or None if it is empty."""
    if not cfg.resume:
        return None
    if cfg.resume == "auto":
        return logs / cfg.run_id
    folder = logs / Path(cfg.resume).name
    # From whatever folder this is called, logs/<run> is the project's.
    meant = {Path(cfg.resume).resolve(), (logs.parent / cfg.resume).resolve()}
    if folder.resolve() not in meant or not folder.is_dir():
        raise ValueError(
            f"RESUME={cfg.resume}: no such run; give the logs/<run> of one, or auto and its RUN_ID"
        )
    if cfg.run_id not in ("", folder.name):
        raise ValueError(
            f"RUN_ID={cfg.run_id}: RESUME={cfg.resume} goes on as {folder.name}; leave RUN_ID out"
        )
    return folder


def check_same_step(manifest):
    """ValueError if the ranks go on from different steps."""
    step = -1 if manifest is None else manifest.get("step", 0)
    low, high = all_ranks_max(-step, step)
    if low + high:
        raise ValueError(
            "RESUME: the ranks find different checkpoints; logs/ must be a disk that all share"
        )


def keep_settings(cfg, origin, folder, manifest):
    """(cfg, origin) with the settings of the run; ValueError if another value is given for one."""
    saved = manifest.get("config")
    if saved is None:
        flags = [f"--config={folder / 'config.yaml'}"]
        saved = as_dict(load_settings(type(cfg), flags).config)
        saved["resume"] = "auto" if cfg.resume == "auto" else ""
    if unknown := sorted(saved.keys() - origin.keys()):
        raise ValueError(
            f"RESUME={cfg.resume}: the run has settings that this code doesn't know: "
            f"{', '.join(unknown)}; use the code in its log.txt"
        )
    # A setting that the code of the run didn't have yet was what is its default now.
    saved = as_dict(type(cfg)()) | saved
    values, said = saved | {"run_id": folder.name}, {}
    for name, value in saved.items():
        if name in ("run_id", "resume"):
            continue
        if origin[name] == "default":
            said[name] = f"{folder.name}/config.yaml"
            continue
        values[name] = given = getattr(cfg, name)
        if given != value and name not in MAY_CHANGE:
            raise ValueError(
                f"{name.upper()}={given} ({origin[name]}): the run began with {value!r}, and a "
                "resumed run is the same run; leave it out, or begin a new one"
            )
    return type(cfg)(**values), origin | said
