"""bench.py times one step in all its layouts, and counts memory, FLOPs and the peak rightly."""

import json
import shlex
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import bench
import hf
import train_gpt
from conftest import CPU, TINY
from model import GPT, GPTConfig
from nanojepa import cards
from nanojepa.corpora import prepare_nlregex
from nanojepa.hf.run import make_trainer
from nanojepa.hf.settings import ALIASES, Config
from nanojepa.objectives import OBJECTIVES
from nanojepa.settings import load_settings


def test_flops_match_torch_s_counter():
    """torch counts attention as the full square, so all pairs are given as visible."""
    T, model = 16, GPT(GPTConfig(64, 3, 32, 4, 4, 2))
    zeros = torch.zeros(2, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(zeros, zeros).backward()
    assert counter.get_total_flops() == model.flops(2 * T, 2 * T * T)


def test_peak_memory_sees_a_large_tensor():
    peak = bench.peak_memory(lambda: torch.ones(1000, 1000).add(1).sum(), CPU, persistent=7)
    assert 7 + 8_000_000 <= peak < 7 + 8_100_000


@pytest.mark.parametrize("seconds_per_flop", [1e-9, 1e-13])
def test_the_peak_is_measured_in_bounded_time(monkeypatch, seconds_per_flop):
    """On a machine that emulates the dtype at 1 GFLOP/s, and on a fast one."""
    passed = []

    def multiply(compute, device):
        a, b = compute.args
        passed.append(2 * a.shape[0] ** 3 * seconds_per_flop)
        return passed[-1]

    monkeypatch.setattr(bench, "timed", multiply)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.empty(shape, device="meta"))
    peak = bench.matmul_peak(torch.bfloat16, CPU)
    assert peak == pytest.approx(1 / seconds_per_flop)
    assert sum(passed) < 1 and passed[-1] >= bench.PEAK_SECONDS


@pytest.fixture(scope="module")
def finetuning(tmp_path_factory):
    """Flags of finetune.py: a tiny model and its data."""
    folder = tmp_path_factory.mktemp("finetuning")
    return [
        f"--model_name={hf.make_folder(folder / 'model', 'llama')}",
        f"--train_file={hf.write_messages(folder / 'questions.jsonl', hf.QUESTIONS)}",
        f"--output_dir={folder / 'out'}",
        "--dtype=float32",
        "--max_length=256",
    ]


@pytest.mark.parametrize("length", [0, 160])
@pytest.mark.parametrize(
    "flags",
    [
        ["--predictors=1"],
        ["--step_jepa", "--predictors=2"],
        ["--views=prefix"],
        ["--jepa_mse", "--reverse_pred"],
    ],
    ids=" ".join,
)
def test_padded_rows_compute_the_packed_sums_of_fine_tuning(finetuning, flags, length):
    cfg = load_settings(Config, finetuning + flags, aliases=ALIASES).config
    trainer = make_trainer(cfg, say=lambda line: None)
    packed = bench.packed_sums(trainer, trainer.train_dataset, term=True)
    padded = bench.padded_sums(trainer, trainer.train_dataset, length)
    assert [x.item() for x in packed] == pytest.approx([x.item() for x in padded], rel=1e-4)


def run_bench(monkeypatch, capsys, *flags):
    """The lines that bench.py prints with these flags."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds=2", *flags])
    bench.main()
    return capsys.readouterr().out.splitlines()


def flags_of(data_path, compile=0):
    """Flags of train_gpt.py."""
    settings = {**TINY, "num_layers": 1, "data_path": data_path, "compile": compile}
    return [f"--{name}={value}" for name, value in settings.items()]


def names_of(lines):
    """The variants of the table, which the line of the result follows."""
    assert lines[-1].startswith("result: time over ")
    first = next(n for n, line in enumerate(lines) if line.startswith("variant "))
    return [line.split("  ")[0].strip() for line in lines[first + 1 : -1]]


def test_bench_of_text_has_a_line_for_each_objective(data_path, monkeypatch, capsys):
    lines = run_bench(monkeypatch, capsys, *flags_of(data_path))
    of_text = [name for name, objective in OBJECTIVES.items() if not objective.needs_pairs]
    assert names_of(lines) == ["off", *of_text, "off again"]
    assert any(line.startswith("matmul peak: ") for line in lines)


def test_bench_of_pairs_has_a_line_for_each_objective(folders, monkeypatch, capsys):
    """But for one of steps, which these pairs haven't."""
    lines = run_bench(monkeypatch, capsys, *flags_of(folders["pairs"]))
    others = [name for name in OBJECTIVES if name != "step"]
    assert names_of(lines) == ["off", *others, "off again"]


def test_a_variant_that_fails_is_left_out_and_the_first_one_must_not(capsys):
    def fail(n):
        raise RuntimeError("out of memory")

    costs = bench.measure({"off": lambda n: None, "large": fail}, 2, CPU, persistent=0)
    assert list(costs) == ["off"] and "large: left out: " in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.measure({"off": fail}, 2, CPU, persistent=0)


def test_bench_of_fine_tuning_has_packed_and_padded_lines(finetuning, monkeypatch, capsys):
    flags = ["--finetune", *finetuning, "--predictors=1"]
    lines = run_bench(monkeypatch, capsys, *flags)
    assert names_of(lines) == ["packed", "no term", "padded", "padded to 256"]


@pytest.mark.slow
def test_bench_compares_compiled_and_eager(data_path, monkeypatch, capsys):
    lines = run_bench(monkeypatch, capsys, *flags_of(data_path, compile=1))
    assert names_of(lines)[-1] == "eager"


# ---- bench.py gpu


def test_bench_gpu_needs_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.py", "gpu"])
    with pytest.raises(SystemExit, match="error: gpu: there is no CUDA device here"):
        bench.main()


def test_a_part_that_fails_or_hangs_costs_itself(tmp_path, capsys):
    parts = [
        cards.Part("fine", "-c \"print('a'); print('result: {card}')\"", 60),
        cards.Part("wrong", "-c 'raise SystemExit(\"error: no room\")'", 60),
        cards.Part("slow", "-c 'import time; print(1, flush=True); time.sleep(99)'", 2),
        cards.Part("fine again", "-c 'print(2)'", 60),
    ]
    rows = cards.run_parts(parts, tmp_path, "h100", seconds=100)
    assert [(row["exit"], row["output"][-1]) for row in rows] == [
        (0, "result: h100"),
        (1, "error: no room"),
        ("stopped", "stopped after 2 s"),
        (0, "2"),
    ]
    assert (tmp_path / "fine.txt").read_text() == "a\nresult: h100\n"
    assert (tmp_path / "table.md").read_text().splitlines()[-1] == "| fine again | 0 | 2 |"
    assert json.loads((tmp_path / "result.json").read_text())["parts"] == rows
    assert cards.run_parts(parts[:1], tmp_path, "h100", seconds=5) == []
    assert "no time is left for: fine" in capsys.readouterr().out


def test_the_parts_have_flags_that_their_scripts_take(tmp_path, monkeypatch):
    """Their models have the sizes that they are named after."""
    monkeypatch.setattr(cards, "EMBEDDED", {cards.PAIRS_FOLDER: prepare_nlregex})
    monkeypatch.setattr(cards, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    cards.make_models(tmp_path)
    for part in cards.PARTS[1:]:
        flags = shlex.split(part.command.format(folder=tmp_path, card="h100"))[1:]
        own, flags = bench.make_parser().parse_known_args(flags)
        if own.finetune:
            cfg = load_settings(Config, flags, aliases=ALIASES).config
            config = AutoConfig.from_pretrained(cfg.model.name)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            billions = sum(p.numel() for p in model.parameters()) / 1e9
            assert round(billions) == int(cfg.model.name[-2])
        else:
            load_settings(train_gpt.Config, flags, {})
