"""What each pass makes of a small FLUX, as one of two ranks sees it: one file a pass.

    python examples/dump_passes.py output/passes

One double and two single blocks, with the first block cache. One process stands for rank 0 of two; nothing is sent.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from torch.testing._internal.distributed.fake_pg import FakeStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="gets the graphs")
    parser.add_argument("--rdt", type=float, default=0.1, help="threshold of the first block cache")
    parser.add_argument("--image-tokens", type=int, default=64)
    arguments = parser.parse_args()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=4,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    model.eval().requires_grad_(False)
    options = {"dump": arguments.folder, "rdt": arguments.rdt, "compiler": "eager"}
    compiled = torch.compile(model, backend="paracompile", fullgraph=True, options=options)
    with torch.no_grad():
        compiled(
            hidden_states=torch.randn(1, arguments.image_tokens, 16),
            encoder_hidden_states=torch.randn(1, 12, 32),
            pooled_projections=torch.randn(1, 32),
            img_ids=torch.zeros(arguments.image_tokens, 3),
            txt_ids=torch.zeros(12, 3),
            timestep=torch.ones(1),
        )
    print(f"the graphs are in {arguments.folder}/graph_0_0/rank_0")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
