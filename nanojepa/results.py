"""What a finished run leaves behind: weights, the int8 artifact, a text sample, result.json."""

import json
import time

import torch

from nanojepa.device import peak_memory
from nanojepa.files import quoted, shown, write_whole
from nanojepa.runlog import project_sources
from nanojepa.weights import OBJECTIVE_FILE, dequantize, quantize, save_weights

ARTIFACT_LIMIT = 16_000_000  # bytes of weights and source, as parameter-golf's


def finish(run, evaluate, log, checkpoints, result, root):
    """Write weights and artifact, evaluate the artifact, and complete and write result.json.

    run: train_gpt.Run; evaluate(run, log) gives its scores; root: where the source lies.
    ValueError if a file can't be written; the numbers are printed all the same.
    """
    checkpoints.wait()
    state = {name: w.to("cpu", copy=True) for name, w in run.model.state_dict().items()}
    artifact = quantize(state)
    lost = save_artifacts(run, log.folder, artifact) if run.share.rank == 0 else None
    run.model.load_state_dict(dequantize(artifact))
    quantized = evaluate(run, log)
    run.model.load_state_dict(state)
    code_bytes = sum(len(path.read_bytes()) for path in project_sources(root).values())
    size = len(artifact) + code_bytes
    result |= {
        "quantized_val_loss": quantized.val_loss,
        "quantized_val_bpb": quantized.val_bpb,
        "artifact_bytes": size,
        "fits_16mb": size <= ARTIFACT_LIMIT,
        "tokens": result["steps"] * run.cfg.train_batch_tokens,
        "peak_memory_bytes": peak_memory(run.share.device),
        "total_seconds": time.perf_counter() - run.began,
    }
    if run.share.rank:
        return
    log.line(f"{'-' * 40} text sample\n{sample_text(run)}\n{'-' * 40}")
    write_result(run, log, checkpoints, result, lost)


def save_artifacts(run, folder, artifact):
    """Write the weights and the artifact; returns the OSError that prevented it, or None."""
    try:
        save_weights(folder / "model.safetensors", run.model.state_dict())
        own = {} if run.objective is None else run.objective.state_dict()
        if own:
            save_weights(folder / OBJECTIVE_FILE, own)
        write_whole(folder / "model.int8.zlib", artifact)
    except OSError as e:
        return e
    return None


def sample_text(run, tokens=120):
    """A text that the model writes, at temperature 0.8, or why there is none."""
    data = run.data
    if data.token_table is None or not 0 <= data.doc_token < data.vocab_size:
        return "no text sample: the tokenizer or the document marker is unknown"
    generator = torch.Generator().manual_seed(run.cfg.seed)
    prompt, stop = [[data.doc_token]], data.doc_token
    try:
        (new,) = run.model.generate(prompt, tokens, 0.8, 50, stop, generator)
    except RuntimeError as e:  # a diverged model can't be sampled from; its result stands
        return f"no text sample: {e}"
    pieces = [data.token_table[t] for t in new if t < len(data.token_table)]
    return b"".join(pieces).decode(errors="replace")


def result_line(result, folder):
    """The last line that a run prints, from the result.json in its folder."""
    names = ("val_loss", "val_bpb")
    losses = " ".join(f"{name}:{result[name]:.4f}" for name in names if result[name] is not None)
    return (
        f"result: {losses} steps:{result['steps']} "
        f"train_time:{1000 * result['train_seconds']:.0f}ms -> {shown(folder / 'result.json')}"
    )


def write_result(run, log, checkpoints, result, lost):
    """Print the last line and write result.json; lost: the OSError of another file, or None."""
    log.line(result_line(result, log.folder))
    try:  # last, since a run with a result.json is finished
        if lost:
            raise lost
        write_whole(log.folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    except OSError as e:
        raise ValueError(
            f"{e.filename or log.folder}: {e.strerror}, so this run's files are incomplete; make "
            f"room, and RESUME={quoted(log.folder)} goes on from step {checkpoints.saved or 0}"
        ) from None
