"""An account of a training step, without the hardware: FLOPs, memory, bytes moved, time.

The step's forward and backward graphs are captured on tensors without data. The compiler itself
fuses them into kernels and orders these; nothing is generated or run. A kernel takes the longer of
its products at the card's rate and of the bytes that it reads and writes at the card's bandwidth.
This is an estimate and no bound. Waits and launches aren't counted.
"""

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple
from unittest.mock import patch

import torch
from functorch.compile import make_boxed_func
from torch._inductor import memory as inductor_memory
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    compile_fx,
    record_original_output_strides,
)
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """Rates of one card: FLOP/s of bfloat16 products, bytes/s of memory and of links, bytes."""

    flops: float
    bandwidth: float
    link: float
    memory: float
    peak: float = 989e12  # of the data sheet, to which an MFU refers


# Assumed, not measured: 75% of the data sheet's FLOP/s, 85% of its bandwidth, and 370 GB/s over
# NVLink.
GPUS = {
    "h100": Gpu(0.75 * 989e12, 0.85 * 3.35e12, 370e9, 80e9),
    "h200": Gpu(0.75 * 989e12, 0.85 * 4.8e12, 370e9, 141e9),
}


class Graph(NamedTuple):
    """What a captured graph costs.

    peak: the most bytes that it holds at one time, without the weights. moved: bytes that its
    kernels read and write.
    """

    peak: int
    moved: int
    seconds: float


# ---- what a graph costs


class Captured(NamedTuple):
    """An FX graph as the compiler gets it, with its inputs, which have no data."""

    module: torch.fx.GraphModule
    inputs: list
    is_backward: bool

    def outputs(self):
        """The tensors that it returns."""
        nodes = self.module.graph.output_node().all_input_nodes
        return [node.meta["val"] for node in nodes if node.op != "placeholder"]


def capture(function, *arguments):
    """The forward and the backward Captured of a function whose result is differentiated."""
    graphs = []

    def keep(module, inputs, is_backward=False, **_):
        graphs.append(Captured(copy.deepcopy(module), inputs, is_backward))
        return make_boxed_func(module.forward)

    def backend(module, inputs):
        return compile_fx(module, inputs, inner_compile=keep)

    with torch._dynamo.config.patch(recompile_limit=100):  # as many accounts in one process
        compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
        compiled(*arguments).backward()
    return graphs


def cost(captured, gpu, on_cpu=False):
    """The Graph of a Captured.

    on_cpu: let the compiler choose what it writes to memory as for a CPU, which rather reads a
    value than computes it twice. The kernels are those of its CPU backend in both cases.
    """
    module, inputs, is_backward = captured
    with ExitStack() as stack:
        if not on_cpu:
            stack.enter_context(patch("torch._inductor.ir.is_cpu", lambda node: False))
        stack.enter_context(DebugContext())
        stack.enter_context(V.set_fake_mode(torch._guards.detect_fake_mode(inputs)))
        stack.enter_context(V.set_extern_kernel_nodes([]))
        record_original_output_strides(module)
        _recursive_post_grad_passes(module, is_inference=False)
        graph = GraphLowering(module, example_inputs=inputs, is_backward=is_backward)
        stack.enter_context(V.set_graph_handler(graph))
        graph.run(*inputs)
        graph._update_scheduler()
        kernels, names = graph.scheduler.nodes, graph.get_output_names()
        freed = inductor_memory.get_freeable_input_buf(kernels, set(graph.graph_inputs))
        peak, _ = inductor_memory.estimate_peak_memory(kernels, freed, set(names))
        moved = [kernel.get_read_write_buffers_sizes() for kernel in kernels]
        flops = [flops_of(kernel) for kernel in kernels]
    times = [max(m / gpu.bandwidth, f / gpu.flops) for m, f in zip(moved, flops, strict=True)]
    return Graph(peak, sum(moved), sum(times))


def flops_of(kernel):
    """The FLOPs of a kernel that is a product or attention, which is causal; 0 of others."""
    operation = str(getattr(kernel.node, "op_overload", ""))
    if "scaled_dot_product" not in operation:
        return kernel.estimate_flops() or 0
    (node,) = (node for node in kernel.node.get_origins() if str(node.target) == operation)
    return attention_flops(operation, next(x.meta["val"] for x in node.all_input_nodes)) // 2


def attention_flops(operation, tensor):
    """The FLOPs of attention without a mask, or of its backward pass, which computes scores again.

    tensor: of the queries' shape.
    """
    rows, heads, length, width = tensor.shape
    products = 5 if "backward" in operation else 2
    return 2 * products * rows * heads * length * length * width


# ---- a training step of a GPT


class Account(NamedTuple):
    """What a step of one rank takes. memory: {what: bytes}; seconds: {what: s}, in turns."""

    parameters: int
    tokens: int  # of the step, over all ranks
    flops: float  # of the step and rank, of the network
    moved: int  # bytes of memory traffic of a micro-batch
    memory: dict
    seconds: dict

    def mfu(self, gpu):
        return self.flops / sum(self.seconds.values()) / gpu.peak


def account_gpt(make_model, rows, length, gpu, ranks=1, micro_batches=1, on_cpu=False):
    """The Account of a step without a term. rows, length: of a micro-batch.

    make_model(): the GPT; it is called where tensors have no data. on_cpu: as in cost().
    """
    with FakeTensorMode():
        model = make_model()
        idx = torch.zeros(rows, length, dtype=torch.int64)
        graphs = capture(lambda idx, targets: model(idx, targets), idx, idx)
    activations = sum(x.nbytes for x in graphs[0].outputs())
    forward, backward = (cost(graph, gpu, on_cpu) for graph in graphs)
    peak = max(forward.peak, backward.peak)
    sizes = [p.numel() for p in model.parameters()]
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    total = sum(sizes)
    rest, apart = total - matrices, (ranks - 1) / ranks
    # Muon copies gradients into stacks and adds bfloat16 updates. Of its part, it reads and writes
    # gradient and momentum twice, and its iteration passes over the update about six times. Adam
    # reads four arrays and writes three.
    update = matrices * (8 + 10 + (32 + 6 * 4) / ranks) + rest * 7 * 4
    visible = length * (length + 1) // 2 * rows
    return Account(
        parameters=total,
        tokens=rows * length * ranks * micro_batches,
        flops=micro_batches * model.flops(rows * length, visible),
        moved=forward.moved + backward.moved,
        memory={
            "weights": 4 * total,
            "optimizer": 4 * matrices + 8 * rest,
            "gradients of earlier micro-batches": 4 * total * (micro_batches > 1),
            "activations": activations,
            "gradients and temporary": peak - activations,
        },
        seconds={
            "forward": micro_batches * forward.seconds,
            "backward": micro_batches * backward.seconds,
            # Muon's are scattered, the rest is summed on every rank.
            "gradients over ranks": apart * (4 * matrices + 8 * rest) / gpu.link,
            "optimizer": update / gpu.bandwidth
            + muon_flops(model) / ranks / gpu.flops
            + apart * 2 * matrices / gpu.link,
        },
    )


def muon_flops(model):
    """FLOPs of Muon's iteration over all matrices of the blocks."""
    sizes = [sorted(p.shape) for p in model.blocks.parameters() if p.ndim == 2]
    return sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sizes)


def table(account, gpu):
    """Lines of Markdown: memory by kind, seconds by part, and what they add up to."""
    size, total = account.parameters / 1e6, sum(account.memory.values())
    yield f"| {size:,.1f}M parameters, {account.tokens:,} tokens a step | |"
    yield "|---|---|"
    for what, size in account.memory.items():
        yield f"| {what} | {size / GB:.2f} GB |"
    yield f"| **memory of a rank** | {total / GB:.1f} of {gpu.memory / GB:.0f} GB |"
    for what, seconds in account.seconds.items():
        yield f"| {what} | {1000 * seconds:.1f} ms |"
    yield f"| **a step** | {1000 * sum(account.seconds.values()):.1f} ms |"
    yield f"| bytes moved in a micro-batch | {account.moved / GB:.1f} GB |"
    yield f"| MFU | {account.mfu(gpu):.0%} |"
