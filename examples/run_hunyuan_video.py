"""HunyuanVideo."""

from __future__ import annotations

import argparse
from typing import Any

from running import Example, main

TEXT = 64  # tokens of the small one's prompt
CHANNELS = 4  # of its latents
WIDTH = 32  # of its text encoders


def small(options: argparse.Namespace) -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import LlamaConfig, LlamaModel, LlamaTokenizer

    from running.small import clip_encoder, clip_tokenizer, drawn, letters_tokenizer

    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    clip = clip_tokenizer(77)
    return HunyuanVideoPipeline(
        tokenizer=letters_tokenizer(LlamaTokenizer, specials, pad_token="<pad>"),
        text_encoder=drawn(
            LlamaModel,
            config=LlamaConfig(
                vocab_size=300,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=2,
            ),
        ),
        tokenizer_2=clip,
        text_encoder_2=clip_encoder(clip, WIDTH),
        vae=drawn(
            AutoencoderKLHunyuanVideo,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            latent_channels=CHANNELS,
            block_out_channels=(8,) * 4,
            layers_per_block=1,
            norm_num_groups=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=drawn(
            HunyuanVideoTransformer3DModel,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=3,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=2,
            patch_size_t=1,
            text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
        ),
    )


EXAMPLE = Example(
    name="hunyuan_video",
    pipeline="HunyuanVideoPipeline",
    model="hunyuanvideo-community/HunyuanVideo",
    prompt="a dog runs through deep snow",
    small=small,
    call=dict(
        height=64,
        width=96,
        num_frames=5,
        num_inference_steps=20,
        max_sequence_length=TEXT,
        prompt_template={"template": "{}", "crop_start": 0},
    ),
    model_call=dict(height=720, width=1280, num_frames=129, num_inference_steps=30),
    fps=15,
    rdt=0.4,
)

if __name__ == "__main__":
    main(EXAMPLE)
