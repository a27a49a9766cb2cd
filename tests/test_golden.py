"""Golden curves: 20 steps of each objective on a CPU, float32, one thread, as they were when somebody last looked. A change of numerics, in
Newton-Schulz or anywhere else, fails here; where it is meant, `python tests/test_golden.py` writes tests/golden.json anew.

Two CPUs differ by the order in which they add up. That command runs every curve with other vector instructions too (CAPABILITIES), which reorders sums as another
CPU would; a curve's tolerance is MARGIN times the largest difference it finds, since other CPUs are not just these, and at least FLOOR, 64 float32 roundings of a loss.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # run as a script
import train_gpt
from conftest import make_config, make_set, texts, train_in_process
from data.shards import prepare

FILE = Path(__file__).with_name("golden.json")
CAPABILITIES = ("default", "avx2", "avx512")  # of ATEN_CPU_CAPABILITY; oneDNN and MKL held to AVX2 with the first two
MARGIN, FLOOR = 20, 4e-6
RUNS = {"ntp": ("text", {}), "adamw": ("text", {"optimizer": "adamw"}), "span": ("text", {"jepa_lambda": 0.1}),
        "span_decoupled": ("text", {"jepa_lambda": 0.1, "jepa_update": "decoupled", "jepa_layer": 1}), "span_l2": ("text", {"jepa_lambda": 0.1, "jepa_distance": "l2", "jepa_start_frac": 0.25}),
        "pair": ("pairs", {"jepa_lambda": 0.1, "jepa_objective": "pair", "loss_on": "target"}), "pair_infonce": ("groups", {"jepa_lambda": 0.1, "jepa_objective": "pair", "jepa_distance": "infonce"}),
        "pair_mse_front": ("pairs", {"jepa_lambda": 0.1, "jepa_objective": "pair", "jepa_distance": "mse", "jepa_pred_position": "front", "jepa_predictor": "linear"})}
SLOW = {"matrix_lr": 0.004, "embed_lr": 0.06, "head_lr": 0.0008, "scalar_lr": 0.004, "adamw_lr": 0.0003}  # a tenth: at the default rates training itself amplifies rounding
TUNED = {"tuned_step": ["--step_jepa", "--predictors", "2"], "tuned_pair": ["--predictors", "1"], "tuned_span": ["--span"]}  # by finetune.py


def make_data(folder):
    """{kind: data folder}."""
    text = prepare(folder / "tiny", "tiny", lambda: iter(texts() * 4), source="conftest.py", licence="MIT", val_fraction=0.2, vocab_size=300)
    return {"text": str(text), **{kind: make_set(folder / kind, kind, longest=16) for kind in ("pairs", "groups")}}


def curve(folder, settings):
    """The losses of 20 steps, [[train_loss] or [train_loss, jepa_loss], ...]."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    _, log = train_in_process(make_config(folder, iterations=20, train_seq_len=64, **SLOW, **settings))
    return [[values["train_loss"], *([values["jepa_loss"]] if "jepa_loss" in values else [])] for _, values in log.rows if "train_loss" in values]


def tuned_curve(folder, flags):
    """The same of finetune.py on a tiny Llama and step-by-step answers."""
    import finetune
    import hf
    from config import load_sections
    torch.set_num_threads(1)
    questions = [("Be brief." if n % 3 else None, f"What is {n} + {n + 1}?" + " Say it." * (n % 4), f"First {n}.\n\nThen {2 * n + 1}{'!' * (n % 3)}\n\n#### {2 * n + 1}") for n in range(16)]
    data = hf.write_messages(folder / "questions.jsonl", questions)
    arguments = ["--model_name", hf.make_folder(folder / "llama", "llama"), "--train_file", data, "--output_dir", str(folder / "out"), "--dtype", "float32", "--batch_size", "4", "--grad_accum", "1",
                 "--num_epochs", "5", "--learning_rate", "1e-3", "--lbd", "0.1", *flags]
    trainer = finetune.make_trainer(load_sections(finetune.Config, arguments, finetune.ALIASES)[0], say=lambda line: None)
    trainer.args.save_strategy, trainer.args.logging_steps = "no", 1
    trainer.train()
    return [[line["ce_loss"], line["jepa_loss"]] for line in trainer.state.log_history if "ce_loss" in line]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("golden"))


def difference(a, b):
    """The largest difference between two curves, relative to losses above 1."""
    return max(abs(x - y) / max(abs(y), 1) for own, old in zip(a, b, strict=True) for x, y in zip(own, old, strict=True))


def compare(name, found):
    golden = json.loads(FILE.read_text())[name]
    assert len(found) == 20
    assert difference(found, golden["losses"]) <= golden["tolerance"], f"{name}: the numbers changed; if that is meant: python tests/test_golden.py"


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_are_those_of_the_golden_curve(data, name):
    kind, settings = RUNS[name]
    compare(name, curve(data[kind], settings))


@pytest.mark.parametrize("name", TUNED)
def test_twenty_fine_tuning_steps_are_those_of_the_golden_curve(tmp_path, name):
    compare(name, tuned_curve(tmp_path, TUNED[name]))


@pytest.mark.parametrize("name", ["ntp", "span", "pair"])
def test_a_small_change_of_numerics_fails(data, monkeypatch, name):
    """Muon's updates a thousandth longer."""
    original, (kind, settings) = train_gpt.orthogonalize, RUNS[name]
    monkeypatch.setattr(train_gpt, "orthogonalize", lambda g: original(g) * 1.001)
    with pytest.raises(AssertionError, match="the numbers changed"):
        compare(name, curve(data[kind], settings))


def all_curves():
    """{name: curve} of this process."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        made = make_data(folder)
        found = {name: curve(made[kind], settings) for name, (kind, settings) in RUNS.items()}
        for name, flags in TUNED.items():
            (folder / name).mkdir()
            found[name] = tuned_curve(folder / name, flags)
    return found


def update():
    found = []
    for capability in CAPABILITIES:
        held = {} if capability == "avx512" else {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
        done = subprocess.run([sys.executable, __file__, "--one"], env={**os.environ, **held, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    golden = {name: {"tolerance": float(f"{max(FLOOR, *(MARGIN * difference(other[name], losses) for other in found)):.1e}"), "losses": losses} for name, losses in found[-1].items()}
    FILE.write_text("{\n" + ",\n".join(f' "{name}": {json.dumps(values)}' for name, values in golden.items()) + "\n}\n")
    print("\n".join(f"{name}: tolerance {values['tolerance']}" for name, values in golden.items()), f"result: {FILE}", sep="\n")


if __name__ == "__main__":
    print(json.dumps(all_curves())) if sys.argv[1:] == ["--one"] else update()
