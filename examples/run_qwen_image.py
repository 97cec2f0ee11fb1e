"""Qwen-Image."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from running import Example, main

TEXT = 64  # tokens of the small one's prompt
WIDTH = 32  # of its text encoder
CHANNELS = 4  # of its latents


def small(options: argparse.Namespace) -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    from running.small import drawn, letters_tokenizer

    # Its rotary embeddings are complex numbers, which Inductor leaves to PyTorch.
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex operators")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    encoder = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=300,
            bos_token_id=0,
            eos_token_id=2,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            rope_parameters={"type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        ),
        vision_config=dict(
            depth=1, hidden_size=WIDTH, intermediate_size=WIDTH, num_heads=2, out_hidden_size=WIDTH, patch_size=14
        ),
    )
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=drawn(
            AutoencoderKLQwenImage,
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * CHANNELS,
            latents_std=[1.0] * CHANNELS,
        ),
        text_encoder=drawn(Qwen2_5_VLForConditionalGeneration, config=encoder),
        tokenizer=letters_tokenizer(Qwen2Tokenizer, specials),
        transformer=drawn(
            QwenImageTransformer2DModel,
            patch_size=2,
            in_channels=4 * CHANNELS,
            out_channels=CHANNELS,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx = "{}", 0  # no words around the prompt
    return pipeline


EXAMPLE = Example(
    name="qwen_image",
    pipeline="QwenImagePipeline",
    model="Qwen/Qwen-Image",
    prompt="a shop window with a sign that says OPEN",
    small=small,
    call=dict(
        negative_prompt="blurred, of low quality, badly lit, dull",  # as long as the prompt: one graph serves both
        height=128,
        width=128,
        num_inference_steps=20,
        true_cfg_scale=4.0,
        max_sequence_length=TEXT,
    ),
    model_call=dict(negative_prompt=" ", height=1328, width=1328, num_inference_steps=50, true_cfg_scale=4.0),
    rdt=0.5,
)

if __name__ == "__main__":
    main(EXAMPLE)
