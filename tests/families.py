"""Small instances of diffusers' own transformers, every parameter random, with inputs.

adaLN-zero and zero-initialised heads would hide every mistake, so EVERY floating point parameter and buffer-like
table is redrawn with a standard deviation of 1/sqrt(fan in). Sizes (batch, heads, head size, lengths) are pairwise
different, so that no two equal numbers can hide a dimension taken for another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from random_tensors import draw, randomise
from torch import nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How to build one family's model and inputs, and what its sharded graph must look like.

    attributes:
        build: makes the model (random parameters) and keyword inputs for it.
        self_attentions: attentions over the sharded sequence in the small model.
        cross_attentions: attentions to keys that stay replicated.
    """

    build: Callable[[], tuple[nn.Module, Inputs]]
    self_attentions: int
    cross_attentions: int = 0


def flux(heads: int = 4, image: tuple[int, int] = (6, 8), text: int = 12, batch: int = 3) -> tuple[nn.Module, Inputs]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=20,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=28,
        pooled_projection_dim=36,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    rows, columns = image
    image_ids = torch.zeros(rows, columns, 3)
    image_ids[..., 1] += torch.arange(rows)[:, None]
    image_ids[..., 2] += torch.arange(columns)[None]
    inputs = dict(
        hidden_states=draw(batch, rows * columns, 20),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        pooled_projections=draw(batch, 36, seed=3),
        timestep=torch.linspace(0.3, 0.9, batch),
        img_ids=image_ids.reshape(-1, 3),
        txt_ids=torch.zeros(text, 3),
        guidance=torch.linspace(2.0, 4.0, batch),
        return_dict=False,
    )
    return randomise(model), inputs


def stable_diffusion_3(
    heads: int = 4, size: tuple[int, int] = (12, 16), text: int = 20, batch: int = 3, dual: bool = True
) -> tuple[nn.Module, Inputs]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=5,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=28,
        caption_projection_dim=16 * heads,
        pooled_projection_dim=36,
        out_channels=5,
        pos_embed_max_size=24,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm",
    )
    inputs = dict(
        hidden_states=draw(batch, 5, *size),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        pooled_projections=draw(batch, 36, seed=3),
        timestep=torch.linspace(100.0, 900.0, batch),
        return_dict=False,
    )
    return randomise(model), inputs


def wan(
    heads: int = 4, size: tuple[int, int, int] = (3, 8, 12), text: int = 20, batch: int = 2, image: int | None = None
) -> tuple[nn.Module, Inputs]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=18,
        in_channels=5,
        out_channels=5,
        text_dim=28,
        freq_dim=32,
        ffn_dim=104,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        image_dim=44 if image else None,
        added_kv_proj_dim=18 * heads if image else None,
        rope_max_seq_len=32,
    )
    inputs = dict(
        hidden_states=draw(batch, 5, *size),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        timestep=torch.linspace(100.0, 900.0, batch),
        return_dict=False,
    )
    if image:
        inputs["encoder_hidden_states_image"] = draw(batch, image, 44, seed=3)
    return randomise(model), inputs


def cogvideox(
    heads: int = 4, size: tuple[int, int, int] = (3, 8, 12), text: int = 20, batch: int = 2, rotary: bool = True
) -> tuple[nn.Module, Inputs]:
    from diffusers import CogVideoXTransformer3DModel

    frames, height, width = size
    model = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=16,
        in_channels=5,
        out_channels=5,
        time_embed_dim=24,
        text_embed_dim=28,
        num_layers=3,
        sample_width=width,
        sample_height=height,
        sample_frames=4 * (frames - 1) + 1,
        patch_size=2,
        max_text_seq_length=text,
        use_rotary_positional_embeddings=rotary,
    )
    tokens = frames * height * width // 4
    inputs = dict(
        hidden_states=draw(batch, frames, 5, height, width),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        timestep=torch.linspace(100.0, 900.0, batch),
        return_dict=False,
    )
    if rotary:
        angles = draw(tokens, 8, seed=4).repeat_interleave(2, dim=1)
        inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
    return randomise(model), inputs


def padding_mask(batch: int, text: int, hidden: tuple[int, ...] = (5, 0, 2)) -> torch.Tensor:
    """A boolean mask (batch, text) whose rows have different real lengths."""
    mask = torch.ones(batch, text, dtype=torch.bool)
    for row in range(batch):
        mask[row, text - hidden[row % len(hidden)] :] = False
    return mask


def hunyuan_video(
    heads: int = 4,
    size: tuple[int, int, int] = (3, 8, 12),
    text: int = 20,
    batch: int = 2,
    condition: str | None = None,
) -> tuple[nn.Module, Inputs]:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=5,
        out_channels=5,
        num_attention_heads=heads,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=3.0,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=28,
        pooled_projection_dim=36,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=condition,
    )
    inputs = dict(
        hidden_states=draw(batch, 5, *size),
        timestep=torch.linspace(100.0, 900.0, batch),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        encoder_attention_mask=padding_mask(batch, text).long(),
        pooled_projections=draw(batch, 36, seed=3),
        guidance=torch.linspace(2000.0, 4000.0, batch),
        return_dict=False,
    )
    return randomise(model), inputs


def ltx_video(
    heads: int = 4, size: tuple[int, int, int] = (3, 4, 6), text: int = 20, batch: int = 2
) -> tuple[nn.Module, Inputs]:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=10,
        out_channels=10,
        num_attention_heads=heads,
        attention_head_dim=18,
        cross_attention_dim=18 * heads,
        num_layers=2,
        caption_channels=28,
    )
    frames, height, width = size
    inputs = dict(
        hidden_states=draw(batch, frames * height * width, 10),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        timestep=torch.linspace(100.0, 900.0, batch),
        encoder_attention_mask=padding_mask(batch, text).long(),
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(0.3, 32.0, 32.0),
        return_dict=False,
    )
    return randomise(model), inputs


def qwen_image(
    heads: int = 4, image: tuple[int, int] = (6, 8), text: int = 20, batch: int = 2
) -> tuple[nn.Module, Inputs]:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=20,
        out_channels=5,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=28,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = dict(
        hidden_states=draw(batch, image[0] * image[1], 20),
        encoder_hidden_states=draw(batch, text, 28, seed=2),
        encoder_hidden_states_mask=padding_mask(batch, text),
        timestep=torch.linspace(0.1, 0.9, batch),
        img_shapes=[[(1, *image)]] * batch,
        return_dict=False,
    )
    return randomise(model), inputs


def mochi(
    heads: int = 4, size: tuple[int, int, int] = (3, 8, 12), text: int = 20, batch: int = 2
) -> tuple[nn.Module, Inputs]:
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=heads,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=36,
        in_channels=5,
        text_embed_dim=32,
        time_embed_dim=28,
        max_sequence_length=text,
    )
    inputs = dict(
        hidden_states=draw(batch, 5, *size),
        encoder_hidden_states=draw(batch, text, 32, seed=2),
        timestep=torch.linspace(100.0, 900.0, batch),
        encoder_attention_mask=padding_mask(batch, text),
        return_dict=False,
    )
    return randomise(model), inputs


FAMILIES: dict[str, Family] = {
    "flux": Family(flux, self_attentions=4),
    "stable_diffusion_3": Family(stable_diffusion_3, self_attentions=4),
    "wan": Family(wan, self_attentions=3, cross_attentions=3),
    "cogvideox": Family(cogvideox, self_attentions=3),
}

MASKED_FAMILIES: dict[str, Family] = {
    "hunyuan_video": Family(hunyuan_video, self_attentions=4),
    "ltx_video": Family(ltx_video, self_attentions=2, cross_attentions=2),
    "qwen_image": Family(qwen_image, self_attentions=2),
    "mochi": Family(mochi, self_attentions=2),
}
"""Families whose text is padded and masked."""

ALL_FAMILIES = FAMILIES | MASKED_FAMILIES
