"""Small instances of more of diffusers' transformers, whose streams lie otherwise: random weights, and inputs.

Here the tokens of text (or time, or memory) join the image's before the first block or in the code between the lists,
and leave them behind the last block, in no module; or a first list has a single block; or blocks are convolutions and
linear attention, which cannot be cut along the tokens. See `families` for what the sizes are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from families import Inputs
from random_tensors import draw, randomise
from torch import nn


@dataclass(frozen=True)
class CachedFamily:
    """How to build one family's model and inputs, and what a first block cache is told of it.

    attributes:
        build: makes the model (random parameters) and keyword inputs for it.
        lists: the lists of its blocks, in the order in which they are run.
        in_turn: a block of each list is run, then the next of each.
        image: the place of the image's stream among what a block returns.
        first_blocks: blocks that are always computed and decide.
        behind: blocks behind the stream, which no setting skips.
        change: of the sample from step to step, by which a skipped step shows.
    """

    build: Callable[[], tuple[nn.Module, Inputs]]
    lists: tuple[str, ...] = ("transformer_blocks",)
    in_turn: bool = False
    image: int = 0
    first_blocks: int = 1
    behind: int = 0
    change: float = 0.01


def image_ids(rows: int, columns: int, axes: int = 3) -> torch.Tensor:
    """The place of each token of an image, as (0, row, column, ...)."""
    ids = torch.zeros(rows, columns, axes)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    return ids.reshape(-1, axes)


def krea2(batch: int = 2, image: tuple[int, int] = (6, 8), text: int = 12) -> tuple[nn.Module, Inputs]:
    from diffusers import Krea2Transformer2DModel

    model = Krea2Transformer2DModel(
        in_channels=20,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=104,
        timestep_embed_dim=32,
        text_hidden_dim=28,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=40,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = dict(
        hidden_states=draw(batch, image[0] * image[1], 20),
        encoder_hidden_states=draw(batch, text, 3, 28, seed=2),
        timestep=torch.linspace(0.3, 0.9, batch),
        position_ids=torch.cat([torch.zeros(text, 3), image_ids(*image)]),
        return_dict=False,
    )
    return randomise(model), inputs


def stable_audio_3(batch: int = 2, length: int = 48, text: int = 20) -> tuple[nn.Module, Inputs]:
    from diffusers import StableAudio3DiTModel

    model = StableAudio3DiTModel(
        io_channels=10,
        embed_dim=64,
        depth=3,
        num_heads=4,
        cond_token_dim=28,
        global_cond_dim=36,
        local_add_cond_dim=11,
        timestep_features_dim=32,
        num_memory_tokens=12,
    )
    inputs = dict(
        hidden_states=draw(batch, 10, length),
        timestep=torch.linspace(0.003, 0.009, batch),  # times up to 62,832, of which sines are taken
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        global_hidden_states=draw(batch, 36, seed=3),
        return_dict=False,
    )
    return randomise(model), inputs


def minimax_music3(batch: int = 2, length: int = 47) -> tuple[nn.Module, Inputs]:
    from diffusers import MiniMaxMusic3Transformer1DModel

    model = MiniMaxMusic3Transformer1DModel(
        in_channels=10,
        condition_dim=28,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=16,
        ff_inner_dim=104,
        rotary_dim=8,
        fourier_embedding_dim=32,
    )
    inputs = dict(
        hidden_states=draw(batch, 10, length),
        timestep=torch.linspace(0.3, 0.9, batch),
        encoder_hidden_states=draw(batch, length, 28, seed=2),
        return_dict=False,
    )
    return randomise(model), inputs


def flux2(
    double: int = 2, single: int = 3, batch: int = 2, image: tuple[int, int] = (6, 8), text: int = 12
) -> tuple[nn.Module, Inputs]:
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        in_channels=20,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=28,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    inputs = dict(
        hidden_states=draw(batch, image[0] * image[1], 20),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        timestep=torch.linspace(0.3, 0.9, batch),
        img_ids=image_ids(*image, axes=4),
        txt_ids=torch.zeros(text, 4),
        return_dict=False,
    )
    return randomise(model), inputs


def auraflow(double: int = 1, batch: int = 2, size: tuple[int, int] = (12, 16), text: int = 4) -> tuple[Any, Inputs]:
    from diffusers import AuraFlowTransformer2DModel

    model = AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=5,
        num_mmdit_layers=double,
        num_single_dit_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=28,
        caption_projection_dim=64,
        out_channels=5,
        pos_embed_max_size=256,
    )
    inputs = dict(
        hidden_states=draw(batch, 5, *size),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        timestep=torch.linspace(0.3, 0.9, batch),
        return_dict=False,
    )
    return randomise(model), inputs


def chroma(double: int = 1, batch: int = 2, image: tuple[int, int] = (6, 8), text: int = 12) -> tuple[Any, Inputs]:
    from diffusers import ChromaTransformer2DModel

    model = ChromaTransformer2DModel(
        in_channels=20,
        num_layers=double,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=28,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=40,
        approximator_layers=2,
    )
    inputs = dict(
        hidden_states=draw(batch, image[0] * image[1], 20),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        timestep=torch.linspace(0.3, 0.9, batch),
        img_ids=image_ids(*image),
        txt_ids=torch.zeros(text, 3),
        return_dict=False,
    )
    return randomise(model), inputs


def bria_fibo(double: int = 1, batch: int = 2, image: tuple[int, int] = (6, 8), text: int = 12) -> tuple[Any, Inputs]:
    from diffusers import BriaFiboTransformer2DModel

    model = BriaFiboTransformer2DModel(
        in_channels=20,
        num_layers=double,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=28,
        axes_dims_rope=(4, 6, 6),
        text_encoder_dim=36,
    )
    inputs = dict(
        hidden_states=draw(batch, image[0] * image[1], 20),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        text_encoder_layers=[draw(batch, text, 36, seed=10 + number) for number in range(double + 3)],
        timestep=torch.linspace(300.0, 900.0, batch),
        img_ids=image_ids(*image),
        txt_ids=torch.zeros(text, 3),
        return_dict=False,
    )
    return randomise(model), inputs


def sana(batch: int = 2, size: tuple[int, int] = (6, 8), text: int = 20) -> tuple[nn.Module, Inputs]:
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=5,
        out_channels=5,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=3,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=28,
        sample_size=32,
    )
    inputs = dict(
        hidden_states=draw(batch, 5, *size),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        timestep=torch.linspace(100.0, 900.0, batch),
        return_dict=False,
    )
    return randomise(model), inputs


def sana_video(batch: int = 2, size: tuple[int, int, int] = (3, 8, 12), text: int = 20) -> tuple[nn.Module, Inputs]:
    from diffusers import SanaVideoTransformer3DModel

    model = SanaVideoTransformer3DModel(
        in_channels=5,
        out_channels=5,
        num_attention_heads=4,
        attention_head_dim=18,
        num_layers=3,
        num_cross_attention_heads=4,
        cross_attention_head_dim=18,
        cross_attention_dim=72,
        caption_channels=28,
        rope_max_seq_len=32,
    )
    inputs = dict(
        hidden_states=draw(batch, 5, *size),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        timestep=torch.linspace(100.0, 900.0, batch),
        return_dict=False,
    )
    return randomise(model), inputs


def hunyuan_dit(batch: int = 2, size: tuple[int, int] = (12, 16), text: int = 20) -> tuple[nn.Module, Inputs]:
    """The last blocks begin with a projection of the stream and what left one of the first."""
    from diffusers import HunyuanDiT2DModel

    model = HunyuanDiT2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=5,
        patch_size=2,
        sample_size=16,
        hidden_size=64,
        num_layers=6,
        mlp_ratio=2.0,
        learn_sigma=False,
        cross_attention_dim=28,
        cross_attention_dim_t5=24,
        pooled_projection_dim=36,
        text_len=text,
        text_len_t5=11,
        use_style_cond_and_image_meta_size=False,
    )
    angles = draw(size[0] * size[1] // 4, 8, seed=4).repeat_interleave(2, dim=1)
    inputs = dict(
        hidden_states=draw(batch, 5, *size),
        timestep=torch.linspace(100.0, 900.0, batch),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        text_embedding_mask=torch.ones(batch, text),
        encoder_hidden_states_t5=draw(batch, 11, 24, seed=3),
        text_embedding_mask_t5=torch.ones(batch, 11),
        image_rotary_emb=(angles.cos(), angles.sin()),
        return_dict=False,
    )
    return randomise(model), inputs


def latte(batch: int = 2, size: tuple[int, int, int] = (3, 8, 12), text: int = 20) -> tuple[nn.Module, Inputs]:
    """Blocks take turns: one list works on the tokens of each frame, the other on the frames of each token."""
    from diffusers import LatteTransformer3DModel

    frames, height, width = size
    model = LatteTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=5,
        out_channels=5,
        num_layers=3,
        cross_attention_dim=64,
        attention_bias=True,
        sample_size=12,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=28,
        video_length=frames,
    )
    inputs = dict(
        hidden_states=draw(batch, 5, frames, height, width),
        timestep=torch.linspace(100.0, 900.0, batch),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        return_dict=False,
    )
    return randomise(model), inputs


_DOUBLE_AND_SINGLE = ("transformer_blocks", "single_transformer_blocks")

MORE_FAMILIES: dict[str, CachedFamily] = {
    "krea2": CachedFamily(krea2),
    "stable_audio_3": CachedFamily(stable_audio_3),
    "minimax_music3": CachedFamily(minimax_music3),
    "flux2": CachedFamily(flux2, _DOUBLE_AND_SINGLE, image=1),
    "flux2-double-at-front": CachedFamily(flux2, _DOUBLE_AND_SINGLE, image=1, first_blocks=2),
    "flux2-single-at-front": CachedFamily(flux2, _DOUBLE_AND_SINGLE, image=1, first_blocks=3),
    "flux2-klein": CachedFamily(partial(flux2, double=1), _DOUBLE_AND_SINGLE, image=1),
    "auraflow": CachedFamily(auraflow, ("joint_transformer_blocks", "single_transformer_blocks"), image=1),
    "chroma": CachedFamily(chroma, _DOUBLE_AND_SINGLE, image=1),
    "bria_fibo": CachedFamily(bria_fibo, _DOUBLE_AND_SINGLE, image=1),
    "hunyuan_dit": CachedFamily(hunyuan_dit, ("blocks",), behind=2, change=1.0),
    "latte": CachedFamily(latte, ("transformer_blocks", "temporal_transformer_blocks"), in_turn=True),
    "latte-both-at-front": CachedFamily(
        latte, ("transformer_blocks", "temporal_transformer_blocks"), in_turn=True, first_blocks=2
    ),
    "sana": CachedFamily(sana),
    "sana_video": CachedFamily(sana_video),
}
