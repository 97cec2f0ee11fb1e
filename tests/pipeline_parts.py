"""The small random parts of the pipelines in `pipelines`: models, VAEs, pictures.

Transformers that `families`, `more_families` and `pieces` have are taken from there, some with another configuration.
Each function makes a new part, always the same one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from random_tensors import draw, randomise
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

HEIGHT, WIDTH = 48, 64  # of pictures, eight times those of their latents


def like(kind: str, model: Callable[[], tuple[Any, Any]], **config: Any) -> Callable[[], nn.Module]:
    """What makes a model of this class with the configuration of another one, where it takes it, and these changes."""

    def make() -> nn.Module:
        made = getattr(diffusers, kind)
        taken = inspect.signature(made.__init__).parameters
        given = {name: value for name, value in model()[0].config.items() if name in taken}
        return randomise(made(**{**given, **config}))

    return make


def changed(model: Callable[[], tuple[nn.Module, Any]], *, seed: int = 0, **config: Any) -> Callable[[], nn.Module]:
    """What makes a family's model, or one with another configuration."""

    def make() -> nn.Module:
        made = model()[0]
        return randomise(like(type(made).__name__, model, **config)(), seed)

    return make


def small(kind: str, **config: Any) -> Callable[[], nn.Module]:
    """What makes a model of this class and configuration."""
    return lambda: randomise(getattr(diffusers, kind)(**config))


# Transformers of no family

_HEADS = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 3}

cosmos = small(
    "CosmosTransformer3DModel",
    **_HEADS,
    in_channels=5,
    out_channels=5,
    mlp_ratio=2,
    text_embed_dim=28,
    adaln_lora_dim=8,
    max_size=(4, 16, 16),
    encoder_hidden_states_channels=28,
    concat_padding_mask=False,  # it would be resized by torchvision
)
kandinsky5 = small(
    "Kandinsky5Transformer3DModel",
    in_visual_dim=5,
    out_visual_dim=5,
    in_text_dim=28,
    in_text_dim2=36,
    time_dim=32,
    model_dim=64,
    ff_dim=104,
    num_text_blocks=1,
    num_visual_blocks=3,
    axes_dims=(4, 6, 6),
)
pixart = small(
    "PixArtTransformer2DModel",
    **_HEADS,
    in_channels=5,
    out_channels=10,
    cross_attention_dim=64,
    caption_channels=28,
    sample_size=32,
    use_additional_conditions=False,
)
cogview4 = small(
    "CogView4Transformer2DModel",
    **_HEADS,
    in_channels=5,
    out_channels=5,
    text_embed_dim=28,
    time_embed_dim=24,
    condition_dim=6,
    pos_embed_max_size=24,
    sample_size=16,
    rope_axes_dim=(8, 8),
)
dit = small("DiTTransformer2DModel", **_HEADS, in_channels=5, out_channels=10, sample_size=8)
allegro = small(
    "AllegroTransformer3DModel",
    num_attention_heads=4,
    attention_head_dim=18,
    in_channels=5,
    out_channels=5,
    num_layers=3,
    cross_attention_dim=72,
    caption_channels=28,
    sample_height=8,
    sample_width=8,
    sample_frames=8,
)
hunyuan_image = small(
    "HunyuanImageTransformer2DModel",
    in_channels=5,
    out_channels=5,
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=1,
    text_embed_dim=28,
    text_embed_2_dim=20,
    rope_axes_dim=(8, 8),
)
prx = small(
    "PRXTransformer2DModel",
    in_channels=5,
    context_in_dim=28,
    hidden_size=64,
    mlp_ratio=2.0,
    num_heads=4,
    depth=3,
    axes_dim=[8, 8],
)
easyanimate = small(
    "EasyAnimateTransformer3DModel",
    **_HEADS,
    in_channels=5,
    out_channels=5,
    patch_size=2,
    sample_width=WIDTH // 8,
    sample_height=HEIGHT // 8,
    mmdit_layers=3,
    time_embed_dim=24,
    text_embed_dim=28,
)
consis_id = small(
    "ConsisIDTransformer3DModel",
    **_HEADS,
    in_channels=10,
    out_channels=5,
    time_embed_dim=24,
    text_embed_dim=28,
    sample_height=HEIGHT // 8,
    sample_width=WIDTH // 8,
    sample_frames=9,
    max_text_seq_length=12,
    is_train_face=True,
    cross_attn_interval=1,
    cross_attn_dim_head=8,
    cross_attn_num_heads=2,
    LFE_id_dim=6,
    LFE_vit_dim=6,
    LFE_depth=5,
    LFE_dim_head=8,
    LFE_num_heads=2,
    LFE_num_id_token=1,
    LFE_num_querie=3,
    LFE_output_dim=42,  # two thirds of the width
    LFE_ff_mult=1,
    LFE_num_scale=1,
)
hunyuan_video_15 = small(
    "HunyuanVideo15Transformer3DModel",
    in_channels=5 + 5 + 1,
    out_channels=5,
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=3,
    num_refiner_layers=1,
    text_embed_dim=28,
    text_embed_2_dim=20,
    image_embed_dim=24,
    rope_axes_dim=(4, 6, 6),
    target_size=16,
)
_STEP = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 104}
ace_step = small(
    "AceStepTransformer1DModel",
    **_STEP,
    hidden_size=64,
    num_hidden_layers=3,
    in_channels=24,
    audio_acoustic_hidden_dim=8,
    sliding_window=4,
)


# Text


def letters() -> Any:
    """A tokenizer of one token a character."""
    vocabulary = {character: number for number, character in enumerate(["<pad>", *map(chr, range(32, 127))])}
    by_letter = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    by_letter.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=by_letter, pad_token="<pad>", unk_token="<pad>")


def qwen3() -> nn.Module:
    """A language model as an encoder."""
    config = transformers.Qwen3Config(**_STEP, vocab_size=128, hidden_size=28, num_hidden_layers=1)
    return randomise(transformers.Qwen3Model(config))


def ace_step_conditions() -> nn.Module:
    """What encodes text, lyrics and timbre."""
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    made = AceStepConditionEncoder(
        **_STEP,
        hidden_size=64,
        text_hidden_dim=28,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    )
    made.silence_latent = draw(1, 50, 8, seed=9)
    return randomise(made)


# VAEs


def vae(channels: int = 5, kind: str = "AutoencoderKL", **config: Any) -> nn.Module:
    """One of pictures, whose latents are an eighth as high and wide."""
    return small(
        kind,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        **config,
    )()


picture_vae = partial(vae, shift_factor=0.1, scaling_factor=0.5)
flux2_vae = partial(vae, kind="AutoencoderKLFlux2")
cogvideox_vae = small(
    "AutoencoderKLCogVideoX", latent_channels=5, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2
)
magvit = small(
    "AutoencoderKLMagvit", latent_channels=5, block_out_channels=[4] * 4, layers_per_block=1, norm_num_groups=2
)


def vae_in_time(kind: str) -> Callable[[], nn.Module]:
    """One of videos, whose latents are a quarter as long besides."""
    return small(
        kind,
        base_dim=4,
        z_dim=5,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 5,
        latents_std=[2.0] * 5,
    )


# Others


class NoChecks:
    """Stands for the checker of texts and pictures that Cosmos asks for."""

    def to(self, device: str | torch.device) -> NoChecks:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True


def picture(seed: int) -> Tensor:
    return torch.sigmoid(draw(1, 3, HEIGHT, WIDTH, seed=seed))


def video(seed: int) -> list[Tensor]:
    return list(torch.sigmoid(draw(9, 3, HEIGHT, WIDTH, seed=seed)))


def mask(seed: int) -> Tensor:
    """Of a picture: what is painted anew."""
    return (draw(1, 1, HEIGHT, WIDTH, seed=seed) > 0).float()
