"""The process, its device and its clock."""

import os
import sys
import time

import torch
import torch.distributed as dist


def start_process():
    """(rank, world size, device) of this process, in torchrun's group if there is one."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        # Two runs on a CPU are the same bit for bit. Otherwise the backward pass of the compiled
        # embedding would use atomic adds.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if world_size > 1:
        if device.type == "cuda":  # device_id: connect now, and not in the first step
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return rank, world_size, device


def end_rank():
    """End this process when all ranks have come here, and at once.

    Otherwise a library's thread may abort it while the interpreter shuts down.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def find_device(world_size=1):
    """A GPU of this process, if there is one; several processes can't share an Apple GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() and world_size == 1 else "cpu")


def choose_dtype(name, device):
    """The torch dtype of DTYPE; auto is bfloat16 if the hardware multiplies it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        native = False
    else:
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def peak_memory(device):
    """Bytes: of the GPU, or of the process; None where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def all_ranks_max(*values):
    """The largest of each value over all ranks, floats."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    shared = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(shared, dist.ReduceOp.MAX)  # a CPU tensor: the GPU is not waited for
    return shared.tolist()


class Clock:
    """Training time in s: it runs between start and stop, which wait for the device.

    All ranks start it together, so waiting for other ranks isn't counted.
    """

    def __init__(self, device, passed=0.0):
        self.device, self.passed, self.since = device, passed, None

    def now(self):
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return self.passed + running

    def start(self):
        """Start the clock, on all ranks together, if it stands."""
        if self.since is None and dist.is_initialized():
            dist.barrier()
        self.resume()

    def resume(self):
        """Start the clock of this rank alone, if it stands."""
        if self.since is None:
            self.wait_for_device()
            self.since = time.perf_counter()

    def stop(self):
        """Stop the clock if it runs."""
        if self.since is not None:
            self.wait_for_device()
            self.passed, self.since = self.now(), None

    def wait_for_device(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()


class OnTheWay:
    """Numbers, 0-dim tensors or None, on their way to the host; read them when there is time."""

    def __init__(self, *numbers):
        self.there = [x is not None for x in numbers]
        values = torch.stack([x for x in numbers if x is not None])
        self.values, self.copied = values, None
        if values.is_cuda:
            self.values = torch.empty(values.shape, pin_memory=True).copy_(
                values, non_blocking=True
            )
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self):
        """The numbers as floats, or None."""
        if self.copied is not None:
            self.copied.synchronize()
        values = iter(self.values.tolist())
        return [next(values) if there else None for there in self.there]
