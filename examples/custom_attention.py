"""Attention over sequences that are sharded already: each rank calls it with its own part of q, k and v.

    torchrun --nproc-per-node 2 examples/custom_attention.py

A plain function around `scaled_dot_product_attention`, compiled with `"shard_inputs": False`, becomes attention over
the tokens of all ranks; a rank gets its own queries' result. Shards are cut as `torch.chunk` cuts, a mask of keys too.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F

import paracompile


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1001, help="length of the whole sequence (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--ring", type=int, default=1, help="size of the ring axis (default: %(default)s)")
    parser.add_argument("--compiler", default="inductor", help="(default: %(default)s)")
    options = parser.parse_args()

    device = torch.device("cuda", dist.get_node_local_rank(0)) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = paracompile.init_mesh(device.type, max_ring_dim_size=options.ring)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    # The same sequence on every rank, of which each keeps its own part.
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, options.heads, options.tokens, 64, generator=generator).to(device) for _ in range(3))
    hidden = torch.arange(options.tokens, device=device) < options.tokens - 100
    sharded = torch.compile(
        attention,
        backend="paracompile",
        options={"mesh": mesh, "shard_inputs": False, "compiler": options.compiler},
    )
    own = [torch.chunk(x, ranks, dim=2)[rank] for x in (q, k, v)]
    with torch.no_grad():
        for name, mask in (("no mask", None), ("padding", hidden[None, None, None])):
            expected = torch.chunk(attention(q, k, v, mask), ranks, dim=2)[rank]
            part = None if mask is None else torch.chunk(mask, ranks, dim=3)[rank]
            difference = (sharded(*own, part) - expected).abs().max()
            dist.all_reduce(difference, dist.ReduceOp.MAX)
            if rank == 0:
                print(f"{name}: {options.tokens} tokens on {ranks} ranks, largest difference {difference.item():.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
