"""LTX-Video."""

from __future__ import annotations

import argparse
from typing import Any

from running import Example, main

TEXT = 64  # tokens of the small one's prompt
CHANNELS = 8  # of its latents


def small(options: argparse.Namespace) -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    from running.small import drawn, t5_encoder, t5_tokenizer

    tokenizer = t5_tokenizer(TEXT)
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=drawn(
            AutoencoderKLLTXVideo,
            latent_channels=CHANNELS,
            block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 3,
            layers_per_block=(1,) * 4,
            decoder_layers_per_block=(1,) * 4,
            spatio_temporal_scaling=(True, True, True),
            decoder_spatio_temporal_scaling=(True, True, True),
            decoder_inject_noise=(False,) * 4,
            downsample_type=("conv",) * 3,
            upsample_residual=(False,) * 3,
            upsample_factor=(1,) * 3,
            decoder_causal=False,
        ),
        text_encoder=t5_encoder(tokenizer, 32),
        tokenizer=tokenizer,
        transformer=drawn(
            LTXVideoTransformer3DModel,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=4,
            attention_head_dim=16,
            cross_attention_dim=64,
            num_layers=4,
            caption_channels=32,
        ),
    )


EXAMPLE = Example(
    name="ltx",
    pipeline="LTXPipeline",
    model="Lightricks/LTX-Video",
    prompt="waves roll onto a beach of black sand, seen from above",
    small=small,
    call=dict(height=128, width=192, num_frames=17, num_inference_steps=20, max_sequence_length=TEXT),
    model_call=dict(height=512, width=704, num_frames=161, num_inference_steps=50),
    fps=24,
    rdt=0.1,
)

if __name__ == "__main__":
    main(EXAMPLE)
