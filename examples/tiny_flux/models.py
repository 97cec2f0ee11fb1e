"""The parts of the small FLUX pipeline: diffusers' and transformers' own classes, with initial weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from pictures import COLOURS, PICTURE_SIZE, POSITIONS, RADII, SHAPES
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

TEXT_TOKENS = 16
"""Tokens of a prompt, padding included, for either text encoder: the longest prompt needs 14."""

CALL = dict(height=PICTURE_SIZE, width=PICTURE_SIZE, max_sequence_length=TEXT_TOKENS)
"""What every call of the pipeline needs: its own defaults are FLUX's, 128 times the factor of the autoencoder."""

HEADS = 4
HEAD_SIZE = 24
DOUBLE_BLOCKS = 2
SINGLE_BLOCKS = 3
TEXT_WIDTH = 64
LATENT_CHANNELS = 4
VAE_FACTOR = 2


def words() -> list[str]:
    """Every word of every prompt, in a fixed order."""
    text = ["a on background", *RADII, *COLOURS, *SHAPES, *POSITIONS]
    return list(dict.fromkeys(" ".join(text).split()))


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """CLIP's tokenizer with one token for each word of the prompts; other words are spelled out by the byte."""
    symbols = sorted(ByteLevel.alphabet())
    pieces = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    merges: list[tuple[str, str]] = []
    for word in words():
        spelled = [*word[:-1], word[-1] + "</w>"]
        # Later merges come second to earlier ones, so a new word cannot break up those before it.
        for merge in merges:
            spelled = merge_pair(spelled, merge)
        while len(spelled) > 1:
            merges.append((spelled[0], spelled[1]))
            pieces.append(spelled[0] + spelled[1])
            spelled = merge_pair(spelled, merges[-1])
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_TOKENS)


def merge_pair(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def t5_tokenizer() -> PreTrainedTokenizerBase:
    """T5's tokenizer with one token for each word of the prompts; other words are spelled out by the letter."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    whole = [("▁" + word, -1.0) for word in words()]
    characters = [(chr(code), -8.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=[*specials, *whole, *characters], extra_ids=0, model_max_length=TEXT_TOKENS)


def clip_encoder(tokenizer: PreTrainedTokenizerBase) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def t5_encoder(tokenizer: PreTrainedTokenizerBase) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=TEXT_WIDTH // 4,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def autoencoder() -> AutoencoderKL:
    """Halves height and width. It has no attention: flat shapes need none."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=PICTURE_SIZE,
    )


def flux_transformer() -> FluxTransformer2DModel:
    """Starts as DiT does: every block the identity, the output zero."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 10, 10),
    )
    heads = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        heads += [block.norm1.linear, block.norm1_context.linear]
    heads += [block.norm.linear for block in transformer.single_transformer_blocks]
    for head in heads:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return transformer


def build_pipeline(seed: int = 0) -> FluxPipeline:
    """The pipeline before training. Equal seeds give equal weights."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=flux_transformer(),
    )
