"""A whole FluxPipeline of diffusers' and transformers' own classes, small and with random weights.

Nothing is downloaded: the tokenizers spell words out letter by letter, and every parameter is drawn at random, so that
no zero-initialised gate or head hides a part of the model. The pictures are textures without meaning; what they are
good for is to be equal, or not, between two ways of running the same model.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT_TOKENS = 64
"""T5 tokens to ask the pipeline for (`max_sequence_length`), so that the text divides by 2, 4, ... ranks."""

HEADS = 8
HEAD_SIZE = 32
CLIP_WIDTH = 48
T5_WIDTH = 56
LATENT_CHANNELS = 16

Module = TypeVar("Module", bound=nn.Module)


def randomise(module: Module, generator: torch.Generator) -> Module:
    """Draws every parameter anew with a standard deviation of 1/sqrt(fan in), the scales of norms around 1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            values = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
            parameter.copy_(values + is_scale)
    return module.eval().requires_grad_(False)


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """CLIP's tokenizer with a vocabulary of single bytes, with and without its mark for the end of a word."""
    symbols = sorted(ByteLevel.alphabet())
    pieces = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer() -> PreTrainedTokenizerBase:
    """T5's tokenizer with a vocabulary of the printable ASCII characters."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    characters = [(chr(code), -4.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=[*specials, *characters], extra_ids=0, model_max_length=TEXT_TOKENS)


def build_flux_pipeline(seed: int = 0) -> FluxPipeline:
    """Builds the pipeline, in float32 on the CPU. Equal seeds give equal weights, on every rank alike."""
    generator = torch.Generator().manual_seed(seed)

    tokenizer = clip_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )

    tokenizer_2 = t5_tokenizer()
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=T5_WIDTH,
            d_kv=14,
            d_ff=2 * T5_WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )

    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )

    vae = randomise(vae, generator)
    vae.decoder.conv_out.weight.mul_(0.5)  # few pixels are clamped then: clamping would hide differences
    vae.decoder.conv_out.bias.mul_(0.5)

    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=4096
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=randomise(text_encoder, generator),
        tokenizer=tokenizer,
        text_encoder_2=randomise(text_encoder_2, generator),
        tokenizer_2=tokenizer_2,
        transformer=randomise(transformer, generator),
    )
