"""Checkpoints and the trained model: sealed folders, written whole and checked when read."""

import os
import re
import shutil
from pathlib import Path

from nanojepa.files import SEAL, check_seal, seal_folder, sync_folder
from nanojepa.hf.model import OBJECTIVE
from nanojepa.weights import OBJECTIVE_FILE, save_weights

UNFINISHED = "checkpoint.part"
CHECKPOINT = re.compile("checkpoint-([0-9]+)")


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
