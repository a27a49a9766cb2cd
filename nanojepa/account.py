"""An account of a training step, without the hardware: FLOPs, memory, bytes moved, time.

The step's forward and backward graphs are captured on tensors without data, as the compiler
partitions them. Products, attention, sums over a dimension and residual additions count as kernels.
What lies between them is fused into its readers. This is an estimate and no bound: a compiler fuses
some of the sums too, and leaves other things unfused. Waits and launches aren't counted.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

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


def capture(function, *arguments):
    """The forward and backward FX graphs of a function whose result is differentiated."""
    graphs = []

    def keep(module, example_inputs):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*arguments).backward()
    return graphs


def memory_of(nodes):
    """{identity: bytes} of the memory behind the tensors of these nodes."""
    values = tree_leaves([node.meta.get("val") for node in nodes])
    storages = [x.untyped_storage() for x in values if isinstance(x, torch.Tensor)]
    return {storage._cdata: storage.nbytes() for storage in storages}


def is_heavy(node):
    """Whether a node is a kernel of its own: a product, attention, or a gather."""
    packet = getattr(node.target, "overloadpacket", None)
    names = ("scaled_dot_product", "embedding", "index")
    return packet in flop_registry or any(name in str(node.target) for name in names)


def reduces(node):
    """Whether a node is a sum or a maximum over a dimension."""
    read = [sum(memory_of([base_of(source)]).values()) for source in node.all_input_nodes]
    return sum(memory_of([node]).values()) < 0.5 * max(read, default=0) and base_of(node) is node


def adds_up(node, written):
    """Whether a node is the sum of two that are written, as a residual stream is."""
    packet = getattr(node.target, "overloadpacket", None)
    both = [base_of(source) in written for source in node.all_input_nodes]
    return packet is torch.ops.aten.add and both == [True, True]


def base_of(node):
    """The node whose memory a view lies in; itself if it is none."""
    own = memory_of([node]).keys()
    shared = [source for source in node.all_input_nodes if own & memory_of([source]).keys()]
    return base_of(shared[0]) if shared else node


def cost(graph, weights, gpu):
    """The Graph of an FX graph; weights: identities of memory that is there anyway."""
    kernels = kernels_of(graph)
    last = {memory: n for n, (_, read) in enumerate(kernels) for memory in read}
    outputs = memory_of(graph.output_node().all_input_nodes)
    last |= dict.fromkeys(outputs, len(kernels))  # they outlive it
    inputs = memory_of([node for node in graph.nodes if node.op == "placeholder"])
    live = {m: size for m, size in inputs.items() if m not in weights}
    peak, moved, seconds = sum(live.values()), 0, 0.0
    for n, (node, read) in enumerate(kernels):
        traffic = sum((read | memory_of([node])).values())
        moved += traffic
        seconds += max(traffic / gpu.bandwidth, flops_of(node) / gpu.flops)
        live |= memory_of([node])
        peak = max(peak, sum(live.values()))
        live = {memory: size for memory, size in live.items() if last.get(memory, -1) > n}
    return Graph(peak, moved, seconds)


def kernels_of(graph):
    """[(node that is written, the memory it is made of)], in the graph's order."""
    written = {node for node in graph.nodes if node.op == "placeholder" or is_heavy(node)}
    for node in graph.nodes:
        if is_heavy(node) or node.op == "output":
            written.update(map(base_of, node.all_input_nodes))
        if reduces(node) or adds_up(node, written):
            written.add(node)
    return [
        (node, memory_of(sources(node, written)))
        for node in graph.nodes
        if node in written and node.op == "call_function"
    ]


def sources(node, written):
    """What a kernel reads: the written nodes that it is made of, through those that aren't."""
    found, stack = set(), list(node.all_input_nodes)
    while stack:
        source = base_of(stack.pop())
        if source in written:
            found.add(source)
        else:
            stack += source.all_input_nodes
    return found


def flops_of(node):
    """The FLOPs of a product or of attention, which is causal; 0 of others."""
    packet = getattr(node.target, "overloadpacket", None)
    values = [x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in node.args]
    if packet in flop_registry:
        return flop_registry[packet](*values, **node.kwargs, out_val=node.meta["val"])
    if "scaled_dot_product" not in str(node.target):
        return 0
    rows, heads, length, width = values[0].shape
    products = 5 if "backward" in str(node.target) else 2
    return products * rows * heads * length * length * width


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


def account_gpt(make_model, rows, length, gpu, ranks=1, micro_batches=1):
    """The Account of a step without a term. rows, length: of a micro-batch.

    make_model(): the GPT; it is called where tensors have no data.
    """
    with FakeTensorMode():
        model = make_model()
        idx = torch.zeros(rows, length, dtype=torch.int64)
        forward, backward = capture(lambda idx, targets: model(idx, targets), idx, idx)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = memory_of(n for n in forward.output_node().all_input_nodes if n.op != "placeholder")
    forward, backward = cost(forward, weights, gpu), cost(backward, weights, gpu)
    activations, peak = sum(saved.values()), max(forward.peak, backward.peak)
    sizes = [p.numel() for p in model.parameters()]
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    total = sum(sizes)
    rest, shared = total - matrices, 2 * (ranks - 1) / ranks
    # Muon reads the gradient and the momentum and writes both and the weights, and its iteration
    # passes over the update about six times in bfloat16; Adam reads four arrays and writes three.
    update = matrices * (6 * 4 + 6 * 4 / ranks) + rest * 7 * 4
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
            "gradients over ranks": shared * 4 * total / gpu.link,
            "optimizer": update / gpu.bandwidth + shared * 2 * matrices / gpu.link,
        },
    )


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
