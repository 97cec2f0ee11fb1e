"""CogVideoX."""

from __future__ import annotations

import argparse
from typing import Any

from running import Example, main

TEXT = 64  # tokens of the small one's prompt
CHANNELS = 4  # of its latents
HEIGHT, WIDTH, FRAMES = 64, 96, 9


def small(options: argparse.Namespace) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    from running.small import drawn, t5_encoder, t5_tokenizer

    tokenizer = t5_tokenizer(TEXT)
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer, 32),
        vae=drawn(
            AutoencoderKLCogVideoX,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8,) * 4,
            latent_channels=CHANNELS,
            layers_per_block=1,
            norm_num_groups=4,
        ),
        transformer=drawn(
            CogVideoXTransformer3DModel,
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            time_embed_dim=32,
            text_embed_dim=32,
            num_layers=4,
            sample_width=WIDTH // 8,
            sample_height=HEIGHT // 8,
            sample_frames=FRAMES,
            patch_size=2,
            max_text_seq_length=TEXT,
            use_rotary_positional_embeddings=True,
        ),
        scheduler=CogVideoXDDIMScheduler(),
    )


EXAMPLE = Example(
    name="cogvideox",
    pipeline="CogVideoXPipeline",
    model="THUDM/CogVideoX-5b",
    prompt="a small boat crosses a lake between two mountains",
    small=small,
    call=dict(height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=20, max_sequence_length=TEXT),
    model_call=dict(height=480, width=720, num_frames=49, num_inference_steps=50),
    fps=8,
    rdt=0.4,
)

if __name__ == "__main__":
    main(EXAMPLE)
