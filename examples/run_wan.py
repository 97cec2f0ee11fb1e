"""Wan, text to video: 2.1, or 2.2 whose steps two transformers share."""

from __future__ import annotations

import argparse
from typing import Any

from running import Example, main

TEXT = 64  # tokens of the small one's prompt
CHANNELS = 4  # of its latents


def small(options: argparse.Namespace) -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    from running.small import drawn, t5_encoder, t5_tokenizer

    def transformer() -> WanTransformer3DModel:
        return drawn(
            WanTransformer3DModel,
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=32,
            freq_dim=32,
            ffn_dim=128,
            num_layers=4,
            rope_max_seq_len=32,
        )

    tokenizer = t5_tokenizer(TEXT)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer, 32, UMT5EncoderModel, UMT5Config),
        vae=drawn(
            AutoencoderKLWan,
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * CHANNELS,
            latents_std=[1.0] * CHANNELS,
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer(),
        transformer_2=transformer() if options.two_transformers else None,
        boundary_ratio=0.875 if options.two_transformers else None,
    )


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--two-transformers", action="store_true", help="the small one as Wan 2.2 (a --model has what it has)"
    )


EXAMPLE = Example(
    name="wan",
    pipeline="WanPipeline",
    model="Wan-AI/Wan2.1-T2V-14B-Diffusers or Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    prompt="a cat walks over a wooden table towards the window, the light of an early morning",
    small=small,
    flags=flags,
    dtypes={"vae": "float32"},
    call=dict(height=64, width=96, num_frames=5, num_inference_steps=20, max_sequence_length=TEXT),
    model_call=dict(height=720, width=1280, num_frames=81, num_inference_steps=40),
    fps=16,
    rdt=0.1,
)

if __name__ == "__main__":
    main(EXAMPLE)
