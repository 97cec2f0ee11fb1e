"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import argparse
from typing import Any

from running import Example, main

TEXT = 64  # tokens of the small one's prompt
WIDTH = 32  # of each of its text encoders
CHANNELS = 4  # of its latents


def small(options: argparse.Namespace) -> Any:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    from running.small import clip_encoder, clip_tokenizer, drawn, t5_encoder, t5_tokenizer

    clip, t5 = clip_tokenizer(77), t5_tokenizer(TEXT)
    return StableDiffusion3Pipeline(
        tokenizer=clip,
        text_encoder=clip_encoder(clip, WIDTH, CLIPTextModelWithProjection),
        tokenizer_2=clip,
        text_encoder_2=clip_encoder(clip, WIDTH, CLIPTextModelWithProjection),
        tokenizer_3=t5,
        text_encoder_3=t5_encoder(t5, 2 * WIDTH),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=drawn(
            AutoencoderKL,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4,
            layers_per_block=1,
            latent_channels=CHANNELS,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0,
        ),
        transformer=drawn(
            SD3Transformer2DModel,
            sample_size=16,
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=64,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
        ),
    )


EXAMPLE = Example(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    model="stabilityai/stable-diffusion-3.5-large",
    prompt="a lighthouse of red bricks on a cliff above a calm sea",
    small=small,
    call=dict(height=128, width=128, num_inference_steps=20, max_sequence_length=TEXT),
    model_call=dict(height=1024, width=1024, num_inference_steps=28),
    rdt=0.5,
)

if __name__ == "__main__":
    main(EXAMPLE)
