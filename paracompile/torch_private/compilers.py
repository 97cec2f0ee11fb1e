"""What compiles graphs: Inductor, its settings, and what stands in its place. As in `paracompile.torch_private`."""

from torch._dynamo.backends.debugging import aot_eager  # AOTAutograd without a compiler behind it
from torch._inductor import (
    config,  # all settings: `get_config_copy` names them, `get_type` says what each takes
    cpp_builder,  # `pick_vec_isa` imports it late, which a thread beside Dynamo must not
    list_mode_options,  # the settings that each mode stands for
)
from torch._inductor.async_compile import AsyncCompile  # builds kernels in other threads; `wait` waits for them
from torch._inductor.compile_fx import compile_fx  # Inductor
from torch._inductor.cpu_vec_isa import pick_vec_isa  # tries, once, which vector instructions there are
from torch._inductor.custom_graph_pass import CustomGraphPass  # a pass in Inductor, known to its caches
from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering  # makes nodes wait for others
