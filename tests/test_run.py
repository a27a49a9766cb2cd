"""train_gpt.py as a user starts it: what it prints, what it leaves behind, how it refuses."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import train_gpt
from conftest import ROOT, TINY, MemoryLog, make_run, metrics_of, result_of, run_cli
from nanojepa.settings import load_settings
from nanojepa.shards import write_shard
from nanojepa.tokenizer import write_ranks
from nanojepa.weights import dequantize, load_tensors

TIME = r" train_time:\d+ms step_avg:\d+\.\d\dms$"
NUMBER = r"\d+\.\d{4}"
TRAIN_LINE = re.compile(rf"^step:(\d+)/8 train_loss:{NUMBER} jepa_loss:{NUMBER}{TIME}")
VAL_LINE = re.compile(rf"^step:(\d+)/8 val_loss:{NUMBER} val_bpb:{NUMBER}{TIME}")
SETTING = re.compile(r"^\w+: .* \((flag|environment variable) \S+\)$")
FROZEN = [f"--{name}=0" for name in ("matrix_lr", "embed_lr", "head_lr", "scalar_lr")]

# torch's @record wants the console's file descriptor, which pytest has taken.
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


@pytest.fixture
def train(data_path, monkeypatch, capsys):
    """train(*flags) is train_gpt.py in this process; it returns the lines of its console.

    SystemExit holds the message that the interpreter would print.
    """
    for name in train_gpt.Config.__dataclass_fields__:
        monkeypatch.delenv(name.upper(), raising=False)

    def call(*flags, **environ):
        settings = {**TINY, "data_path": data_path}
        monkeypatch.setattr(
            sys, "argv", ["train_gpt.py", *(f"--{k}={v}" for k, v in settings.items()), *flags]
        )
        with monkeypatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            train_gpt.main()
        return capsys.readouterr().out.splitlines()

    return call


def refused(train, *flags):
    """The message with which a run ends; it is one line, and the exit status is 1."""
    with pytest.raises(SystemExit) as stop:
        train(*flags)
    message = stop.value.code
    assert message.startswith("error: ") and len(message.splitlines()) == 1
    return message


# ---- a whole run


def matches(pattern, lines):
    return [int(m[1]) for m in map(pattern.match, lines) if m]


def test_a_run_prints_its_lines_and_leaves_its_files(data_path, run_id):
    flags = ["--val_loss_every=4", f"--run_id={run_id}"]
    done = run_cli(data_path, *flags, env={"JEPA_LAMBDA": "0.1", "NUM_LAYER": "3"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines, folder, result = done.stdout.splitlines(), ROOT / "logs" / run_id, result_of(run_id)
    assert any(line.startswith("warning: environment variable NUM_LAYER ") for line in lines)
    assert matches(TRAIN_LINE, lines) == list(range(1, 9))
    assert matches(VAL_LINE, lines) == [4, 8]
    assert any(re.match(r"progress: 50%, \d+ s of training left", line) for line in lines)
    assert "jepa_lambda: 0.1 (environment variable JEPA_LAMBDA)" in lines
    assert not any(line.startswith("seed:") for line in lines)  # the default is only in the log
    assert lines[-1].startswith("result: val_loss:")

    log = (folder / "log.txt").read_text()
    shown = [line for line in lines if not SETTING.match(line)]
    assert log.endswith("\n".join(shown) + "\n")  # console and log alike
    assert "config seed: 1337 (default)" in log
    assert "config jepa_lambda: 0.1 (environment variable JEPA_LAMBDA)" in log
    (start,) = json.loads((folder / "environment.json").read_text())
    assert start["torch"] == torch.__version__ and start["step"] == 0 and start["world_size"] == 1
    assert start["origin"]["jepa_lambda"] == "environment variable JEPA_LAMBDA"
    assert {"train_gpt.py", "model.py", "nanojepa/objectives/span.py"} < set(start["sources"])
    for name, sha256 in start["sources"].items():
        source = (ROOT / name).read_bytes()
        assert hashlib.sha256(source).hexdigest() == sha256 and source.decode() in log

    rows = metrics_of(run_id)
    assert [row["step"] for row in rows if "val_loss" in row] == [4, 8]
    assert len([row for row in rows if "jepa_loss" in row]) == 8
    cfg = load_settings(train_gpt.Config, [f"--config={folder / 'config.yaml'}"], {}).config
    assert (cfg.jepa_lambda, cfg.num_layers, cfg.run_id) == (0.1, 3, "")  # to be used again
    assert result["steps"] == 8 and result["tokens"] == 8 * 256
    assert result["val_loss"] == rows[-1]["val_loss"]
    size = sum((ROOT / name).stat().st_size for name in start["sources"])
    assert result["artifact_bytes"] == (folder / "model.int8.zlib").stat().st_size + size
    assert result["fits_16mb"] and result["config"]["jepa_lambda"] == 0.1
    for key in ("val_bpb", "quantized_val_bpb", "train_seconds", "parameters", "seed"):
        assert result[key] is not None, key
    assert result["peak_memory_bytes"] > 1e6 and result["data_sha256"]


def test_off_run_has_no_jepa_loss_and_matches_a_run_without_any_variable(train, run_id):
    first = train(f"--run_id={run_id}-1")
    second = train(f"--run_id={run_id}-2", JEPA_LAMBDA="0")

    def losses(lines):
        return re.findall(r"_loss:\S+|val_bpb:\S+", "\n".join(lines))

    assert losses(first) == losses(second) != [] and "jepa_loss:" not in "".join(first)


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_layers=1", "--num_kv_heads=4", "--tie_embeddings=1", "--value_embed=0"],
        ["--jepa_distance=infonce", "--jepa_lambda=0.1"],
        ["--dtype=bfloat16", "--jepa_lambda=0.1", "--jepa_layer=0", "--jepa_spans=2"],
    ],
)
def test_other_shapes_of_a_run(train, run_id, flags):
    train(f"--run_id={run_id}", *flags)
    assert result_of(run_id)["val_loss"] < math.log(300)


def test_generated_artifact_evaluates_as_reported(train, data_path, run_id):
    train(f"--run_id={run_id}")
    run, folder, result = make_run(data_path), ROOT / "logs" / run_id, result_of(run_id)
    states = {
        "val_loss": load_tensors(folder / "model.safetensors"),
        "quantized_val_loss": dequantize((folder / "model.int8.zlib").read_bytes()),
    }
    for key, state in states.items():
        run.model.load_state_dict(state)
        scores = train_gpt.evaluate(run, MemoryLog())
        assert scores.val_loss == pytest.approx(result[key], rel=1e-6)
    assert np.isclose(scores.val_bpb, result["quantized_val_bpb"])
    assert abs(result["val_loss"] / result["quantized_val_loss"] - 1) > 1e-9


def test_an_objective_s_own_weights_are_left_beside_the_model_s(train, run_id):
    train(f"--run_id={run_id}", "--jepa_lambda=0.5", "--jepa_predictor=linear")
    folder = ROOT / "logs" / run_id
    (weight,) = load_tensors(folder / "objective.safetensors").values()
    assert weight.shape == (32, 32) and not torch.equal(weight, torch.eye(32))
    names = load_tensors(folder / "model.safetensors").keys()
    assert not any("predictor" in name for name in names)


def test_init_from_starts_with_those_weights(train, run_id):
    first, second = f"{run_id}-1", f"{run_id}-2"
    start = f"--init_from={ROOT / 'logs' / first}"
    train(f"--run_id={first}")
    train(f"--run_id={second}", "--iterations=1", start, *FROZEN)
    assert result_of(second)["val_loss"] == result_of(first)["val_loss"]
    other = f"--run_id={run_id}-3"
    assert "use that run's config.yaml" in refused(train, other, start, "--model_dim=64")
    assert "does not exist" in refused(train, other, "--init_from=logs/none")


def test_foreign_shards_whose_marker_is_outside_the_vocabulary_still_end_well(
    train, tmp_path, run_id
):
    for split in ("train", "val"):
        write_shard(tmp_path / f"x_{split}_000000.bin", np.arange(2000) % 250)
    ranks = tmp_path / "bytes.tiktoken"
    write_ranks(ranks, [bytes([i]) for i in range(256)])
    lines = train(f"--data_path={tmp_path}", f"--run_id={run_id}", f"--tokenizer={ranks}")
    assert any("no text sample" in line for line in lines) and result_of(run_id)["val_bpb"] > 0


# ---- what is refused


def test_a_run_id_is_never_overwritten(train, run_id):
    folder = ROOT / "logs" / run_id
    folder.mkdir(parents=True)
    assert "never overwritten" in refused(train, f"--run_id={run_id}")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--train_batch_tokens=250"],
            "TRAIN_BATCH_TOKENS=250 must be a multiple of ranks x GRAD_ACCUM_STEPS x "
            "TRAIN_SEQ_LEN = 1 x 1 x 32",
        ),
        (["--grad_accum_steps=3"], "1 x 3 x 32"),
        (["--num_heads=5"], "num_heads=5"),
        (["--data_path=/nowhere"], "DATA_PATH=/nowhere"),
        (["--jepa_layer=3"], "JEPA_LAYER=3"),
        (["--vocab_size=200"], "VOCAB_SIZE=200: the tokens of"),
        (["--jepa_lamda=1"], "unknown argument --jepa_lamda=1; did you mean jepa_lambda?"),
    ],
)
def test_bad_input_is_one_line(train, run_id, flags, message):
    assert message in refused(train, f"--run_id={run_id}", *flags)
    assert not (ROOT / "logs" / run_id).exists()


def test_a_run_that_diverges_says_so_in_its_log_too(train, run_id):
    message = refused(train, f"--run_id={run_id}", "--embed_lr=1e38", "--head_lr=1e38")
    log = (ROOT / "logs" / run_id / "log.txt").read_text()
    assert "non-finite " in message and "step:1/8 train_loss:" in log
    assert log.splitlines()[-1] == message


# ---- other processes


@pytest.mark.slow
def test_an_error_is_one_line_and_the_exit_status_1(data_path, run_id):
    done = run_cli(data_path, f"--run_id={run_id}", "--num_heads=5")
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "num_heads=5" in line


@pytest.mark.slow
def test_two_ranks_refuse_an_uneven_batch_once(data_path, run_id):
    done = run_cli(data_path, f"--run_id={run_id}", "--train_batch_tokens=96", ranks=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and "2 x 1 x 32" in errors[0]


@pytest.mark.slow
def test_the_preset_for_gpus_trains_scaled_down_on_two_ranks(data_path, run_id):
    """Its tied head of 50,304 rows and its validations, with less width and length."""
    preset = f"--config={ROOT}/configs/fineweb_124m.yaml"
    small = {"model_dim": 48, "num_layers": 2, "train_seq_len": 64, "train_batch_tokens": 1024}
    small |= {"iterations": 4, "val_loss_every": 2, "val_tokens": 0, "grad_accum_steps": 2}
    given = {**load_settings(train_gpt.Config, [preset]).config.__dict__, **small}
    flags = [f"--{name}={value}" for name, value in given.items() if name in TINY or name in small]
    curves = []
    for ranks in (0, 2):
        own = f"--run_id={run_id}-{ranks}"
        more = ["--jepa_lambda=0.1", "--dtype=float32", "--compile=0", "--train_log_every=1"]
        done = run_cli(
            data_path, preset, *flags, *more, f"--data_path={data_path}", own, ranks=ranks
        )
        assert done.returncode == 0, done.stderr
        assert result_of(f"{run_id}-{ranks}")["parameters"] > 50_304 * 48
        rows = metrics_of(f"{run_id}-{ranks}")
        curves.append([row["train_loss"] for row in rows if "train_loss" in row])
    assert len(curves[0]) == 4 and curves[1] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.slow
def test_without_a_compiler_the_run_goes_on_uncompiled(data_path, run_id, tmp_path):
    cache = str(tmp_path / "cache")
    environ = {"CXX": "/no/compiler", "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": cache}
    flags = [f"--run_id={run_id}", "--compile=1", "--iterations=2"]
    done = run_cli(data_path, *flags, env=environ)
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work here" in done.stdout
    assert result_of(run_id)["compiled"] is False


@pytest.mark.slow
def test_wandb_offline_works_without_a_login(data_path, run_id):
    pytest.importorskip("wandb")
    environ = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = run_cli(data_path, f"--run_id={run_id}", "--wandb=1", env=environ)
    assert done.returncode == 0, done.stderr
    assert list((ROOT / "logs" / run_id / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_a_run_on_existing_shards_loads_no_extra(data_path, run_id):
    """What fine-tuning, studies and downloads need is made impossible to import."""
    others = (
        "datasets wandb transformers peft accelerate scipy statsmodels pandas matplotlib pytest"
    )
    blocked = f"import sys; sys.modules.update(dict.fromkeys({others.split()}))"
    settings = {**TINY, "data_path": data_path, "run_id": run_id, "iterations": 2}
    argv = ["train_gpt.py", *(f"--{k}={v}" for k, v in settings.items())]
    code = f"{blocked}; sys.argv = {argv}; import train_gpt; train_gpt.main()"
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert result_of(run_id)["val_bpb"] > 0


# ---- GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ranks", [0, 1])
def test_gpu_run_compiled_in_bfloat16_agrees_with_the_cpu(data_path, run_id, ranks):
    flags, gpu, cpu = ["--jepa_lambda=0.1", "--iterations=20"], f"{run_id}-gpu", f"{run_id}-cpu"
    fast = [*flags, f"--run_id={gpu}", "--compile=1", "--dtype=bfloat16"]
    done = [
        run_cli(data_path, *fast, ranks=ranks),
        run_cli(data_path, *flags, f"--run_id={cpu}", env={"CUDA_VISIBLE_DEVICES": ""}),
    ]
    assert all(d.returncode == 0 for d in done), done[0].stderr + done[1].stderr
    # bfloat16 keeps 8 bits: 0.4% of each activation, over 20 steps of training.
    assert result_of(gpu)["val_loss"] == pytest.approx(result_of(cpu)["val_loss"], rel=0.02)
