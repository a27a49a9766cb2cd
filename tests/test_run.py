"""train_gpt.py as a user starts it: what it prints, what it leaves behind, how it refuses."""
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import loader
import train_gpt
from conftest import ROOT, MemoryLog, make_config, result_of, run_cli
from data import shards
from weights import dequantize, from_safetensors, quantize, to_safetensors

TRAIN_LINE = re.compile(r"^step:(\d+)/8 train_loss:(\d+\.\d{4})( jepa_loss:(\d+\.\d{4}))? train_time:\d+ms step_avg:\d+\.\d\dms$")
VAL_LINE = re.compile(r"^step:(\d+)/8 val_loss:(\d+\.\d{4}) val_bpb:(\d+\.\d{4}) train_time:\d+ms step_avg:\d+\.\d\dms$")


def one_line_error(done, message):
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], done.stderr


def test_a_run_prints_its_lines_and_leaves_its_files(data_path, run_id):
    done = run_cli(data_path, "--val_loss_every=4", f"--run_id={run_id}", env={"JEPA_LAMBDA": "0.1", "NUM_LAYER": "3"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("warning: environment variable NUM_LAYER ") for line in lines)
    trained = [m for m in map(TRAIN_LINE.match, lines) if m]
    validated = [m for m in map(VAL_LINE.match, lines) if m]
    assert [int(m[1]) for m in trained] == list(range(1, 9)) and all(m[4] for m in trained)
    assert [int(m[1]) for m in validated] == [4, 8]
    assert "config jepa_lambda: 0.1 (environment variable JEPA_LAMBDA)" in lines and "config seed: 1337 (default)" in lines
    assert lines[-1].startswith("result: val_loss:")

    folder, result = ROOT / "logs" / run_id, result_of(run_id)
    log = (folder / "log.txt").read_text()
    assert log.endswith("\n".join(lines) + "\n")  # console and log alike
    for name in train_gpt.SOURCES:
        assert (ROOT / name).read_text() in log
    assert f"torch {torch.__version__}" in log and "git commit: " in log
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "val_loss" in r] == [4, 8] and len([r for r in rows if "jepa_loss" in r]) == 8
    cfg, _, _ = train_gpt.load_config(train_gpt.Config, [f"--config={folder / 'config.yaml'}"], {})
    assert (cfg.jepa_lambda, cfg.num_layers, cfg.run_id) == (0.1, 3, "")  # to be used again
    for key in ("val_loss", "val_bpb", "quantized_val_bpb", "artifact_bytes", "train_seconds", "steps", "tokens", "parameters",
                "peak_memory_bytes", "seed", "config"):
        assert result[key] is not None, key
    assert result["steps"] == 8 and result["tokens"] == 8 * 256
    source = sum((ROOT / name).stat().st_size for name in train_gpt.SOURCES)
    assert result["artifact_bytes"] == (folder / "model.int8.zlib").stat().st_size + source


def test_off_run_has_no_jepa_loss_and_matches_a_run_without_any_variable(data_path, run_id):
    first = run_cli(data_path, f"--run_id={run_id}-1")
    second = run_cli(data_path, f"--run_id={run_id}-2", env={"JEPA_LAMBDA": "0"})
    losses = lambda done: re.findall(r"_loss:\S+|val_bpb:\S+", done.stdout)
    assert first.returncode == second.returncode == 0 and losses(first) == losses(second) and "jepa_loss:" not in first.stdout


def test_init_from_starts_with_those_weights(data_path, run_id):
    first, second = f"{run_id}-1", f"{run_id}-2"
    assert run_cli(data_path, f"--run_id={first}").returncode == 0
    frozen = [f"--{name}=0" for name in ("matrix_lr", "embed_lr", "head_lr", "scalar_lr")]
    done = run_cli(data_path, f"--run_id={second}", "--iterations=1", f"--init_from={ROOT / 'logs' / first}", *frozen)
    assert done.returncode == 0, done.stderr
    assert result_of(second)["val_loss"] == result_of(first)["val_loss"]
    one_line_error(run_cli(data_path, f"--run_id={run_id}-3", f"--init_from={ROOT / 'logs' / first}", "--model_dim=64"), "use that run's config.yaml")
    one_line_error(run_cli(data_path, f"--run_id={run_id}-3", "--init_from=logs/none"), "does not exist")


def test_a_run_id_is_never_overwritten(data_path, run_id):
    (ROOT / "logs" / run_id).mkdir(parents=True)
    one_line_error(run_cli(data_path, f"--run_id={run_id}"), "never overwritten")
    assert not list((ROOT / "logs" / run_id).iterdir())


@pytest.mark.parametrize("flags, message", [
    (["--train_batch_tokens=250"], "TRAIN_BATCH_TOKENS=250 must be a multiple of ranks x GRAD_ACCUM_STEPS x TRAIN_SEQ_LEN = 1 x 1 x 32"),
    (["--grad_accum_steps=3"], "1 x 3 x 32"),
    (["--num_heads=5"], "num_heads=5"),
    (["--data_path=/nowhere"], "DATA_PATH=/nowhere"),
    (["--jepa_layer=3"], "JEPA_LAYER=3"),
    (["--vocab_size=200"], "outside the vocabulary of 200"),
    (["--embed_lr=1e38", "--head_lr=1e38"], "non-finite "),
])
def test_bad_input_is_one_line(data_path, run_id, flags, message):
    done = run_cli(data_path, f"--run_id={run_id}", *flags)
    one_line_error(done, message)
    if "non-finite" in message:  # the log is kept, and says why it ends
        log = (ROOT / "logs" / run_id / "log.txt").read_text()
        assert "step:1/8 train_loss:" in log and "error: non-finite" in log.splitlines()[-1]


def test_two_ranks_refuse_an_uneven_batch_once(data_path, run_id):
    done = run_cli(data_path, f"--run_id={run_id}", "--train_batch_tokens=96", ranks=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1 and "2 x 1 x 32" in errors[0]
    assert "2 x 1 x 32" in done.stderr.split("Root Cause")[1]  # torchrun's own last words name it too


@pytest.mark.parametrize("flags", [["--num_layers=1", "--num_kv_heads=4", "--tie_embeddings=1", "--value_embed=0"], ["--jepa_distance=infonce", "--jepa_lambda=0.1"],
                                   ["--dtype=bfloat16", "--jepa_lambda=0.1", "--jepa_layer=0", "--jepa_spans=2"]])
def test_other_shapes_of_a_run(data_path, run_id, flags):
    done = run_cli(data_path, f"--run_id={run_id}", *flags)
    assert done.returncode == 0 and result_of(run_id)["val_loss"] < math.log(300), done.stderr


def test_without_a_compiler_the_run_goes_on_uncompiled(data_path, run_id, tmp_path):
    done = run_cli(data_path, f"--run_id={run_id}", "--compile=1", "--iterations=2",
                   env={"CXX": "/no/compiler", "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work here" in done.stdout and result_of(run_id)["compiled"] is False


def test_foreign_shards_whose_marker_is_outside_the_vocabulary_still_end_well(tmp_path, run_id):
    for split in ("train", "val"):
        shards.write_shard(tmp_path / f"x_{split}_000000.bin", np.arange(2000) % 250)
    ranks = tmp_path / "bytes.tiktoken"
    shards.write_ranks(ranks, [bytes([i]) for i in range(256)])
    done = run_cli(str(tmp_path), f"--run_id={run_id}", f"--tokenizer={ranks}")
    assert done.returncode == 0 and "no text sample" in done.stdout and result_of(run_id)["val_bpb"] > 0, done.stderr


def test_wandb_offline_works_without_a_login(data_path, run_id):
    pytest.importorskip("wandb")
    done = run_cli(data_path, f"--run_id={run_id}", "--wandb=1", env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    assert done.returncode == 0, done.stderr
    assert list((ROOT / "logs" / run_id / "wandb").glob("offline-run-*"))


def test_runs_on_existing_shards_with_torch_numpy_and_yaml_alone(data_path, run_id):
    """Every other dependency is made impossible to import."""
    others = ["tiktoken", "rustbpe", "datasets", "wandb", "tqdm", "safetensors", "huggingface_hub", "pytest", "hypothesis"]
    settings = [f"--{k}={v}" for k, v in {**make_config(data_path).__dict__, "run_id": run_id, "compile": 0, "iterations": 2}.items() if v != ""]
    code = (f"import sys; [sys.modules.__setitem__(name, None) for name in {others}]; sys.path.insert(0, {str(ROOT)!r});"
            f"sys.argv[1:] = {[s.replace('=True', '=1').replace('=False', '=0') for s in settings]}; import train_gpt; train_gpt.main()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert result_of(run_id)["val_bpb"] > 0


# ---- files


def random_state():
    torch.manual_seed(0)
    return {"embed.weight": torch.randn(300, 32), "blocks.0.mix": torch.tensor([1.0, 0.0]), "proj": torch.randn(64, 32) * torch.logspace(-9, 2, 64)[:, None],
            "zero": torch.zeros(40, 32)}


def test_safetensors_bytes_are_the_library_s():
    safetensors_torch = pytest.importorskip("safetensors.torch")
    state = {**random_state(), "half": torch.randn(3, 5).half(), "int": torch.randint(-128, 127, (7,), dtype=torch.int8), "bf": torch.randn(2).bfloat16()}
    blob = to_safetensors(state)
    for back in (safetensors_torch.load(blob), from_safetensors(blob), from_safetensors(safetensors_torch.save(state))):
        assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


def test_quantisation_error_is_half_a_step_of_each_row():
    state = random_state()
    back = dequantize(quantize(state))
    assert back.keys() == state.keys()
    for name, w in state.items():
        if w.dim() == 2:
            step = (w.abs().amax(1, keepdim=True) / 127).clamp(min=2**-24)
            # half a step, and the float16 rounding of the scale (2^-11 of 127 steps, more where it is subnormal: up to half of 2^-24)
            assert ((back[name] - w).abs() <= step * (0.5 + 127 * 2**-11) + 127 * 2**-25).all(), name
        else:
            assert torch.equal(back[name], w)


def test_generated_artifact_evaluates_as_reported(data_path, run_id):
    assert run_cli(data_path, f"--run_id={run_id}").returncode == 0
    cfg, result = make_config(data_path), result_of(run_id)
    data, share = loader.TokenData(cfg), train_gpt.divide_batch(cfg, 0, 1, torch.device("cpu"))
    model = train_gpt.build_model(cfg, data.vocab_size, share.device)
    for file, read, key in (("model.safetensors", from_safetensors, "val_loss"), ("model.int8.zlib", dequantize, "quantized_val_loss")):
        model.load_state_dict(read((ROOT / "logs" / run_id / file).read_bytes()))
        loss, bpb = train_gpt.evaluate(model, train_gpt.row_losses, data, share, MemoryLog())
        assert loss == pytest.approx(result[key], rel=1e-6)
    assert np.isclose(bpb, result["quantized_val_bpb"]) and not math.isclose(result["val_loss"], result["quantized_val_loss"], rel_tol=1e-9)
    shutil.rmtree(ROOT / "logs" / run_id)


# ---- GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ranks", [0, 1])
def test_gpu_run_compiled_in_bfloat16_agrees_with_the_cpu(data_path, run_id, ranks):
    flags = ["--jepa_lambda=0.1", "--iterations=20"]
    gpu = run_cli(data_path, f"--run_id={run_id}-gpu", "--compile=1", "--dtype=bfloat16", *flags, ranks=ranks)
    cpu = run_cli(data_path, f"--run_id={run_id}-cpu", *flags, env={"CUDA_VISIBLE_DEVICES": ""})
    assert gpu.returncode == cpu.returncode == 0, gpu.stderr + cpu.stderr
    # bfloat16 keeps 8 bits: 0.4% of each activation, over 20 steps of training
    assert result_of(f"{run_id}-gpu")["val_loss"] == pytest.approx(result_of(f"{run_id}-cpu")["val_loss"], rel=0.02)
