"""Graphs of real models at their real size, on fake CUDA tensors: traced and rewritten, and never computed.

    python tests/fake_cuda.py LIBRARY graphs flux     # what the passes make of FLUX.1-dev, on several meshes
    python tests/fake_cuda.py LIBRARY kernels         # which kernels attention takes, and what it allocates
    python tests/fake_cuda.py LIBRARY code flux       # what Inductor's code does, and in which order
    python tests/fake_cuda.py LIBRARY recorded flux   # what of it CUDA graphs record
    python tests/fake_cuda.py LIBRARY too_wide flux   # what of it Triton could not hold in an index
    python tests/fake_cuda.py LIBRARY compiled flux   # what Triton makes of it; with "ring", say, of one of two ranks
    python tests/fake_cuda.py LIBRARY flex            # the same of flex attention with a mask

A program of its own that prints JSON, since LIBRARY (`build`) tells a whole process that there is a CUDA device.
"""

from __future__ import annotations

import copy
import ctypes
import json
import operator
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import include_paths, library_paths

if TYPE_CHECKING:
    from fake_h200 import Written

Inputs = dict[str, Any]
HALF, DEVICE = torch.bfloat16, torch.device("cuda:0")
MESHES: dict[str, dict[str, int]] = {
    "one rank": {"ulysses": 1},
    "ulysses 8": {"ulysses": 8},
    "ring 8": {"ring": 8},
    "ring 2 x ulysses 4": {"ring": 2, "ulysses": 4},
}


def build(folder: Path) -> Path | str:
    """Compiles what fakes CUDA; the library, or why there is none."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        return "there is no C++ compiler"
    library = folder / "fake_cuda.so"
    command = [compiler, "-O0", "-std=c++20", "-fPIC", "-shared", str(Path(__file__).with_suffix(".cpp"))]
    command += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    subprocess.run([*command, "-ltorch_cpu", "-lc10", "-o", str(library)], check=True, capture_output=True)
    return library


# Models


def fake(mode: FakeTensorMode, value: Tensor) -> Tensor:
    """A tensor on the meta device as one on the fake device, in half precision."""
    value = value.detach().to(HALF) if value.is_floating_point() else value.detach()
    return FakeTensor(mode, value.to("meta"), DEVICE)


def flux() -> tuple[nn.Module, Inputs]:
    """FLUX.1-dev, 1024 x 1024, one block of each kind more than the first."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=2, num_single_layers=1, guidance_embeds=True), dict(
        hidden_states=torch.empty(1, 4096, 64),
        encoder_hidden_states=torch.empty(1, 512, 4096),
        pooled_projections=torch.empty(1, 768),
        timestep=torch.empty(1),
        img_ids=torch.empty(4096, 3),
        txt_ids=torch.empty(512, 3),
        guidance=torch.empty(1),
    )


def hunyuan_video() -> tuple[nn.Module, Inputs]:
    """720p, 129 frames."""
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(num_layers=2, num_single_layers=1), dict(
        hidden_states=torch.empty(1, 16, 33, 90, 160),
        timestep=torch.empty(1, dtype=torch.long),
        encoder_hidden_states=torch.empty(1, 256, 4096),
        encoder_attention_mask=torch.empty(1, 256, dtype=torch.long),
        pooled_projections=torch.empty(1, 768),
        guidance=torch.empty(1),
    )


def wan() -> tuple[nn.Module, Inputs]:
    """Wan 2.1 14B, 720p, 81 frames."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(num_layers=2), dict(
        hidden_states=torch.empty(1, 16, 21, 90, 160),
        timestep=torch.empty(1, dtype=torch.long),
        encoder_hidden_states=torch.empty(1, 512, 4096),
    )


def stable_diffusion_3() -> tuple[nn.Module, Inputs]:
    """Stable Diffusion 3.5 large, 1024 x 1024."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        num_layers=3, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"
    )
    return model, dict(
        hidden_states=torch.empty(2, 16, 128, 128),
        encoder_hidden_states=torch.empty(2, 333, 4096),
        pooled_projections=torch.empty(2, 2048),
        timestep=torch.empty(2),
    )


MODELS = {"flux": flux, "hunyuan_video": hunyuan_video, "wan": wan, "stable_diffusion_3": stable_diffusion_3}


def captured(name: str) -> tuple[fx.GraphModule, list[Any]]:
    """Dynamo's graph of a model on the fake device, and its inputs."""
    mode = FakeTensorMode()
    with torch.device("meta"):
        model, inputs = MODELS[name]()
    with torch.inference_mode(False):
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for key, value in table.items():
                    if value is not None:
                        made = fake(mode, value)
                        table[key] = nn.Parameter(made, requires_grad=False) if table is module._parameters else made
        inputs = {key: fake(mode, value) for key, value in inputs.items()}
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append((gm, example_inputs))
        return gm.forward

    with mode, torch.no_grad():
        torch.compile(model.eval(), backend=backend, fullgraph=True)(**inputs, return_dict=False)
    (graph,) = graphs
    return graph


# What is looked at in graphs


@dataclass
class Seen:
    """One rank's graph, the branch that computes included.

    attributes:
        attentions: the kernel of each attention, as PyTorch chooses on a Hopper; "visible": keys dropped, then cuDNN.
        misaligned: operands of attention that a kernel would have to copy first.
        looks: how often the host waits to hear how many keys a mask leaves.
        crossings: other operators that read from one device and write to another.
        upcasts: values as large as the tokens that became float32 or float64, where they were not in the model.
        sent: the types of what is exchanged.
        early_waits: exchanges that are awaited before any product or attention, though some need them not.
    """

    attentions: list[str]
    misaligned: list[str]
    looks: int
    crossings: list[str]
    upcasts: int
    sent: list[str]
    early_waits: int


def look(gm: fx.GraphModule, before: fx.GraphModule, ranks: int) -> Seen:
    """What is seen in one rank's graph, and not in that of the whole model before."""
    heads = [value for node in before.graph.nodes for value in _tensors(node) if value.dim() == 4]
    tokens = max(value.shape[-2] * 128 for value in heads) // ranks
    asked = len(_upcasts(list(before.graph.nodes), tokens))
    nodes = [node for graph in _graphs(gm) for node in graph.nodes if node.op == "call_function"]
    attentions, misaligned = [], []
    for node in nodes:
        kind = _KERNEL.get(str(node.target))
        if kind is None:
            continue
        query, key, value = (argument.meta["val"] for argument in node.args[:3])
        attentions.append(kind if kind == "visible" else _CHOICES[_choice(query, key, value, node)])
        misaligned += [f"{node.name}: {part.stride()}" for part in (query, key, value) if not _is_aligned(part)]
    collectives = [node for node in nodes if "_c10d_functional" in str(node.target)]
    return Seen(
        attentions=attentions,
        misaligned=misaligned,
        looks=sum(str(node.target) == _LOOK for node in nodes),
        crossings=[str(node.target) for node in nodes if _crosses(node)],
        upcasts=len(_upcasts(nodes, tokens)) - asked,
        sent=sorted({str(made.dtype) for node in collectives if _is_start(node) for made in _tensors(node)}),
        early_waits=sum(_early_waits(graph) for graph in _graphs(gm)),
    )


_KERNEL = {
    "aten.scaled_dot_product_attention.default": "sdpa",
    "paracompile.attention_with_lse.default": "step",
    "paracompile.attention_to_visible.default": "visible",
    "paracompile.attention_with_lse_to_visible.default": "visible",
}
_LOOK = "paracompile.visible_keys.default"
_CHOICES = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
_PRODUCTS = ("aten.linear.default", *_KERNEL)


def _is_aligned(operand: Tensor) -> bool:
    """Whether each row of numbers begins at a multiple of 16 bytes, as every kernel wants it."""
    *others, last = operand.stride()
    return last == 1 and all(stride * operand.element_size() % 16 == 0 for stride in others)


def _choice(query: Tensor, key: Tensor, value: Tensor, node: fx.Node) -> int:
    mask = node.args[3] if len(node.args) > 3 else None
    bias = mask.meta["val"] if isinstance(mask, fx.Node) else None
    return int(torch._fused_sdp_choice(query, key, value, bias, 0.0, False))


def _graphs(gm: fx.GraphModule) -> list[fx.Graph]:
    return [gm.graph, *(child.graph for child in gm.children() if isinstance(child, fx.GraphModule))]


def _tensors(node: fx.Node) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def _crosses(node: fx.Node) -> bool:
    """Numbers that lie with the host (tensors of no dimension) are read without waiting."""
    if str(node.target) == _LOOK or node.target in (operator.getitem, torch.ops.higher_order.cond):
        return False
    made = {value.device for value in _tensors(node)}
    read = {value.device for source in node.all_input_nodes for value in _tensors(source) if value.dim()}
    return bool(made and read) and made != read and "attention" not in str(node.target)


def _upcasts(nodes: list[fx.Node], tokens: int) -> list[fx.Node]:
    def is_large(value: Tensor) -> bool:
        return value.numel() >= tokens

    return [
        node
        for node in nodes
        if str(node.target) == "aten._to_copy.default"
        and any(value.dtype in (torch.float32, torch.float64) and is_large(value) for value in _tensors(node))
        and any(value.dtype is HALF for source in node.all_input_nodes for value in _tensors(source))
    ]


def _is_start(node: fx.Node) -> bool:
    return "all_to_all" in str(node.target) or "all_gather" in str(node.target)


def _early_waits(graph: fx.Graph) -> int:
    """Waits right behind their start, though a product stands behind them that needs none of it."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    found = 0
    for wait in graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.wait_tensor.default):
        start = wait.args[0]
        if "all_to_all" not in str(start.target):
            continue
        under = [node for node in graph.nodes if order[start] < order[node] < order[wait]]
        if any(str(node.target) in _PRODUCTS for node in under):
            continue
        edges = [node for node in graph.nodes if _is_start(node) or node.target is torch.ops.higher_order.cond]
        following = next((node for node in edges if order[node] > order[wait]), None)
        end = order[following] if following is not None else len(order)
        behind = [node for node in graph.nodes if order[wait] < order[node] < end and str(node.target) in _PRODUCTS]
        found += any(not _needs(node, wait, order) for node in behind)
    return found


def _needs(node: fx.Node, source: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    waiting, seen = [node], {node}
    while waiting:
        for before in waiting.pop().all_input_nodes:
            if before is source:
                return True
            if before not in seen and order[before] > order[source]:
                seen.add(before)
                waiting.append(before)
    return False


def graphs(name: str) -> dict[str, dict[str, Any]]:
    """What is seen in a model's graph on each mesh, with and without a first block cache."""
    from paracompile.cache_options import CacheOptions
    from paracompile.mesh import Ranks
    from paracompile.passes import pipeline, run_passes

    gm, example_inputs = captured(name)
    result = {}
    for mesh, sizes in MESHES.items():
        for rdt in (False, True):
            cache = CacheOptions(rdt=1.0) if rdt else None
            ranks = Ranks.simulated(**sizes, rank=prod(sizes.values()) - 1)
            before: list[fx.GraphModule] = []

            def after(step: str, graph: fx.GraphModule, before: list[fx.GraphModule] = before) -> None:
                if step == "normalise":
                    before.append(copy.deepcopy(graph))

            made = run_passes(gm, example_inputs, pipeline(ranks, cache=cache, together=True), after=after)
            result[f"{mesh}, {'a cache' if rdt else 'no cache'}"] = asdict(look(made, before[0], ranks.size))
    return result


# Code

_CALLS = (
    ("start", re.compile(r"torch\.ops\._c10d_functional\.(?:all_to_all_single|all_gather_into_tensor)\.default\(")),
    ("wait", re.compile(r"torch\.ops\._c10d_functional\.wait_tensor\.default\(")),
    ("attention", re.compile(r"torch\.ops\.(?:aten\._scaled_dot_product|paracompile\.attention)\w*")),
    ("product", re.compile(r"extern_kernels\.(?:addmm|bmm|mm|_addmm_activation)\(")),
)


def calls_of(code: str) -> list[str]:
    """What generated code calls, in order, of exchanges, attention and products."""
    lines = code[code.index("def call(") :].splitlines()
    kinds = [kind for line in lines for kind, pattern in _CALLS if pattern.search(line)]
    # Of an attention there are more lines, which look at what it made.
    return [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != "attention" or kind != before]


def calls_asked_for(region: fx.GraphModule) -> list[str]:
    """The same of the graph that Inductor was given."""
    kinds = []
    for node in region.graph.nodes:
        target = str(node.target)
        if _is_start(node):
            kinds.append("start")
        elif "wait_tensor" in target:
            kinds.append("wait")
        elif target in _KERNEL:
            kinds.append("attention")
        elif target == "aten.linear.default":
            kinds.append("product")
    return kinds


def code(name: str) -> dict[str, list[dict[str, Any]]]:
    """For each mesh, what each different region was asked to call, what its code calls, and where the host waits."""
    from fake_h200 import written_by_inductor

    from paracompile.mesh import Ranks
    from paracompile.overlap import inductor_settings
    from paracompile.passes import pipeline, run_passes
    from paracompile.passes.regions import examples_of, regions_of

    gm, example_inputs = captured(name)
    result: dict[str, list[dict[str, Any]]] = {}
    dist.init_process_group("fake", store=FakeStore(), rank=7, world_size=8)
    for mesh, sizes in MESHES.items():
        if prod(sizes.values()) == 1:
            continue
        ranks = Ranks.from_mesh(init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes)))
        made = run_passes(gm, example_inputs, pipeline(ranks, together=True, regions=True))
        result[mesh] = []
        for region in regions_of(made):
            written = written_by_inductor(region, examples_of(region), inductor_settings()).code
            lines = written[written.index("def call(") :].splitlines()
            result[mesh].append(
                {
                    "asked": calls_asked_for(region),
                    "calls": calls_of(written),
                    "host": [line.strip() for line in lines if ".item()" in line or ".cpu()" in line],
                }
            )
    return result


def written_with_a_cache(name: str, settings: Mapping[str, Any], axis: str | None = None) -> Iterator[Written]:
    """What Inductor writes for each different region of a graph with a first block cache.

    args:
        axis: of a mesh of two ranks that exchange in float8; None: there is one rank.
    """
    from fake_h200 import written_by_inductor

    from paracompile.cache_options import CacheOptions
    from paracompile.mesh import Ranks
    from paracompile.passes import pipeline, run_passes
    from paracompile.passes.regions import examples_of, regions_of

    gm, example_inputs = captured(name)
    ranks = Ranks.simulated()
    if axis is not None:
        dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
        ranks = Ranks.from_mesh(init_device_mesh("cpu", (2,), mesh_dim_names=(axis,)))
    eight_bits = None if axis is None else torch.float8_e4m3fn
    passes = pipeline(ranks, cache=CacheOptions(rdt=1.0), together=True, regions=True, eight_bits=eight_bits)
    for region in regions_of(run_passes(gm, example_inputs, passes)):
        yield written_by_inductor(region, examples_of(region), settings)


def too_wide(name: str) -> list[str]:
    """Lines of Triton's kernels that compute with indices, of 32 bits, and with a number that has more."""
    lines = [line.strip() for written in written_with_a_cache(name, {}) for line in written.code.splitlines()]
    kernels = [line for line in lines if re.match(r"tmp\d+ = ", line) and "tl.full(" not in line]
    assert kernels
    return [line for line in kernels if any(int(number) >= 2**31 for number in re.findall(r"\b\d+\b", line))]


def compiled(name: str, axis: str | None = None) -> dict[str, int]:
    """Of each kernel that Triton makes, the shared memory that it takes, in bytes; `axis` as above."""
    from fake_h200 import compiled_by_triton

    return {
        kernel: size
        for written in written_with_a_cache(name, {}, axis)
        for kernel, size in compiled_by_triton(written.code).items()
    }


def flex() -> dict[str, int]:
    """For each type and head size, the shared memory that flex attention takes where a mask hides keys from queries."""
    from fake_h200 import compiled_by_triton, written_by_inductor

    from paracompile.runtime import kernels

    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append((gm, example_inputs))
        return gm.forward

    compiled = torch.compile(kernels.flex_attention, backend=backend, fullgraph=True)
    sizes = {}
    # A scale would be a tensor of one value, which Dynamo reads, and which is fake here.
    constant_scale = torch._dynamo.config.patch(specialize_float=True)
    with constant_scale, mock.patch.object(kernels, "_compiled_flex", return_value=compiled):
        for dtype in (HALF, torch.float32):
            for size in (64, 128, 256):
                with FakeTensorMode(), torch.no_grad():
                    query, key, value = (
                        torch.empty(2, length, 3, size, dtype=dtype, device=DEVICE).transpose(1, 2)
                        for length in (577, 300, 300)
                    )
                    mask = torch.empty(1, 1, 577, 300, dtype=torch.bool, device=DEVICE)
                    kernels._one_block.cache_clear()  # of another mode
                    kernels._flex(query, key, value, mask, None, size**-0.5)
                found = compiled_by_triton(written_by_inductor(*graphs.pop(), {}).code)
                sizes[f"{dtype}, {size}"] = max(found.values())
    return sizes


def recorded(name: str) -> list[dict[str, Any]]:
    """Of each different region of a graph with a first block cache, what CUDA graphs record.

    excluded, changed: see `Written`.
    parts: how many CUDA graphs there are.
    recorded, left: the operators of our own in them, and between them.
    """
    result = []
    for written in written_with_a_cache(name, {"triton.cudagraphs": True}):
        functions = re.split(r"^ *def (\w+)\(", written.code, flags=re.MULTILINE)
        own: dict[bool, list[str]] = {True: [], False: []}
        for function, body in zip(functions[1::2], functions[2::2], strict=True):
            own[function.startswith("partition_")] += re.findall(r"torch\.ops\.paracompile\.(\w+)\.default\(", body)
        result.append(
            {
                "excluded": written.excluded,
                "changed": written.changed,
                "parts": sum(function.startswith("partition_") for function in functions[1::2]),
                "recorded": own[True],
                "left": own[False],
            }
        )
    return result


# Kernels


class Allocated(TorchDispatchMode):
    """The largest sum of bytes that live at a time, of what operators make beside what they are given."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known = {value.untyped_storage()._cdata for value in given}
        self.reached: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            self.reached.append(str(func).removeprefix("aten._scaled_dot_product_").removesuffix("_attention.default"))
        made = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(made):
            if isinstance(value, Tensor) and (key := value.untyped_storage()._cdata) not in self.known:
                size = value.untyped_storage().nbytes()
                self.known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(value.untyped_storage(), self._freed, key, size)
        return made

    def _freed(self, key: int, size: int) -> None:
        self.live -= size
        self.known.discard(key)


def kernels() -> dict[str, Any]:
    """Kernel and peak, in sizes of the queries, of attention with an LSE on 14,882 keys of HunyuanVideo."""
    from paracompile.runtime.kernels import attention_with_lse

    result = {}
    for name, dtype, size, mask_shape, additive in _cases():
        with FakeTensorMode():
            parts = [
                torch.empty(1, length, 24, size, dtype=dtype, device=DEVICE).transpose(1, 2)
                for length in (14850, 14882, 14882)
            ]
            mask = (
                torch.empty(mask_shape, dtype=dtype if additive else torch.bool, device=DEVICE) if mask_shape else None
            )
            offset = torch.empty(1, 1, 1, 1, dtype=dtype, device=DEVICE) if additive else None
            given = [value for value in (*parts, mask, offset) if value is not None]
            with Allocated(given) as seen:
                attention_with_lse._init_fn(*parts, mask, offset, None)
            result[name] = {"kernel": seen.reached, "peak": seen.peak / (parts[0].numel() * parts[0].element_size())}
    return result


def _cases() -> Iterator[tuple[str, torch.dtype, int, tuple[int, ...] | None, bool]]:
    keys = (1, 1, 1, 14882)
    yield "half", HALF, 128, None, False
    yield "half, 100", HALF, 100, None, False
    yield "half, 192", HALF, 192, None, False
    yield "float32", torch.float32, 128, None, False
    yield "half, keys hidden", HALF, 128, keys, False
    yield "half, additive", HALF, 128, keys, True
    yield "half, 100, keys hidden", HALF, 100, keys, False


if __name__ == "__main__":
    library, what, *rest = sys.argv[1:]
    ctypes.CDLL(library)
    json.dump(
        {
            "graphs": graphs,
            "kernels": kernels,
            "code": code,
            "recorded": recorded,
            "too_wide": too_wide,
            "compiled": compiled,
            "flex": flex,
        }[what](*rest),
        sys.stdout,
        indent=1,
    )
