"""What saving and logging will need is tried before training; what fails after costs no weights."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, Trainer

import hf
from conftest import ROOT, TINY
from nanojepa import runlog
from nanojepa.hf import export, run, settings
from nanojepa.settings import load_settings


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """The flags of a short run, whose training says so when it begins."""
    began, real = [], Trainer.train

    def train(self, *args, **options):
        began.append(True)
        return real(self, *args, **options)

    monkeypatch.setattr(Trainer, "train", train)
    folder = hf.make_folder(tmp_path / "model", "llama")
    data = hf.write_messages(tmp_path / "t.jsonl", hf.QUESTIONS[:4])
    flags = ["--model_name", folder, "--train_file", data, "--output_dir", str(tmp_path / "out")]
    flags += ["--dtype", "float32", "--batch_size", "2", "--grad_accum", "1", "--num_epochs", "1"]
    return tmp_path, flags, began


def start(flags):
    loaded = load_settings(settings.Config, flags, aliases=settings.ALIASES)
    return run.run(loaded.config, loaded.origin)


# ---- before


def test_generation_settings_that_sample_without_saying_so_are_saved(setup, capsys):
    folder, flags, _ = setup
    config = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (folder / "model" / "generation_config.json").write_text(json.dumps(config))
    start(flags)
    assert "but not do_sample; saved with it" in capsys.readouterr().out
    saved = GenerationConfig.from_pretrained(folder / "out")
    assert saved.do_sample and (saved.temperature, saved.top_p) == (0.9, 0.6)


def test_generation_settings_that_no_model_is_saved_with_are_refused_before(setup):
    folder, flags, began = setup
    (folder / "model" / "generation_config.json").write_text('{"length_penalty": 2.0}')
    with pytest.raises(ValueError, match="generation_config.json can't be saved.*mend it") as e:
        start(flags)
    assert not began and "\n" not in str(e.value)


def test_a_folder_that_cannot_be_written_is_refused_before(setup):
    folder, flags, began = setup
    (folder / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir=.*file/out: nothing can be written"):
        start([*flags, "--output_dir", str(folder / "file" / "out")])
    assert not began


@pytest.mark.parametrize("flags", [[], ["--save_steps", "1"], ["--lora"]], ids=str)
def test_a_disk_without_room_is_refused_before(setup, monkeypatch, flags):
    """There is a byte too little, and then just enough: nothing but what is written counts."""
    folder, own, began = setup
    usage = namedtuple("usage", "total used free")
    free = [0]
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage(0, 0, free[0]))
    with pytest.raises(
        ValueError, match=r"0.0 GB are free, and \d checkpoint.*lower training.save"
    ):
        start([*own, *flags])
    assert not began
    free[0] = 2**40
    start([*own, *flags])
    checkpoints = export.checkpoints(folder / "out").values()
    needed = sum(
        (path / name).stat().st_size
        for path in [folder / "out", *checkpoints]
        for name in ("model.safetensors", "optimizer.pt", "adapter_model.safetensors")
        if (path / name).exists()
    )
    shutil.rmtree(folder / "out")
    free[0] = int(0.9 * needed)
    with pytest.raises(ValueError, match="make room"):
        start([*own, *flags])


def test_a_service_without_a_login_is_one_line_and_leaves_the_run_id_free(
    setup, monkeypatch, tmp_path
):
    wandb = pytest.importorskip("wandb")

    def refuse(**options):
        raise wandb.errors.UsageError("api_key not configured (no-tty).\nCall wandb.login()")

    monkeypatch.setattr(wandb, "init", refuse)
    _, flags, began = setup
    with pytest.raises(ValueError, match="Weights & Biases: api_key not.*WANDB_MODE=offline") as e:
        start([*flags, "--wandb"])
    assert not began and "\n" not in str(e.value)

    class Cfg:
        wandb, resume, run_id = True, "", "r"

    monkeypatch.setattr(runlog, "as_dict", lambda cfg: {})
    for _ in range(2):  # the second try meets no folder of the first
        with pytest.raises(ValueError, match="Weights & Biases"):
            runlog.RunLog(tmp_path / "logs" / "r", Cfg, {}, 0, {})
    assert not (tmp_path / "logs" / "r").exists()


@pytest.mark.slow
def test_a_run_without_a_login_ends_in_one_line_and_can_be_started_again(
    data_path, run_id, tmp_path
):
    pytest.importorskip("wandb")
    unset = ("WANDB_MODE", "WANDB_API_KEY")
    environ = {k: v for k, v in os.environ.items() if k not in unset} | {"HOME": str(tmp_path)}
    values = {**TINY, "data_path": data_path, "run_id": run_id, "iterations": 2}
    command = [sys.executable, "train_gpt.py", *(f"--{k}={v}" for k, v in values.items())]
    options = dict(cwd=ROOT, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    done = subprocess.run([*command, "--wandb=1"], **options)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert sum(line.startswith("error: Weights & Biases") for line in done.stderr.splitlines()) == 1
    assert subprocess.run(command, **options).returncode == 0
    assert (ROOT / "logs" / run_id / "result.json").exists()


# ---- after


def test_a_model_that_cannot_be_saved_leaves_its_weights_in_a_checkpoint(setup, monkeypatch):
    folder, flags, began = setup

    def fail(trainer):
        raise SafetensorError("no space\nleft")

    monkeypatch.setattr(export, "write_model", fail)
    with pytest.raises(
        ValueError, match=r"can't be saved \(no space left\); its weights are in .*"
    ) as e:
        start(flags)
    where = str(e.value).rpartition(" ")[2]
    assert began and load_file(f"{where}/model.safetensors")


def test_a_checkpoint_that_cannot_be_written_costs_itself(setup, monkeypatch, capsys):
    folder, flags, _ = setup
    real, tries = Trainer._save_checkpoint, []

    def save(self, *args):
        tries.append(self.state.global_step)
        if len(tries) == 1:
            raise OSError(28, "No space left on device")
        return real(self, *args)

    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    result = start([*flags, "--save_steps", "1"])
    assert "warning: no checkpoint at step 1 ([Errno 28] No space" in capsys.readouterr().out
    assert result["steps"] == 2 and tries == [1, 2]
    assert list(export.checkpoints(folder / "out")) == [2]
    assert not (folder / "out" / export.UNFINISHED).exists()


def test_a_failing_evaluation_comes_after_the_weights(setup, monkeypatch):
    folder, flags, _ = setup
    data = flags[flags.index("--train_file") + 1]

    def fail(self, *args, **options):
        raise MemoryError

    monkeypatch.setattr(run.JepaTrainer, "evaluate", fail)
    with pytest.raises(MemoryError):
        start([*flags, "--eval_file", data, "--eval_steps", "100"])
    AutoModelForCausalLM.from_pretrained(folder / "out")


def test_a_service_that_fails_in_a_run_costs_no_step(tmp_path, monkeypatch):
    class Cfg:
        wandb, resume, run_id, iterations = False, "", "r", 9

    monkeypatch.setattr(runlog, "non_defaults", lambda cfg, origin: [])

    class Service:
        def log(self, row, step):
            raise RuntimeError("run is finished")

    monkeypatch.setattr(runlog, "as_dict", lambda cfg: {})
    log = runlog.RunLog(tmp_path / "r", Cfg, {}, 0, {})
    log.wandb = Service()
    log.metrics(1, 0.1, {"train_loss": 1.0})
    log.metrics(2, 0.2, {"train_loss": 1.0})
    assert (tmp_path / "r" / "log.txt").read_text().count("the run goes on without it") == 1
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 2
