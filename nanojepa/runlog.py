"""What a run says while it trains: the console and the files of logs/<run_id>/.

log.txt (sources, versions, every line) is for people. Programs read metrics.jsonl, config.yaml,
environment.json, result.json and source/.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import yaml

from nanojepa.files import one_line, quoted, shown, take_lock, write_whole
from nanojepa.settings import as_dict, non_defaults

LINE = "=" * 40
SECONDS_BETWEEN_REPORTS = 20


class RunLog:
    """Console, log.txt, metrics.jsonl and, if asked for, Weights & Biases.

    It is silent on all ranks but the first. What a full disk doesn't take is kept and tried again
    with the next line.
    """

    def __init__(self, folder, cfg, origin, rank, sources, resumed=None):
        """sources: {name: path} of the code that runs. resumed: the manifest of the checkpoint that
        the run goes on from, {} if it has none, None for a new run."""
        self.folder, self.cfg, self.rank = Path(folder), cfg, rank
        self.wandb, self.unwritten = None, {}
        if rank:
            return
        self.open_folder(resumed)
        if cfg.wandb:
            self.start_wandb(resumed)
        machine = describe_machine(sources)
        self.sources = machine["sources"]  # of what runs, whatever is edited later
        if resumed is None:
            for name, path in sources.items():
                self.note(f"{LINE} {name}\n{path.read_text(encoding='utf-8')}")
                copy = self.folder / "source" / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        self.note(f"{LINE} environment\n{json.dumps(machine, indent=1)}\n{LINE} run")
        step = resumed.get("step", 0) if resumed else 0
        self.add_start({"step": step, **machine, "origin": origin})
        for name, value in as_dict(cfg).items():
            self.note(f"config {name}: {value!r} ({origin[name]})")
        for line in non_defaults(cfg, origin):
            say(line)
        if resumed is None:
            again = {k: v for k, v in as_dict(cfg).items() if k not in ("run_id", "resume")}
            text = yaml.safe_dump(again, sort_keys=False)
            write_whole(self.folder / "config.yaml", text.encode())  # now there is a run to resume
        else:
            self.go_on(resumed, sources)

    def open_folder(self, resumed):
        """Make the run's folder and hold it: two processes must not train one run."""
        run_id = self.folder.name
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            if resumed is None and not self.cfg.resume:
                raise ValueError(
                    f"RUN_ID={run_id}: {shown(self.folder)} exists and is never overwritten; "
                    f"choose another RUN_ID, or RESUME={quoted(self.folder)}"
                ) from None
        self.held = (self.folder / "log.txt").open("ab")  # the lock lasts as long as this
        try:
            take_lock(self.held)
        except BlockingIOError:
            raise ValueError(
                f"RUN_ID={run_id}: another process is training this run; end it first"
            ) from None
        if resumed is None:  # a process left these files when it was killed before its first step
            os.truncate(self.held.fileno(), 0)
            (self.folder / "environment.json").unlink(missing_ok=True)

    def add_start(self, start):
        """Append this start of a process to environment.json."""
        file = self.folder / "environment.json"
        starts = json.loads(file.read_bytes()) if file.exists() else []
        write_whole(file, (json.dumps([*starts, start], indent=1) + "\n").encode())

    def go_on(self, manifest, sources):
        """Take up the files of a run at its checkpoint.

        What was logged after it stays in log.txt and goes from metrics.jsonl.
        """
        line = f"resumed at step {manifest.get('step', 0)}"
        if torch.cuda.is_available():
            line += ", not bit for bit on a GPU, whose embedding backward uses atomic adds"
        self.line(line)
        metrics, kept = self.folder / "metrics.jsonl", manifest.get("metrics_bytes", 0)
        size = self.size("metrics.jsonl")
        if size < kept:
            self.line(
                f"warning: {metrics} has lost its last lines: {size} bytes, {kept} when the "
                "checkpoint was written"
            )
        elif size > kept:
            os.truncate(metrics, kept)
        before = manifest.get("sources", self.sources)
        for name, sha256 in self.sources.items():
            if sha256 != before.get(name, sha256):
                text = sources[name].read_text(encoding="utf-8")
                self.note(f"{LINE} {name}, changed\n{text}\n{LINE} run")
                self.line(
                    f"warning: {name} is not what it was before step {manifest['step']}: from "
                    "here on this is another run; its source is in the log"
                )

    def start_wandb(self, resumed):
        """Begin or take up the run of Weights & Biases; without one, a new run leaves no folder."""
        options = {"project": "nanojepa", "name": self.folder.name, "config": as_dict(self.cfg)}
        if resumed and resumed["wandb"]:
            options |= {"id": resumed["wandb"], "resume": "allow"}
        try:
            self.wandb = start_wandb(dir=str(self.folder), **options)
        except ValueError:
            if resumed is None:
                self.held.close()
                shutil.rmtree(self.folder)
            raise

    def append(self, name, text):
        """Append text to a file of the run, whole or not at all."""
        data, path = self.unwritten.get(name, b"") + text.encode(), self.folder / name
        try:
            with open(path, "ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                if file.write(data) < len(data):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            if name not in self.unwritten:
                say(
                    f"warning: {path}: {e.strerror}; the run goes on, its lines are kept until "
                    "they can be written"
                )
            self.unwritten[name] = data
        else:
            if self.unwritten.pop(name, None):
                say(f"{path} is written again, no line is lost")

    def size(self, name):
        """Bytes of a file with all that belongs to it, 0 if it doesn't exist."""
        file = self.folder / name
        return (file.stat().st_size if file.exists() else 0) + len(self.unwritten.get(name, b""))

    def note(self, text):
        """Append a line to log.txt."""
        if self.rank == 0:
            self.append("log.txt", text + "\n")

    def line(self, text):
        """Print a line and append it to log.txt."""
        if self.rank == 0:
            say(text)
            self.note(text)

    def metrics(self, step, train_time, values, more=None):
        """Write a line `step:.. name:value .. train_time:..ms` and one of metrics.jsonl.

        train_time: s. more: values for metrics.jsonl and wandb only.
        """
        if self.rank:
            return
        shown = " ".join(f"{k}:{shorten(v)}" for k, v in values.items() if v is not None)
        ms = 1000 * train_time
        average = ms / max(step, 1)
        self.line(
            f"step:{step}/{self.cfg.iterations} {shown} train_time:{ms:.0f}ms "
            f"step_avg:{average:.2f}ms"
        )
        row = {"step": step, **values, **(more or {}), "train_time": train_time}
        self.append("metrics.jsonl", json.dumps(row) + "\n")
        if self.wandb:
            self.report(row, step)

    def report(self, row, step):
        """Send a row to Weights & Biases, until that fails: the run goes on without it."""
        try:
            self.wandb.log(row, step=step)
        except Exception as e:  # of many kinds
            self.wandb = None
            self.line(f"warning: Weights & Biases: {one_line(e)}; the run goes on without it")

    def timer(self, what):
        return Timer(self, what)


def start_wandb(**options):
    """The run that wandb.init() gives; ValueError, in one line, says why there is none."""
    try:
        import wandb

        return wandb.init(**options)
    except ModuleNotFoundError:
        raise ValueError("wandb is missing: pip install wandb, or leave it out") from None
    except Exception as e:  # of many kinds: nobody is logged in, no network, no such project
        raise ValueError(
            f"Weights & Biases: {one_line(e)}; log in with `wandb login`, set WANDB_MODE=offline, "
            "or leave it out"
        ) from None


class Timer:
    """Says now and then how long something long will take; the first report starts the clock."""

    def __init__(self, log, what):
        self.log, self.what, self.began = log, what, None

    def report(self, done):
        """done: the fraction that is done."""
        now = time.perf_counter()
        if self.began is None:  # after the first batch: compilation isn't counted
            self.began, self.first, self.said = now, done, now
        elif now - self.said > SECONDS_BETWEEN_REPORTS:
            self.said = now
            left = (now - self.began) * (1 - done) / (done - self.first)
            self.log.line(f"{self.what}: {done:.0%}, {left:.0f} s left")


def shorten(value):
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def say(text):
    """Print a line if the console takes it: nobody may be listening, or its disk is full."""
    with contextlib.suppress(OSError, UnicodeEncodeError):
        print(text, flush=True)


def project_sources(root):
    """{name: path} of the project's code that this process has loaded, by name."""
    root, sources = Path(root), {}
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "")
        # A virtual environment may lie inside the project.
        if path.suffix == ".py" and path.is_relative_to(root) and "site-packages" not in path.parts:
            sources[path.relative_to(root).as_posix()] = path
    return dict(sorted(sources.items()))


def source_hashes(sources):
    """{name: sha256} of {name: path}."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sources.items()}


def describe_machine(sources):
    """Versions, commit, sources and hardware, for environment.json."""
    root = Path(__file__).parents[1]

    def run(*command):
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.decode(errors="replace").strip()

    cpu = [line for line in run("lscpu").splitlines() if "Model name" in line]
    gpus = range(torch.cuda.device_count())
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": run("git", "rev-parse", "HEAD"),
        "uncommitted": bool(run("git", "status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(n) for n in gpus],
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "sources": source_hashes(sources),
    }
