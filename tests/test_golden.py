"""Golden curves: 20 steps of each objective on a CPU, float32, one thread.

A change of numerics, in Newton-Schulz or anywhere else, fails here. If it is meant,
`python tests/test_golden.py` writes tests/golden.json anew.

Two CPUs differ by the order in which they add up. That command runs every curve with other vector
instructions too (CAPABILITIES), which reorders sums as another CPU would. A curve's tolerance is
MARGIN times the largest difference that it finds, since other CPUs are not just these, and at
least FLOOR, 64 float32 roundings of a loss.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import hf
from conftest import make_set, make_text, train_in_process
from nanojepa import muon

FILE = Path(__file__).with_name("golden.json")
# Of ATEN_CPU_CAPABILITY; with the first two, oneDNN and MKL are held to AVX2.
CAPABILITIES = ("default", "avx2", "avx512")
MARGIN, FLOOR = 20, 4e-6
PAIR = {"jepa_lambda": 0.1, "jepa_objective": "pair"}
RUNS = {
    "ntp": ("text", {}),
    "adamw": ("text", {"optimizer": "adamw"}),
    "span": ("text", {"jepa_lambda": 0.1}),
    "span_l2": ("text", {"jepa_lambda": 0.1, "jepa_distance": "l2", "jepa_start_frac": 0.25}),
    "future": ("pairs", {"jepa_lambda": 0.5, "jepa_objective": "future"}),
    "mtp": ("text", {"jepa_lambda": 0.5, "jepa_objective": "mtp"}),
    "pair": ("pairs", {**PAIR, "loss_on": "target"}),
    "pair_infonce": ("groups", {**PAIR, "jepa_distance": "infonce"}),
    "pair_mse_front": (
        "pairs",
        {
            **PAIR,
            "jepa_distance": "mse",
            "jepa_pred_position": "front",
            "jepa_predictor": "linear",
        },
    ),
}
# A tenth of the defaults, at which training itself amplifies rounding.
SLOW_RATES = {
    "matrix_lr": 0.004,
    "embed_lr": 0.06,
    "head_lr": 0.0008,
    "scalar_lr": 0.004,
    "adamw_lr": 0.0003,
}
TUNED = {  # by finetune.py
    "tuned_step": ["--step_jepa", "--predictors", "2"],
    "tuned_pair": ["--predictors", "1", "--views", "prefix"],
    "tuned_span": ["--span"],
}


def make_data(folder):
    """{kind: data folder}."""
    sets = {kind: make_set(folder / kind, kind, longest=16) for kind in ("pairs", "groups")}
    return {"text": make_text(folder / "tiny"), **sets}


def curve(folder, settings):
    """The losses of 20 steps, [[train_loss] or [train_loss, jepa_loss], ...]."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    log = train_in_process(folder, iterations=20, train_seq_len=64, **SLOW_RATES, **settings)
    names = ("train_loss", "jepa_loss")
    rows = [values for _, values in log.rows if "train_loss" in values]
    return [[values[name] for name in names if name in values] for values in rows]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("golden"))


def difference(a, b):
    """The largest difference between two curves, relative to losses above 1."""
    rows = zip(a, b, strict=True)
    pairs = [(x, y) for own, old in rows for x, y in zip(own, old, strict=True)]
    return max(abs(x - y) / max(abs(y), 1) for x, y in pairs)


def compare(name, found):
    golden = json.loads(FILE.read_text())[name]
    assert len(found) == 20
    assert difference(found, golden["losses"]) <= golden["tolerance"], (
        f"{name}: the numbers changed; if that is meant: python tests/test_golden.py"
    )


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_are_those_of_the_golden_curve(data, name):
    kind, settings = RUNS[name]
    compare(name, curve(data[kind], settings))


@pytest.mark.parametrize("name", TUNED)
def test_twenty_fine_tuning_steps_are_those_of_the_golden_curve(tmp_path, name):
    compare(name, hf.tuned_curve(tmp_path, TUNED[name]))


@pytest.mark.parametrize("name", ["ntp", "span", "pair"])
def test_a_small_change_of_numerics_fails(data, monkeypatch, name):
    """Muon's updates a thousandth longer."""
    original, (kind, settings) = muon.orthogonalize, RUNS[name]
    monkeypatch.setattr(muon, "orthogonalize", lambda g: original(g) * 1.001)
    with pytest.raises(AssertionError, match="the numbers changed"):
        compare(name, curve(data[kind], settings))


def all_curves():
    """{name: curve} of this process."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        made = make_data(folder)
        curves = {name: curve(made[kind], settings) for name, (kind, settings) in RUNS.items()}
        for name, flags in TUNED.items():
            (folder / name).mkdir()
            curves[name] = hf.tuned_curve(folder / name, flags)
    return curves


def update():
    found = []
    for capability in CAPABILITIES:
        env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
        if capability != "avx512":
            env |= {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
        command = [sys.executable, __file__, "--one"]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    lines = []
    for name, losses in found[-1].items():
        largest = max(difference(other[name], losses) for other in found)
        tolerance = float(f"{max(FLOOR, MARGIN * largest):.1e}")
        lines.append(f' "{name}": {json.dumps({"tolerance": tolerance, "losses": losses})}')
        print(f"{name}: tolerance {tolerance}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"result: {FILE}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--one"]:
        print(json.dumps(all_curves()))
    else:
        update()
