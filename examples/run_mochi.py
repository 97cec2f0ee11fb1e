"""Mochi 1."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from running import Example, main

TEXT = 64  # tokens of the small one's prompt
CHANNELS = 12  # of its latents


def small(options: argparse.Namespace) -> Any:
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

    from running.small import drawn, t5_encoder, t5_tokenizer

    # It asks for float32 by autocast, which a CPU does not know and float32 does not need.
    warnings.filterwarnings("ignore", message="(In )?CPU autocast", category=UserWarning)
    tokenizer = t5_tokenizer(TEXT)
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=drawn(
            AutoencoderKLMochi,
            latent_channels=CHANNELS,
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1,) * 5,
            latents_mean=(0.0,) * CHANNELS,
            latents_std=(1.0,) * CHANNELS,
        ),
        text_encoder=t5_encoder(tokenizer, 32),
        tokenizer=tokenizer,
        transformer=drawn(
            MochiTransformer3DModel,
            patch_size=2,
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=4,
            pooled_projection_dim=32,
            in_channels=CHANNELS,
            text_embed_dim=32,
            time_embed_dim=32,
            max_sequence_length=TEXT,
        ),
    )


EXAMPLE = Example(
    name="mochi",
    pipeline="MochiPipeline",
    model="genmo/mochi-1-preview",
    prompt="a hand draws a circle with a piece of chalk",
    small=small,
    call=dict(height=64, width=96, num_frames=7, num_inference_steps=20, max_sequence_length=TEXT),
    model_call=dict(height=480, width=848, num_frames=85, num_inference_steps=64),
    fps=30,
    rdt=0.3,
    fullgraph=True,  # else its graph breaks where it looks which text is padding, and no block is ever skipped
)

if __name__ == "__main__":
    main(EXAMPLE)
