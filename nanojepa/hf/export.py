"""Checkpoints and the trained model: sealed folders, written whole and checked when read.

What writing them will need is tried before the training.
"""

import math
import os
import re
import shutil
from pathlib import Path

from nanojepa.files import SEAL, check_seal, one_line, seal_folder, sync_folder, write_whole
from nanojepa.hf.model import OBJECTIVE
from nanojepa.weights import OBJECTIVE_FILE, save_weights

UNFINISHED = "checkpoint.part"
CHECKPOINT = re.compile("checkpoint-([0-9]+)")


# ---- before the training


def check_folder(folder):
    """Make the output folder; ValueError if nothing can be written into it."""
    probe = folder / f"{UNFINISHED}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(probe, b"1")
        probe.unlink()
    except OSError as e:
        raise ValueError(
            f"training.output_dir={folder}: nothing can be written there ({e.strerror}); choose "
            "another"
        ) from None


def check_room(trainer):
    """ValueError if the disk has no room for the checkpoints and the trained model."""
    args, model = trainer.args, trainer.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    checkpoint = 2 * trained  # two moments, as Adam keeps
    checkpoint += trained if trainer.cfg.model.use_lora else weights
    # The newest is written before the oldest is removed.
    kept = min(args.save_total_limit + 1, math.ceil(count_saves(trainer)))
    needed, free = weights + kept * checkpoint, shutil.disk_usage(args.output_dir).free
    if needed > free:
        raise ValueError(
            f"training.output_dir={args.output_dir}: {free / 1e9:.1f} GB are free, and {kept} "
            f"checkpoints and the model take {needed / 1e9:.1f} GB; make room, choose another "
            "disk, or lower training.save_total_limit"
        )


def count_saves(trainer):
    """How many checkpoints a run writes."""
    args = trainer.args
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = math.ceil(len(trainer.train_dataset) / step) * args.num_train_epochs
    steps = args.max_steps if args.max_steps > 0 else steps
    return steps / args.save_steps if args.save_strategy == "steps" else args.num_train_epochs


# ---- checkpoints


def checkpoints(folder):
    """{step: its checkpoint} of a folder, the oldest first."""
    named = ((CHECKPOINT.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint-*"))
    return dict(sorted((int(name[1]), path) for name, path in named if name and path.is_dir()))


def publish_checkpoint(folder, step, keep):
    """Seal the checkpoint of this step and give it its name; then remove all but `keep` of them."""
    part = folder / UNFINISHED
    whole = folder / f"checkpoint-{step}"
    seal_folder(part / whole.name)
    shutil.rmtree(whole, ignore_errors=True)  # damaged, or of a step that is done again
    os.rename(part / whole.name, whole)
    shutil.rmtree(part, ignore_errors=True)
    sync_folder(folder)
    older = [path for number, path in checkpoints(folder).items() if number <= step]
    for path in older[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(folder, resume, say):
    """The checkpoint to continue from, or None; resume: as training.resume."""
    found = list(checkpoints(folder).values())
    if found and not resume:
        raise ValueError(
            f"training.output_dir={folder} holds checkpoints; set training.resume: auto to "
            "continue, choose another, or remove it"
        )
    if resume and resume != "auto":
        check_checkpoint(Path(resume))
        return Path(resume)
    for path in reversed(found):
        try:
            check_checkpoint(path)
            return path
        except ValueError as e:
            say(f"warning: damaged checkpoint: {e}; trying the one before it")
            fault = e
    if found:
        raise ValueError(
            f"{fault}; no checkpoint of this run is whole: remove {folder} to begin again at step 0"
        )
    return None


def check_checkpoint(path):
    """ValueError if a checkpoint is not whole."""
    if not (path / SEAL).exists():
        raise ValueError(
            f"{path}: no {SEAL}, so it is no checkpoint, or not a finished one; "
            "give another training.resume, or auto"
        )
    check_seal(path)


# ---- the trained model


def save_model(trainer):
    """write_model(), whose failure says where the weights are."""
    try:
        write_model(trainer)
    except Exception as e:  # of many kinds, as the libraries that write the files
        folder = trainer.args.output_dir
        where = list(checkpoints(folder).values())
        kept = f"its weights are in {where[-1]}" if where else "it has no checkpoint"
        raise ValueError(f"{folder}: the model can't be saved ({one_line(e)}); {kept}") from None


def write_model(trainer):
    """Save the model as a folder that from_pretrained loads, adapters merged.

    Of a sharded model with adapters these alone are saved. The files are written and sealed in a
    folder of their own, since the output folder may hold files of others, and those may change.
    """
    cfg, folder = trainer.cfg, Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    sharded = cfg.training.fsdp
    state = trainer.accelerator.get_state_dict(trainer.model) if sharded else None
    if not trainer.is_world_process_zero():
        return
    part = folder / "model.part"
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir()
    if cfg.model.use_lora and not sharded:
        model = model.merge_and_unload()
    state = state or model.state_dict()
    own = take_objective(state)
    if own:
        save_weights(part / OBJECTIVE_FILE, own)
    model.config.use_cache = True
    model.generation_config.eos_token_id = trainer.chat.stop_tokens
    model.save_pretrained(part, state_dict=state)
    trainer.processing_class.save_pretrained(part)
    shutil.copy(folder / "config.yaml", part)
    seal_folder(part)
    files = [path for path in part.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda path: path.name == SEAL):  # the seal last
        place = folder / file.relative_to(part)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    shutil.rmtree(part)
    sync_folder(folder)


def take_objective(state):
    """Take the objective's weights out of a model's state dict; returns them by their own names."""
    own = {}
    for name in [name for name in state if OBJECTIVE in name.split(".")]:
        tensor = state.pop(name)
        _, inner = name.split(f"{OBJECTIVE}.")
        # Beside sharded adapters, peft keeps the weights as they were before the training.
        if not inner.startswith("original_module."):
            own[inner.removeprefix("modules_to_save.default.")] = tensor
    return own
