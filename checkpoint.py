"""Checkpoints of a run: logs/<run>/checkpoint/step_00000123/, which is there whole or not at all.

A checkpoint is what the next steps depend on: weights and optimizer state in tensors.safetensors; in manifest.json the step, the training
clock and the rest, with the sha256 of the tensors. Data order, spans and diagnostics are functions of SEED and step, so there is no
generator to save. It is written under another name, synced and renamed; the one before it is kept, for the day the newest is damaged.
"""
import hashlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path

from data.shards import read_sealed, sync_folder, write_whole, write_sealed
from weights import from_safetensors, to_safetensors

KEPT = 2  # the newest, and the one before it


class Checkpoints:
    """When a run saves and stops: CHECKPOINT_EVERY steps, CHECKPOINT_SECONDS, SIGTERM and SIGINT. Only rank 0 writes, in a thread.

    As a context it holds the signals back until the step is over: `signal` is then the one received, or 0. A SIGINT behind another ends at once.
    """

    def __init__(self, folder, every, seconds, rank, log):
        self.folder, self.every, self.seconds, self.rank, self.log = Path(folder) / "checkpoint", every, seconds, rank, log
        self.thread, self.error, self.saved, self.since, self.signal = None, None, None, time.perf_counter(), 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}
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
        passed = self.seconds and time.perf_counter() - self.since >= self.seconds
        return self.rank == 0 and bool(passed or self.every and step % self.every == 0 or done and (self.every or self.seconds))

    def save(self, step, tensors, state):
        """Copy the tensors, {name: tensor}, and write them with the state, a dict for JSON, while the run goes on."""
        self.wait()
        copied = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        self.since = time.perf_counter()
        self.thread = threading.Thread(target=self.write, args=(step, copied, state))
        self.thread.start()

    def wait(self):
        """Wait for the checkpoint that is being written; a failure is said in the log."""
        if self.thread:
            self.thread.join()
            self.thread = None
            if self.error:
                newest = f"the newest one is step {self.saved}" if self.saved is not None else "there is none"
                self.log.line(f"warning: no checkpoint could be written ({self.error}); {newest}")
                self.error = None

    def write(self, step, tensors, state):
        part = self.folder / f"step_{step:08d}.part"
        try:
            self.folder.mkdir(exist_ok=True)
            for left in self.folder.glob("*.part"):  # of a process that was killed
                shutil.rmtree(left)
            part.mkdir()
            blob = to_safetensors(tensors, seal=False)  # its sha256 is in the manifest
            write_whole(part / "tensors.safetensors", blob)
            write_sealed(part / "manifest.json", {"step": step, **state, "files": {"tensors.safetensors": hashlib.sha256(blob).hexdigest()}})
            whole = part.with_suffix("")
            for other in found(self.folder):
                if other.name >= whole.name:  # damaged: the run has come here again, from the one before
                    discard(other)
            os.rename(part, whole)
            sync_folder(self.folder)
            self.saved = step
            for old in found(self.folder)[:-KEPT]:
                discard(old)
        except Exception as e:  # a full disk, mostly
            self.error = f"step {step}: {getattr(e, 'strerror', None) or repr(e)}"
            shutil.rmtree(part, ignore_errors=True)  # it may be what fills the disk


def discard(folder):
    """Remove a checkpoint; killed in between, it is no longer taken for one."""
    part = folder.with_suffix(".old.part")
    os.rename(folder, part)
    shutil.rmtree(part)


def found(folder):
    """The checkpoints in a folder, oldest first, whole or damaged."""
    return sorted(path for path in Path(folder).glob("step_*") if path.suffix != ".part")


def read_checkpoint(path):
    """(manifest, {name: tensor}) of a checkpoint; ValueError names the file that is damaged."""
    manifest, file = read_sealed(path / "manifest.json"), path / "tensors.safetensors"
    try:
        blob = file.read_bytes()
    except OSError as e:
        raise ValueError(f"{file}: {e.strerror or e}") from None
    if hashlib.sha256(blob).hexdigest() != manifest["files"]["tensors.safetensors"]:
        raise ValueError(f"{file}: its sha256 is not the one in manifest.json")
    return manifest, from_safetensors(blob)


def newest_checkpoint(run, warnings):
    """(manifest, tensors) of the newest whole checkpoint of a run's folder, None where it has none at all. A damaged one is named in
    the warnings, a list; ValueError where all are damaged."""
    paths = found(Path(run) / "checkpoint")
    for path in reversed(paths):
        try:
            return read_checkpoint(path)
        except ValueError as e:
            warnings.append(f"warning: damaged checkpoint: {e}; trying the one before it")
            last = e
    if paths:
        raise ValueError(f"{last}; no checkpoint of this run is whole: remove {paths[0].parent} to begin again at step 0")
    return None
