"""The options of ``torch.compile(model, backend="paracompile", options={...})``.

One frozen dataclass. Whatever can be told wrong from the value alone is refused here, by an error that names the key,
the value and the remedy. Nothing here talks to other ranks: `Options.fingerprint` is what they compare.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast, get_args, get_origin

from torch.distributed.device_mesh import DeviceMesh

from paracompile.cache_options import CacheOptions, knobs
from paracompile.checks import close, number, one_of
from paracompile.errors import OptionError
from paracompile.runtime.functions import named

__all__ = ["Compiler", "InputMode", "Options"]

InputMode = Literal["broadcast", "check", "trust"]
ExchangeType = Literal["fp8", "int8"]
Compiler = Literal["inductor", "eager", "aot_eager"]
Kernel = Literal["auto", "cudnn", "flash", "efficient", "math", "flex"]


@dataclass(frozen=True, kw_only=True)
class Options(CacheOptions):
    """What a user asks of one compile. Every field has a default; `parse` reads the mapping that torch hands over.

    Those of the first block cache stand in `CacheOptions`.

    Raises:
        OptionError: a value of the wrong type, or one that cannot work.
    """

    mesh: DeviceMesh | None = None
    """Which ranks share the work: a mesh with any of the axes "batch", "ring", "ulysses" (see `paracompile.init_mesh`),
    or one of a single dimension, whatever its name. None: all ranks of the world, or no sharding in a single
    process."""

    inputs: InputMode = "broadcast"
    """What ranks do about inputs that differ, at each call: "broadcast" sends the first rank's to all, "check" compares
    the bytes and raises, "trust" does nothing."""

    shard_inputs: bool = True
    """False: the inputs are this rank's shards already, cut as `torch.chunk` cuts them, and so are the outputs; only
    attention is changed. `inputs` is then "trust"."""

    drop_masked_keys: bool = True
    """Where a mask only hides keys (padding), attend to the visible ones with the fast kernel and no mask."""

    attention: Kernel | Callable[..., Any] = "auto"
    """What computes attention on a rank, in a ring, too: "auto" is PyTorch's choice, or a FlashAttention 3 or 4 that is
    installed; "cudnn", "flash", "efficient", "math", "flex"; or a function `f(query, key, value, *, scale)` of tensors
    (rows, heads, tokens, size) with as many heads each. What has a mask goes to a function that takes `mask` (boolean,
    True: sees, or additive, broadcastable to the scores); a ring needs one that takes `return_lse` and then returns
    the natural logarithm of the sum of each row's exponentials, (rows, heads, queries), as well. What a kernel cannot
    serve is left to PyTorch, and the report says so."""

    exchange_dtype: ExchangeType | None = None
    """The type in which attention's operands and results travel between ranks: "fp8" or "int8", with a scale for
    each head of a token. None: as they are."""

    regions: bool = True
    """Compile the graph in regions along the model's blocks, equal ones once. False: in one piece (with the first block
    cache: in one piece each before, within and after what it may skip)."""

    compiler: Compiler = "inductor"
    """What compiles the sharded graph: "inductor"; "eager" interprets it; "aot_eager" traces it with AOTAutograd and
    then interprets it. The last two are for tests and debugging."""

    mode: str | None = None
    """Inductor's mode, one of `torch._inductor.list_mode_options()`. It stands here because torch.compile takes no
    ``mode=`` beside ``options=``. None and "default" are the same to Inductor."""

    inductor: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Patches of `torch._inductor.config`, by name ("triton.cudagraphs"); they win over `mode`."""

    verify: bool = False
    """The first call of each graph also runs the original one, whole on each rank, and raises where the two differ."""

    dump: str | os.PathLike[str] | None = None
    """A folder, made when needed, that gets the graph before and after each pass."""

    report: Callable[[Any], object] | None = None
    """Called with the report of each graph after it was compiled."""

    timeout: float = 600.0
    """Seconds that ranks wait for each other while compiling and through a graph's first call; more than 0."""

    call_timeout: float = 30.0
    """Seconds that a rank waits at each later call until the others make it, too; more than 0."""

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Read the ``options`` of torch.compile; None is no options at all.

        Raises:
            OptionError: an unknown key (the message names close ones), or any bad value.
        """
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise OptionError("options", options, 'give a dict, such as {"mesh": mesh}')
        names = [spec.name for spec in fields(cls)]
        for key, value in options.items():
            if key not in names:
                raise OptionError(
                    str(key), value, f"there is no such option{close(str(key), names)}. Options: {', '.join(names)}"
                )
        return cls(**dict(options))

    def __post_init__(self) -> None:
        if self.mesh is not None and not isinstance(self.mesh, DeviceMesh):
            raise OptionError("mesh", self.mesh, "give a DeviceMesh, such as paracompile.init_mesh builds, or None")
        one_of("inputs", self.inputs, get_args(InputMode))
        one_of("compiler", self.compiler, get_args(Compiler))
        for key in ("shard_inputs", "drop_masked_keys", "regions", "verify"):
            if not isinstance(getattr(self, key), bool):
                raise OptionError(key, getattr(self, key), "give True or False")
        if not callable(self.attention):
            one_of("attention", self.attention, get_args(Kernel), "or a function")
        if self.exchange_dtype is not None:
            one_of("exchange_dtype", self.exchange_dtype, get_args(ExchangeType), "or None")
            if self.verify:
                raise OptionError(
                    "verify", self.verify, "what travels in eight bits differs by more than rounding: leave it out"
                )
        if not self.shard_inputs and self.inputs == "check":
            raise OptionError("inputs", self.inputs, "shards differ from rank to rank: leave it out")
        if not self.shard_inputs and self.verify:
            raise OptionError("verify", self.verify, "no rank has the whole inputs to compare with: leave it out")
        super().__post_init__()
        if self.caches and not self.shard_inputs:
            raise OptionError("rdt", self.rdt, "the first block cache needs the whole model: remove shard_inputs")
        object.__setattr__(self, "inductor", _inductor(self.inductor))
        if self.mode is not None:
            from paracompile.torch_private.compilers import list_mode_options

            one_of("mode", self.mode, tuple(list_mode_options()))
        if self.compiler != "inductor":
            for key, value in (("mode", self.mode), ("inductor", self.inductor or None)):
                if value is not None:
                    raise OptionError(
                        key, value, f'only Inductor reads it: remove it, or remove "compiler": {self.compiler!r}'
                    )
        _dump(self.dump)
        if self.report is not None and not callable(self.report):
            raise OptionError("report", self.report, "give a function that takes one report, or None")
        for key in ("timeout", "call_timeout"):
            wanted = getattr(self, key)
            seconds = number(key, wanted, "give the seconds that ranks wait for each other, more than 0")
            if not (0 < seconds < math.inf):
                raise OptionError(key, wanted, "give a finite number of seconds, more than 0")
            object.__setattr__(self, key, seconds)

    @property
    def kernel(self) -> str:
        """The name of what computes attention."""
        return named(self.attention) if callable(self.attention) else self.attention

    def fingerprint(self) -> str:
        """Everything that must be equal on all ranks, one ``name = value`` a line, the same text in every process.

        Left out are what may differ: the mesh as an object (its device type, axes, shape and ranks are in), `dump`,
        `report` and the timeouts.
        """
        facts: dict[str, object] = {
            "mesh": None
            if self.mesh is None
            else (self.mesh.device_type, self.mesh.mesh_dim_names, self.mesh.mesh.tolist()),
            "inputs": self.inputs,
            **{knob.name: getattr(self, knob.name) for knob in knobs()},
            "rdt": self.rdt or None,
            "shard_inputs": self.shard_inputs,
            "drop_masked_keys": self.drop_masked_keys,
            "attention": self.kernel,
            "exchange_dtype": self.exchange_dtype,
            "regions": self.regions,
            "compiler": self.compiler,
            "verify": self.verify,
            "mode": None if self.mode == "default" else self.mode,
            **{f"inductor.{name}": value for name, value in sorted(self.inductor.items())},
        }
        return "".join(f"{name} = {_stable(value)}\n" for name, value in facts.items())


def _inductor(patches: object) -> dict[str, Any]:
    """The patches by the names that Inductor has; a copy, so that a later change of the user's dict does nothing."""
    if patches is None:
        return {}
    if not isinstance(patches, Mapping):
        raise OptionError("inductor", patches, 'give a dict of Inductor settings, such as {"max_autotune": True}')
    if not patches:
        return {}
    from paracompile.torch_private.compilers import config

    settings = cast(Any, config)
    known = settings.get_config_copy()
    checked: dict[str, Any] = {}
    for key, value in patches.items():
        # torch.compile(options=...) takes a dash for an underscore as well.
        name = str(key).replace("-", "_")
        if name not in known:
            raise OptionError(
                f"inductor[{key!r}]",
                value,
                f"torch._inductor.config has no such setting{close(name, known)} "
                "(torch._inductor.list_options() names all)",
            )
        wanted = settings.get_type(name)
        if get_origin(wanted) is None and isinstance(wanted, type) and not isinstance(value, wanted):
            raise OptionError(f"inductor[{key!r}]", value, f"the setting takes a value of type {wanted.__name__}")
        checked[name] = value
    return checked


def _dump(folder: object) -> None:
    if folder is None:
        return
    remedy = "give the path of a folder (it is made when needed), or None"
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise OptionError("dump", folder, remedy)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise OptionError("dump", folder, f"there is a file of that name: {remedy}")


def _stable(value: object) -> str:
    """A text that is equal in every process: no address, no order of a set."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{_stable(k)}: {_stable(v)}" for k, v in value.items())) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(_stable(item) for item in value)) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_stable(item) for item in value) + ")"
    # Functions and classes are named; an Inductor pass given as an object counts by its class.
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"<{getattr(named, '__module__', '?')}.{getattr(named, '__qualname__', '?')}>"
