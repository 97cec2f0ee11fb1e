"""Every kind of input that cannot work, as a table: what was given, and what the error says about it and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_tensors import draw, randomise
from small_models import WIDTH, CrossAttention, SelfAttention, Transformer, image_tokens, shard, text_tokens
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.compiler._cache import CacheArtifactManager

import paracompile
from paracompile import GraphError, OptionError, ParacompileError

CACHED = {"rdt": 0.1}

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"rtd": 0.1}, "'rtd' = 0.1: there is no such option; did you mean 'rdt'"),
    ({"mesh": "cuda"}, "'mesh' = 'cuda': give a DeviceMesh, such as paracompile.init_mesh builds"),
    ({"inputs": "none"}, "'inputs' = 'none': give one of 'broadcast', 'check', 'trust'"),
    ({"inputs": "check", "shard_inputs": False}, "'inputs' = 'check': shards differ from rank to rank"),
    ({"rdt": -1}, "'rdt' = -1: give a finite number that is not negative"),
    ({"rdt": float("nan")}, "'rdt' = nan: give a finite number"),
    ({"rdt": True}, "'rdt' = True: give a finite number"),
    ({"rdt": [0.1]}, r"'rdt' = \[0.1\]: give a finite number"),
    ({"rdt": "fast"}, "'rdt' = 'fast': give a finite number .* or \"auto\""),
    ({"rdt": "auto"}, "no threshold is known for Transformer: give a number, 0.05 to begin with"),
    ({"rdt": 0.1, "shard_inputs": False}, "the first block cache needs the whole model: remove shard_inputs"),
    ({"warmup_steps": 2}, "'warmup_steps' = 2: only the first block cache reads it: give \"rdt\" as well"),
    ({**CACHED, "warmup_steps": -1}, "'warmup_steps' = -1: give a whole number of at least 0"),
    ({**CACHED, "warmup_steps": 1.5}, "'warmup_steps' = 1.5: give a whole number"),
    ({**CACHED, "max_consecutive_hits": 0}, "'max_consecutive_hits' = 0: give a whole number of at least 1"),
    ({**CACHED, "downsample_factor": 0}, "'downsample_factor' = 0: give a whole number of at least 1"),
    ({**CACHED, "taylor_order": 3}, "'taylor_order' = 3: give a whole number from 0 to 2"),
    ({**CACHED, "first_blocks": 0}, '\'first_blocks\' = 0: the residual .* at least 1, or "watch": "modulation"'),
    ({**CACHED, "first_blocks": 9}, "the model has 2 blocks, blocks.0 to blocks.1: with 9 .* none is left to skip"),
    ({**CACHED, "last_blocks": 1}, "the model has 2 blocks, .* with 1 .* and 1 at the end, none is left to skip"),
    ({"regions": 1}, "'regions' = 1: give True or False"),
    ({"compiler": "inductr"}, "'compiler' = 'inductr': .* did you mean 'inductor'"),
    ({"compiler": "inductor", "mode": "fast"}, "'mode' = 'fast': give one of 'default'"),
    ({"mode": "max-autotune"}, "'mode' = 'max-autotune': only Inductor reads it: remove it, or remove \"compiler\""),
    ({"compiler": "inductor", "inductor": {"max_autotun": True}}, "no such setting; did you mean 'max_autotune'"),
    ({"compiler": "inductor", "inductor": {"max_autotune": 2}}, "= 2: the setting takes a value of type bool"),
    ({"compiler": "inductor", "inductor": "max_autotune"}, "give a dict of Inductor settings"),
    ({"dump": 3}, "'dump' = 3: give the path of a folder"),
    ({"dump": __file__}, "there is a file of that name: give the path of a folder"),
    ({"report": 3}, "'report' = 3: give a function that takes one report"),
    ({"timeout": 0}, "'timeout' = 0: give a finite number of seconds, more than 0"),
    ({"call_timeout": float("inf")}, "'call_timeout' = inf: give a finite number of seconds"),
]


def compile_and_call(**options: Any) -> nn.Module:
    """Compiles a model of two blocks as a user does, and raises what the backend says."""
    torch._dynamo.reset()
    model = randomise(Transformer(2))
    compiled = torch.compile(model, backend="paracompile", options={"compiler": "eager", **options})
    try:
        with torch.no_grad():
            compiled(image_tokens())
    except BackendCompilerFailed as error:
        raise error.inner_exception from None
    return model


@pytest.mark.sampled(12)
@pytest.mark.parametrize("options, says", OPTIONS, ids=[" ".join(map(repr, given)) for given, _ in OPTIONS])
def test_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        compile_and_call(**options)


FUNCTIONS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "set_rdt without a cache": (
        lambda: paracompile.set_rdt(compile_and_call(), 0.1),
        OptionError,
        r'compiled without a first block cache: give torch.compile options=\{"rdt": 0.08\}',
    ),
    "cache_stats without a cache": (
        lambda: paracompile.cache_stats(compile_and_call()),
        OptionError,
        "compiled without a first block cache",
    ),
    "set_rdt to nothing": (
        lambda: paracompile.set_rdt(compile_and_call(**CACHED), None),  # type: ignore[arg-type]
        OptionError,
        "give a finite number of at least 0",
    ),
    "reset_cache of a name": (
        lambda: paracompile.reset_cache("transformer"),  # type: ignore[arg-type]
        OptionError,
        "give the compiled module",
    ),
    "cache_context without a name": (
        lambda: paracompile.cache_context("").__enter__(),
        OptionError,
        'give a name, such as "cond"',
    ),
    "load_compiled of nothing": (
        lambda: paracompile.load_compiled("nowhere/flux.compiled"),
        OptionError,
        "there is no file 'flux.compiled'",
    ),
    "load_compiled of another file": (
        lambda: paracompile.load_compiled(__file__),
        OptionError,
        "it is no file that save_compiled wrote",
    ),
    "save_compiled before a call": (
        lambda: (CacheArtifactManager.clear(), paracompile.save_compiled("nowhere"))[1],
        ParacompileError,
        "nothing to save. Call the compiled model once before",
    ),
    "init_mesh alone": (
        lambda: paracompile.init_mesh("cpu"),
        ParacompileError,
        "start the script with torchrun",
    ),
    "register_rule of a function": (
        lambda: paracompile.register_rule(torch.add, lambda op: None),  # type: ignore[arg-type]
        OptionError,
        "give an overload, as torch.ops.mylib.gate.default",
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, kind, says = FUNCTIONS[name]
    with pytest.raises(kind, match=says):
        call()
    assert list(tmp_path.iterdir()) == []


class Noisy(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + torch.randn_like(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[Tensor], Any, str]] = {
    "no attention": (
        lambda: nn.Linear(WIDTH, WIDTH),
        [image_tokens(WIDTH)],
        2,
        r"has no scaled_dot_product_attention.*remedy: set the model's attention backend",
    ),
    "random numbers": (
        Noisy,
        [image_tokens(WIDTH)],
        2,
        r"randn_like.*each rank would draw its own.*remedy: call model.eval\(\), or draw the numbers outside",
    ),
    "one token": (
        SelfAttention,
        [draw(1, 1, WIDTH)],
        2,
        "has 1 query tokens for the 2 ranks of its sequence.*remedy: use fewer ranks",
    ),
    "one row for a batch axis": (
        SelfAttention,
        [draw(1, 8, WIDTH)],
        {"batch": 2},
        "its batch of 1 cannot be shared by the 2 ranks of the batch axis.*remedy: use the batch axis for pipelines",
    ),
    "one query for all keys": (
        lambda: CrossAttention(20),
        [draw(2, 1, WIDTH), text_tokens(20)],
        2,
        "has 1 query tokens.*remedy: use fewer ranks",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_on_several_ranks(name: str) -> None:
    model, inputs, mesh, says = MODELS[name]
    with pytest.raises(GraphError, match=f"(?s){says}"):
        shard(randomise(model()), inputs, mesh)
