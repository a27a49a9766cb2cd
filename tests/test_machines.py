"""Machines as people have them, simulated: other systems, consoles, locales, homes and folders."""

import ast
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import types

import pytest
import torch

import hf
from conftest import ROOT, TINY
from data import prepare_text
from nanojepa import checkpoint, device, files
from nanojepa.files import lenient_console, quoted, shown, take_lock
from nanojepa.hf.chat import Chat
from nanojepa.hf.layout import Source, prepare
from nanojepa.hf.settings import Data
from nanojepa.objectives import OBJECTIVES, Options
from nanojepa.records import read_examples

SCRIPTS = ("train_gpt", "finetune", "evaluate", "ablate", "leaderboard", "bench")
# What Windows lacks, as modules and names.
ABSENT = ("fcntl", "resource", "pwd", "grp", "termios")
# They are missing for the project's own modules; libraries have ways of their own.
MISSING = r"""
import builtins
absent, real = {absent}, builtins.__import__
def missing(name, globals=None, *arguments, **options):
    place = (globals or {{}}).get("__file__") or ""
    if name in absent and place.startswith({root!r}) and "site-packages" not in place:
        raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
    return real(name, globals, *arguments, **options)
builtins.__import__ = missing
"""
UNIX = r"""
import os, signal
for name in ("fork", "forkpty", "getuid", "geteuid", "setsid", "killpg", "mkfifo", "getloadavg"):
    vars(os).pop(name, None)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGALRM"):
    vars(signal).pop(name, None)
"""
# A user without a name, a home or an entry in the list of users.
NOBODY = r"""
import pwd
def unknown(*_):
    raise KeyError("uid not found")
pwd.getpwuid = pwd.getpwnam = unknown
"""


def simulate(folder, code="", absent=()):
    """PYTHONPATH of a folder whose code runs before a script; absent: modules that aren't there."""
    folder.mkdir(exist_ok=True)
    code += MISSING.format(absent=set(absent), root=str(ROOT)) if absent else ""
    (folder / "sitecustomize.py").write_text(code)
    return str(folder)


def environment(without=(), **changes):
    kept = {key: value for key, value in os.environ.items() if key not in without}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | changes


def call(script, *arguments, cwd=ROOT, python=(), stdout=subprocess.PIPE, **environ):
    command = [sys.executable, *python, str(ROOT / script), *map(str, arguments)]
    env = environ.pop("env", None) or environment(**environ)
    options = dict(cwd=cwd, env=env, stdout=stdout, stderr=subprocess.PIPE)
    return subprocess.run(command, encoding="utf-8", errors="replace", timeout=300, **options)


def train(data_path, run_id, *flags, **options):
    values = {**TINY, "data_path": data_path, "run_id": run_id, "iterations": 2}
    arguments = [f"--{key}={value}" for key, value in values.items()]
    return call("train_gpt.py", *arguments, *flags, **options)


def finished(done, run_id):
    assert done.returncode == 0, done.stderr
    assert (ROOT / "logs" / run_id / "result.json").exists()


# ---- other systems


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_starts_without_what_windows_lacks(script, tmp_path):
    path = simulate(tmp_path / "win", absent=ABSENT)
    done = call(f"{script}.py", "--help", PYTHONPATH=path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_run_without_what_windows_lacks_ends_with_its_result(data_path, run_id, tmp_path):
    path = simulate(tmp_path / "win", UNIX, ABSENT + ("msvcrt",))
    flags = "--jepa_lambda=0.1", "--checkpoint_every=1"
    finished(train(data_path, run_id, *flags, PYTHONPATH=path, USERNAME="me"), run_id)
    result = json.loads((ROOT / "logs" / run_id / "result.json").read_text())
    assert result["peak_memory_bytes"] is None


def test_a_lock_is_held_where_there_are_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "log", "ab") as second:
        with open(tmp_path / "log", "ab") as first:
            take_lock(first)
            with pytest.raises(BlockingIOError):
                take_lock(second)
        take_lock(second)

        def fail(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(fcntl, "flock", fail)  # as a network drive without locks
        take_lock(second)


def test_windows_locks_a_byte_behind_the_end(tmp_path, monkeypatch):
    places, held = [], []

    def locking(fd, mode, size):
        places.append((os.lseek(fd, 0, os.SEEK_CUR), mode, size))
        if held:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    with open(tmp_path / "log", "ab") as file:
        take_lock(file)
        held.append(True)
        with pytest.raises(BlockingIOError):
            take_lock(file)
        file.write(b"line")
    assert places == [(2**40, 2, 1)] * 2
    assert (tmp_path / "log").read_bytes() == b"line"


def test_a_folder_that_cannot_be_synced_or_linked_is_done_without(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, *arguments):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")  # as Windows
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    files.write_whole(tmp_path / "x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"
    made = []

    def symlink_to(self, target):
        raise OSError(1314, "A required privilege is not held by the client")

    junction = types.SimpleNamespace(CreateJunction=lambda *ends: made.append(ends))
    monkeypatch.setitem(sys.modules, "_winapi", junction)
    monkeypatch.setattr(type(tmp_path), "symlink_to", symlink_to)
    files.link_folder(tmp_path / "link", tmp_path / "target")
    assert made == [(str(tmp_path / "target"), str(tmp_path / "link"))]


@pytest.mark.parametrize("platform, unit", [("linux", 1024), ("darwin", 1)])
def test_the_peak_is_in_bytes_on_every_system(monkeypatch, platform, unit):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(sys, "platform", platform)
    usage = types.SimpleNamespace(ru_maxrss=123)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    assert device.peak_memory(torch.device("cpu")) == 123 * unit


def test_an_apple_gpu_is_taken_by_a_single_process(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is another GPU")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.find_device().type == "mps"
    assert device.find_device(world_size=2).type == "cpu"
    assert device.choose_dtype("auto", torch.device("mps")) == torch.float32
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.find_device().type == "cpu"


def test_processes_that_are_spawned_lay_out_the_same(tmp_path, monkeypatch):
    """Windows and macOS don't fork, so all that a process needs must be sent to it."""
    chat = Chat(hf.make_tokenizer("llama"))
    data = Data(tokenize_num_proc=2, tokenize_batch_size=4)
    records = read_examples(hf.write_messages(tmp_path / "q.jsonl", hf.QUESTIONS))
    objective = OBJECTIVES["pair"](Options(width=8, preds=(5,)))
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing, "Pool", spawn.Pool)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}")
    spawned = prepare(Source("q", records), chat, data, objective)
    alone = prepare(Source("q", records), chat, Data(), objective)
    assert spawned == alone


# ---- consoles


class Broken(io.TextIOWrapper):
    """A console that takes nothing, as /dev/full."""

    def flush(self):
        raise OSError(28, "No space left on device")


def test_what_cannot_be_printed_is_escaped_or_left_out(monkeypatch):
    buffer = io.BytesIO()
    latin = io.TextIOWrapper(buffer, encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", latin)
    monkeypatch.setattr(sys, "stderr", Broken(io.BytesIO(), encoding="ascii"))
    before = sys.stdout, sys.stderr
    with lenient_console():
        print("säh → 日本", flush=True)
        print("lost", file=sys.stderr, flush=True)
    assert (sys.stdout, sys.stderr) == before
    assert buffer.getvalue() == "säh \\u2192 \\u65e5\\u672c\n".encode("latin-1")


def test_a_process_without_a_console_runs(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with lenient_console():
        print("nobody")


FULL = "/dev/full"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(FULL), reason="needs /dev/full")
def test_a_full_console_costs_no_result(data_path, run_id, tmp_path):
    with open(FULL, "w") as full:
        finished(train(data_path, run_id, stdout=full), run_id)
        folder = hf.make_folder(tmp_path / "m", "llama")
        data = hf.write_messages(tmp_path / "t.jsonl", hf.QUESTIONS[:4])
        out, few = tmp_path / "out", ("--num_epochs", 1, "--logging_steps", 1, "--dtype", "float32")
        flags = "--model_name", folder, "--train_file", data, "--output_dir", out
        done = call("finetune.py", *flags, *few, stdout=full)
        assert done.returncode == 0, done.stderr
        assert (out / "result.json").exists()
        flags = "accuracy", "--model", out, "--data", data, "--task", "exact", "--tokens", 2
        done = call("evaluate.py", *flags, stdout=full)
        assert done.returncode == 0, done.stderr
        assert (out / "accuracy-t-exact.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONOPTIMIZE": "2"},
    ],
    ids=lambda variables: "-".join(variables.values()),
)
def test_no_console_or_locale_costs_a_result(variables, run_id, tmp_path):
    text = tmp_path / "größe und länge"
    text.mkdir()
    (text / "a 日本.txt").write_text("säh Grüße → 日本語 naïve façade 🙂 " * 500, encoding="utf-8")
    out = tmp_path / "d"
    flags = "--source", text, "--vocab-size", "300", "--out", out
    done = call("data/prepare_text.py", *flags, **variables)
    assert done.returncode == 0, done.stderr
    finished(train(str(out), run_id, **variables), run_id)


@pytest.mark.slow
def test_a_reader_that_goes_away_costs_no_result(data_path, run_id):
    """As `train_gpt.py | head -1` does."""
    values = {**TINY, "data_path": data_path, "run_id": run_id, "iterations": 40}
    command = [sys.executable, "train_gpt.py", *(f"--{k}={v}" for k, v in values.items())]
    done = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
    done.stdout.readline()
    done.stdout.close()
    assert done.wait(timeout=300) == 0
    assert (ROOT / "logs" / run_id / "result.json").exists()


# ---- users and homes


@pytest.mark.slow
def test_a_user_without_a_name_or_a_home_trains_compiled_and_fine_tunes(
    data_path, run_id, tmp_path
):
    path = simulate(tmp_path / "nobody", NOBODY)
    names = ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME", "TORCHINDUCTOR_CACHE_DIR")
    env = environment(names, PYTHONPATH=path)
    finished(train(data_path, run_id, "--compile=1", env=env), run_id)
    result = json.loads((ROOT / "logs" / run_id / "result.json").read_text())
    assert result["compiled"]
    folder = hf.make_folder(tmp_path / "m", "llama")
    data = hf.write_messages(tmp_path / "t.jsonl", hf.QUESTIONS[:4])
    flags = "--model_name", folder, "--train_file", data, "--output_dir", tmp_path / "out"
    few = "--num_epochs", 1, "--dtype", "float32"
    done = call("finetune.py", *flags, *few, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "result.json").exists()


# ---- folders


@pytest.mark.slow
def test_every_path_that_is_printed_is_there_and_is_taken_back(run_id, tmp_path):
    """Launched from another folder, whose name has blanks and other letters."""
    here = tmp_path / "mein ordner, säh"
    here.mkdir()
    (here / "a text.txt").write_text("one two three four five six seven " * 400)
    flags = "--source", "a text.txt", "--vocab-size", "270", "--out", "my data"
    done = call("data/prepare_text.py", *flags, cwd=here)
    assert done.returncode == 0, done.stderr
    (data,) = re.findall(r"DATA_PATH='(.*)'", done.stdout)
    assert (here / data / "meta.json").exists()
    # A run that is stopped says how to go on.
    flags = "--checkpoint_every=1", "--iterations=3"
    finished(done := train(data, run_id, *flags, cwd=here), run_id)
    (place,) = re.findall(r"-> (\S.*)$", done.stdout.splitlines()[-1])
    assert (here / place).is_file()
    again = call("train_gpt.py", f"--resume={os.path.dirname(place)}", cwd=here)
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    refused = train(data, run_id, cwd=here)
    (resume,) = re.findall(r"RESUME=(\S+)", refused.stderr)
    assert call("train_gpt.py", f"--resume={resume}", cwd=here).returncode == 0
    sampled = call(
        "evaluate.py", "sample", "--run", os.path.dirname(place), "--prompt", "one", cwd=here
    )
    assert sampled.returncode == 0, sampled.stderr
    assert call("train_gpt.py", f"--resume=logs/{run_id}", cwd=here).returncode == 0


def test_paths_are_shown_as_they_are_found_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    assert shown(tmp_path / "a b" / "c") == "a b/c" and quoted("a b") == "'a b'"
    monkeypatch.chdir(tmp_path / "a b")
    assert shown(tmp_path / "c") == f"{tmp_path}/c" and shown("c") == "c"


def test_a_run_is_resumed_by_its_project_path_from_anywhere(tmp_path, monkeypatch):
    class Cfg:
        run_id, resume = "", "logs/r"

    (tmp_path / "project" / "logs" / "r").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    logs = tmp_path / "project" / "logs"
    assert checkpoint.resumed_folder(Cfg, logs) == logs / "r"
    Cfg.resume = "elsewhere/r"
    with pytest.raises(ValueError, match="no such run"):
        checkpoint.resumed_folder(Cfg, logs)


def test_every_text_file_is_opened_in_a_named_encoding():
    """The encoding of a locale is none to rely on."""
    methods = {"open", "read_text", "write_text"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("nanojepa/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if name not in methods or owner in ("os", "gzip", "tarfile", "readers"):
                continue
            given = [a.value for a in node.args if isinstance(a, ast.Constant)]
            binary = name == "open" and any(isinstance(v, str) and "b" in v[:3] for v in given)
            named = any(keyword.arg == "encoding" for keyword in node.keywords)
            ours = name == "read_text" and isinstance(node.func, ast.Name)  # readers.read_text
            assert binary or named or ours, f"{path.name}:{node.lineno}: name an encoding"


def test_texts_are_read_the_same_in_any_locale(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "text_encoding", lambda *_: "latin-1")
    (tmp_path / "a.txt").write_bytes("säh".encode())
    assert list(prepare_text.file_documents([tmp_path / "a.txt"], None)) == ["säh"]
