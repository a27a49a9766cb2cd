"""python bench.py gpu: what a GPU does with all of this, in under ten minutes and one command.

It runs the tests marked cuda, then times pretraining and fine-tuning, each after the account's
prediction. Every part is a process of its own, so one that fails costs itself alone. Its output is
kept in the folder, and its last line in the table.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from nanojepa.corpora import EMBEDDED
from nanojepa.files import shown, write_whole
from nanojepa.runlog import describe_machine, project_sources

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 590  # of all parts together
GPT_124M = (
    "--data_path data/stdlib --vocab_size 50304 --num_layers 12 --model_dim 768 --num_heads 6 "
    "--num_kv_heads 6 --tie_embeddings 1 --value_embed 0 --train_seq_len 1024 "
    "--train_batch_tokens 65536 --val_tokens 65536"
)
PAIRS_FOLDER = "data/nlregex"
PAIRS = GPT_124M.replace("data/stdlib", PAIRS_FOLDER) + " --jepa_objective pair"
TUNED = (
    "--finetune --train_file data/nlregex/train.jsonl --output_dir {folder}/out --pretrain true "
    "--predictors 1 --micro_batch_tokens 8192 --gradient_checkpointing true"
)
ONE_B = TUNED + " --batch_size 16 --model_name {folder}/1b"
EIGHT_B = TUNED + " --batch_size 8 --lora true --model_name {folder}/8b"
LLAMA_1B = (2048, 8192, 16, 32, 8)  # width, MLP, layers, query heads, key/value heads
LLAMA_8B = (4096, 14336, 32, 32, 8)


class Part(NamedTuple):
    name: str
    command: str
    seconds: int  # after which it is stopped


PARTS = (
    Part("tests", "-m pytest -q -m cuda", 100),
    Part("pretraining 124M, predicted", f"bench.py --account {{card}} {GPT_124M}", 60),
    Part("pretraining 124M", f"bench.py --rounds 6 {GPT_124M}", 200),
    Part("pairs 124M", f"bench.py --rounds 6 {PAIRS}", 120),
    Part("1B, predicted", f"bench.py --account {{card}} {ONE_B}", 60),
    Part("1B", f"bench.py --rounds 4 {ONE_B}", 100),
    Part("8B LoRA, predicted", f"bench.py --account {{card}} {EIGHT_B}", 60),
    Part("8B LoRA", f"bench.py --rounds 3 {EIGHT_B}", 150),
)


def bench_gpu():
    """Run all parts; their output, table.md and result.json are left in logs/gpu-<time>."""
    if not torch.cuda.is_available():
        raise ValueError("gpu: there is no CUDA device here")
    folder = ROOT / "logs" / time.strftime("gpu-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    make_models(folder)
    card = "h200" if "H200" in torch.cuda.get_device_name() else "h100"
    rows = run_parts(PARTS, folder, card, SECONDS)
    passed = sum(row["exit"] == 0 for row in rows)
    print(f"result: {passed} of {len(PARTS)} parts -> {shown(folder)}")


def run_parts(parts, folder, card, seconds):
    """Run the parts within so many seconds; returns a dict for each that was begun.

    table.md and result.json are written anew after each part. card: a key of GPUS.
    """
    rows, end = [], time.perf_counter() + seconds
    machine = describe_machine(project_sources(ROOT))
    for part in parts:
        left = end - time.perf_counter()
        if left < 10:
            print(f"no time is left for: {part.name}")
            continue
        began, file = time.perf_counter(), folder / f"{part.name.replace(' ', '-')}.txt"
        command = part.command.format(folder=folder, card=card)
        status = run_part(command, file, min(part.seconds, left))
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in lines if line.strip()]
        spent, last = time.perf_counter() - began, lines[-1] if lines else ""
        print(f"{part.name} ({spent:.0f} s): {last}", flush=True)
        rows.append({"part": part.name, "exit": status, "seconds": spent, "output": lines})
        table = ["| part | exit | result |", "|---|---|---|"]
        table += [f"| {r['part']} | {r['exit']} | {''.join(r['output'][-1:])} |" for r in rows]
        write_whole(folder / "table.md", ("\n".join(table) + "\n").encode())
        result = {"machine": machine, "parts": rows}
        write_whole(folder / "result.json", json.dumps(result, indent=1).encode())
    return rows


def run_part(command, file, seconds):
    """The exit status of a command of this Python, whose output goes to a file."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with open(file, "w", encoding="utf-8") as out:
        try:
            return subprocess.run(
                [sys.executable, *shlex.split(command)],
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                env=environment,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            out.write(f"\nstopped after {seconds:.0f} s\n")
            return "stopped"


# ---- models without weights, and data, that need no network


def make_models(folder):
    """Make folders 1b and 8b of Llamas without weights, and the embedded pairs if missing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    data = ROOT / PAIRS_FOLDER
    if not data.exists():
        EMBEDDED[PAIRS_FOLDER](data)
    text = (data / "train.jsonl").read_text(encoding="utf-8")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(text.splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for name, sizes in (("1b", LLAMA_1B), ("8b", LLAMA_8B)):
        names = ("hidden_size", "intermediate_size", "num_hidden_layers")
        names += ("num_attention_heads", "num_key_value_heads")
        config = LlamaConfig(vocab_size=128_256, **dict(zip(names, sizes, strict=True)))
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
