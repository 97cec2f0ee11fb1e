"""SageAttention (8-bit products of queries and keys) as the kernel of a pipeline's attention, on one GPU or several.

    python examples/sage_attention.py --model black-forest-labs/FLUX.1-dev
    torchrun --nproc-per-node 2 examples/sage_attention.py --model black-forest-labs/FLUX.1-dev

Needs the package `sageattention` and a GPU that it has kernels for. Any other kernel is passed on in the same way: a
function of (rows, heads, tokens, size), which also returns each row's LSE where it is to serve in a ring.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor

import paracompile


def sage(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention without a mask; masked ones stay with PyTorch, as there is no parameter `mask`."""
    from sageattention import sageattn

    made: Tensor | tuple[Tensor, Tensor] = sageattn(
        query, key, value, tensor_layout="HND", sm_scale=scale, return_lse=return_lse
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a pipeline of diffusers")
    parser.add_argument("--prompt", default="a red circle on a blue background", help="(default: %(default)s)")
    options = parser.parse_args()
    from diffusers import DiffusionPipeline

    ranks = dist.is_torchelastic_launched()
    if ranks:
        dist.init_process_group("nccl")
        torch.cuda.set_device(dist.get_node_local_rank())
    pipe = DiffusionPipeline.from_pretrained(options.model, dtype=torch.bfloat16).to("cuda")
    paracompile.parallelize(pipe, attention=sage, report=print)
    (image, *_) = pipe(options.prompt).images
    if not ranks or dist.get_rank() == 0:
        image.save("sage.png")


if __name__ == "__main__":
    main()
