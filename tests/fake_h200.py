"""Inductor's code for one H200, written without a GPU, and compiled where Triton is installed.

What Inductor asks the device, its driver and Triton is answered here. The names are torch 2.13's; one that another
version lacks is left out, and shows as an error of Inductor's.
"""

from __future__ import annotations

import contextlib
import re
import runpy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.codecache as codecache
import torch._inductor.codegen.triton as triton_code
import torch._inductor.compile_fx as compile_fx
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.runtime.triton_helpers as triton_helpers
import torch._inductor.scheduler as scheduler
import torch._inductor.utils as inductor_utils
import torch._subclasses.fake_tensor as fake_tensor
import torch.utils._triton as triton
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V

aten = torch.ops.aten

_PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=150 * 10**9,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=60 * 2**20,
    is_integrated=0,
    is_multi_gpu_board=0,
    gcnArchName="",
    clock_rate=1980000,
    memory_clock_rate=3201000,
    memory_bus_width=6144,
    uuid="0",
)


def _says(value: Any) -> Any:
    return lambda *args, **kwargs: value


def _answers() -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """What is asked of whom, and what it is told."""
    state = torch.empty(16, dtype=torch.uint8)
    yield (
        torch.cuda,
        {
            "is_available": _says(True),
            "device_count": _says(8),
            "current_device": _says(0),
            "get_device_properties": _says(_PROPERTIES),
            "get_device_capability": _says((9, 0)),
            "get_device_name": _says(_PROPERTIES.name),
            "is_bf16_supported": _says(True),
            "is_tf32_supported": _says(True),
            "can_device_access_peer": _says(True),
            "get_rng_state": _says(state),
            **{
                name: _says(None)
                for name in ("_lazy_init", "set_rng_state", "set_device", "synchronize", "_exchange_device")
            },
            "_maybe_exchange_device": _says(0),
        },
    )
    interface = {
        "is_available": True,
        "get_compute_capability": 90,
        "current_device": 0,
        "device_count": 8,
        "get_device_properties": _PROPERTIES,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "set_device": None,
        "raise_if_triton_unavailable": None,
        "is_triton_capable": True,
    }
    yield device_interface.CudaInterface, {name: staticmethod(_says(value)) for name, value in interface.items()}
    worker = {"get_device_properties": _PROPERTIES, "current_device": 0}
    yield device_interface.CudaInterface.Worker, {name: staticmethod(_says(value)) for name, value in worker.items()}
    for module in (triton, inductor_utils, scheduler, compile_fx, triton_code, codecache):
        yield (
            module,
            {
                "has_triton": _says(True),
                "triton_hash_with_backend": _says("none"),
                "triton_backend": _says(None),
            },
        )
    yield inductor_utils, {"get_gpu_type": _says("cuda")}
    yield joint_graph, {"lazy_init": _says(None)}
    yield fake_tensor, {"init_gpu_context": _says(None)}


@contextlib.contextmanager
def h200() -> Iterator[None]:
    """Within, there seem to be eight of them, and Triton."""
    with contextlib.ExitStack() as stack:
        for target, answers in _answers():
            for name, answer in answers.items():
                if hasattr(target, name):
                    stack.enter_context(mock.patch.object(target, name, answer))
        stack.enter_context(_attention_as_on_hopper())
        yield


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """cuDNN, as PyTorch chooses there in half precision."""
    found: Tensor = aten._scaled_dot_product_cudnn_attention(
        query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale
    )[0]
    return found


@contextlib.contextmanager
def _attention_as_on_hopper() -> Iterator[None]:
    operator = aten.scaled_dot_product_attention.default
    before = dict(operator.py_kernels)
    operator.py_kernels[torch._C.DispatchKey.CompositeImplicitAutograd] = _attention
    operator._dispatch_cache.clear()
    try:
        yield
    finally:
        operator.py_kernels.clear()
        operator.py_kernels.update(before)
        operator._dispatch_cache.clear()


@dataclass(frozen=True)
class Written:
    """What Inductor makes of a graph.

    attributes:
        code: what runs it.
        excluded: why it can be no CUDA graph.
        changed: how many of its inputs it writes to that are no parameters; with any, it is run without a CUDA graph.
    """

    code: str
    excluded: str | None
    changed: int


class _Stop(BaseException):
    """The code is there."""


def written_by_inductor(gm: fx.GraphModule, inputs: Sequence[Any], settings: Mapping[str, Any]) -> Written:
    """What Inductor writes for a graph."""
    found: list[Written] = []
    static: list[int] = []
    compile_graph = compile_fx.fx_codegen_and_compile

    def begin(*args: Any, **how: Any) -> Any:
        static.extend(how["static_input_idxs"])
        return compile_graph(*args, **how)

    def stop(code: str) -> None:
        graph = V.graph
        changed = {graph.graph_input_names.index(name) for name in graph.mutated_inputs}
        found.append(Written(code, graph.disable_cudagraphs_reason, len(changed.difference(static))))
        raise _Stop

    with (
        h200(),
        mock.patch.object(compile_fx, "fx_codegen_and_compile", begin),
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(stop)),
        config.patch(
            compile_threads=1, force_disable_caches=True, cpp_wrapper=False, joint_graph_constant_folding=False
        ),
        torch.no_grad(),
        contextlib.suppress(_Stop),
    ):
        compile_fx.compile_fx(gm, list(inputs), config_patches=dict(settings))
    (written,) = found
    return written


_KERNEL = re.compile(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)", re.M | re.S)


def compiled_by_triton(code: str) -> dict[str, int]:
    """Compiles each kernel that this code of Inductor's has Triton make, for every way in which it may be launched.

    Returns the most shared memory that one takes, in bytes, by kernel. Triton needs no GPU for this.
    """
    import triton as triton_itself
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found: dict[str, int] = {}
    for name, source in _KERNEL.findall(code):
        no_driver = mock.patch.object(triton_helpers, "set_driver_to_gpu")
        with tempfile.TemporaryDirectory() as folder, h200(), no_driver:
            file = Path(folder, f"{name}.py")  # Triton reads the source again
            file.write_text(source)
            (autotuner,) = (made for made in runpy.run_path(str(file)).values() if hasattr(made, "configs"))
            for config_of in autotuner.configs:
                meta = autotuner._create_compile_meta(config_of)
                asked = ASTSource(autotuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
                options = autotuner._create_compile_options(config_of, meta)
                binary = triton_itself.compile(asked, target=GPUTarget("cuda", 90, 32), options=options)
                found[name] = max(found.get(name, 0), binary.metadata.shared)
    return found
