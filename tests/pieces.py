"""Small instances of diffusers' transformers whose graph Dynamo breaks, all but the last: they run in pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from families import Inputs
from random_tensors import draw, randomise
from torch import Tensor, nn


def lumina2(batch: int = 2) -> tuple[nn.Module, Inputs]:
    """Breaks where the longest prompt's length is read, before all blocks."""
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=6,
        hidden_size=64,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(60, 32, 32),
        cap_feat_dim=28,
    )
    mask = torch.ones(batch, 12, dtype=torch.bool)
    mask[0, 9:] = False
    inputs = dict(
        hidden_states=draw(batch, 6, 12, 16),
        timestep=torch.linspace(0.3, 0.7, batch),
        encoder_hidden_states=draw(batch, 12, 28, seed=2),
        encoder_attention_mask=mask,
        return_dict=False,
    )
    return randomise(model), inputs


def glm_image(batch: int = 2) -> tuple[nn.Module, Inputs]:
    """Breaks where dropped prior tokens are written by a mask, before all blocks."""
    from diffusers import GlmImageTransformer2DModel

    model = GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=6,
        out_channels=6,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        text_embed_dim=28,
        time_embed_dim=36,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=30,
    )
    inputs = dict(
        hidden_states=draw(batch, 6, 12, 16),
        encoder_hidden_states=draw(batch, 9, 28, seed=2),
        prior_token_id=torch.arange(48).expand(batch, 48) % 30,
        prior_token_drop=torch.zeros(batch, 48, dtype=torch.bool),
        timestep=torch.linspace(300, 700, batch),
        target_size=torch.tensor([[24.0, 32.0]] * batch),
        crop_coords=torch.zeros(batch, 2),
        return_dict=False,
    )
    return randomise(model), inputs


def hunyuan_video_15(batch: int = 2) -> tuple[nn.Module, Inputs]:
    """Breaks at a question to a tensor, and in a loop: the blocks are compiled one by one."""
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=3,
        num_refiner_layers=1,
        text_embed_dim=28,
        text_embed_2_dim=20,
        image_embed_dim=24,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        task_type="t2v",
    )
    mask, mask_2 = torch.zeros(batch, 12), torch.zeros(batch, 7)
    mask[:, :9] = mask_2[:, :5] = 1
    mask[0, 7:] = 0
    inputs = dict(
        hidden_states=draw(batch, 9, 3, 6, 8),
        timestep=torch.linspace(300, 700, batch),
        encoder_hidden_states=draw(batch, 12, 28, seed=2),
        encoder_attention_mask=mask,
        encoder_hidden_states_2=draw(batch, 7, 20, seed=3),
        encoder_attention_mask_2=mask_2,
        image_embeds=torch.zeros(batch, 5, 24),
        return_dict=False,
    )
    return randomise(model), inputs


def hidream(batch: int = 2) -> tuple[nn.Module, Inputs]:
    """Breaks in each block, at its mixture of experts: which tokens an expert sees depends on them."""
    from diffusers import HiDreamImageTransformer2DModel

    model = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=6,
        out_channels=6,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_channels=[20, 28],
        text_emb_dim=36,
        num_routed_experts=3,
        num_activated_experts=2,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 16),
        llama_layers=[0, 1, 0, 1],
    )
    inputs = dict(
        hidden_states=draw(batch, 6, 12, 12),
        timesteps=torch.linspace(300, 700, batch),
        encoder_hidden_states_t5=draw(batch, 9, 20, seed=2),
        encoder_hidden_states_llama3=draw(2, batch, 7, 28, seed=3),
        pooled_embeds=draw(batch, 36, seed=4),
        return_dict=False,
    )
    return randomise(model), inputs


def omnigen(batch: int = 2) -> tuple[nn.Module, Inputs]:
    """Text, time and image tokens in one sequence, with a matrix for a mask."""
    from diffusers import OmniGenTransformer2DModel

    model = OmniGenTransformer2DModel(
        in_channels=4,
        patch_size=2,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=96,
        num_layers=3,
        pad_token_id=0,
        vocab_size=100,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        pos_embed_max_size=24,
        time_step_dim=32,
    )
    tokens = 9 + 1 + 48
    inputs = dict(
        hidden_states=draw(batch, 4, 12, 16),
        timestep=torch.linspace(0.3, 0.7, batch),
        input_ids=torch.arange(9).repeat(batch, 1),
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=torch.ones(batch, tokens, tokens).tril(tokens // 2),
        position_ids=torch.arange(tokens).repeat(batch, 1),
        return_dict=False,
    )
    return randomise(model), inputs


def framepack(batch: int = 2) -> tuple[nn.Module, Inputs]:
    """Breaks where the longest prompt's length is read, after the refiner of the text."""
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    model = HunyuanVideoFramepackTransformer3DModel(
        in_channels=6,
        out_channels=6,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=28,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 6, 6),
        image_proj_dim=24,
        has_image_proj=True,
        has_clean_x_embedder=True,
    )
    mask = torch.zeros(batch, 12, dtype=torch.long)
    mask[:, :9] = 1
    mask[0, 7:] = 0
    inputs = dict(
        hidden_states=draw(batch, 6, 3, 12, 16),
        timestep=torch.linspace(300, 700, batch),
        encoder_hidden_states=draw(batch, 12, 28, seed=2),
        encoder_attention_mask=mask,
        pooled_projections=draw(batch, 20, seed=3),
        image_embeds=draw(batch, 5, 24, seed=4),
        indices_latents=torch.arange(3.0),
        guidance=torch.full((batch,), 3.0),
        latents_clean=draw(batch, 6, 2, 12, 16, seed=6),
        indices_latents_clean=torch.tensor([0.0, 5.0]),
        latents_history_2x=draw(batch, 6, 2, 12, 16, seed=7),
        indices_latents_history_2x=torch.tensor([1.0, 2.0]),
        latents_history_4x=draw(batch, 6, 8, 12, 16, seed=8),
        indices_latents_history_4x=torch.arange(8.0),
        return_dict=False,
    )
    return randomise(model), inputs


def z_image(batch: int = 2) -> tuple[nn.Module, Inputs]:
    """Does not break: latents and prompts are lists."""
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=6,
        dim=48,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=20,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    inputs = dict(
        x=[draw(6, 1, 8, 12, seed=seed) for seed in range(batch)],
        t=torch.linspace(0.3, 0.7, batch),
        cap_feats=[draw(10 + seed, 20, seed=5 + seed) for seed in range(batch)],
        return_dict=False,
    )
    return randomise(model), inputs


def latents_of(inputs: Inputs) -> list[Tensor]:
    """What is denoised."""
    found: list[Tensor] = inputs["x"] if "x" in inputs else [inputs["hidden_states"]]
    return found


PIECES: dict[str, Callable[[int], tuple[nn.Module, Inputs]]] = {
    "lumina2": lumina2,
    "glm_image": glm_image,
    "hunyuan_video_15": hunyuan_video_15,
    "hidream": hidream,
    "omnigen": omnigen,
    "framepack": framepack,
    "z_image": z_image,
}
