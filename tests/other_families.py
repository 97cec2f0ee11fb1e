"""Small instances of the rest of diffusers' transformers, for `test_all_transformers`: random weights, and inputs.

Of each a line or two of configuration and its inputs; batch 2 where the model takes one. See `families` for what the
sizes are. `NOT_BUILT` says which of diffusers' classes are in none of these modules, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from families import Inputs, padding_mask
from more_families import image_ids
from random_tensors import draw, randomise
from torch import nn

Built = tuple[nn.Module, Inputs]

BATCH, TEXT, HEADS, SIZE, WIDTH = 2, 12, 4, 16, 64
ROWS, COLUMNS = 6, 8
TOKENS = ROWS * COLUMNS
TEXT_WIDTH = 28
HEAD: dict[str, Any] = dict(num_attention_heads=HEADS, attention_head_dim=SIZE)
VIDEO = (3, 8, 12)
IMAGE = (12, 16)


def build(name: str, inputs: Inputs, **configuration: Any) -> Built:
    import diffusers

    model = getattr(diffusers, name)(**configuration)
    return randomise(model), {**inputs, "return_dict": False}


def times(low: float = 100.0, high: float = 900.0) -> torch.Tensor:
    return torch.linspace(low, high, BATCH)


def text(width: int = TEXT_WIDTH, length: int = TEXT, seed: int = 2) -> torch.Tensor:
    return draw(BATCH, length, width, seed=seed)


def latents(channels: int, *size: int) -> torch.Tensor:
    return draw(BATCH, channels, *size)


def tokens(channels: int) -> torch.Tensor:
    return draw(BATCH, TOKENS, channels)


# Images


def dit() -> Built:
    inputs = dict(hidden_states=latents(4, 16, 16), timestep=times(), class_labels=torch.tensor([1, 7]))
    return build("DiTTransformer2DModel", inputs, **HEAD, in_channels=4, num_layers=2, sample_size=16)


def pixart() -> Built:
    inputs = dict(
        hidden_states=latents(4, 16, 16),
        timestep=times(),
        encoder_hidden_states=text(),
        encoder_attention_mask=padding_mask(BATCH, TEXT).long(),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    return build(
        "PixArtTransformer2DModel",
        inputs,
        **HEAD,
        num_layers=2,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=16,
        use_additional_conditions=False,
    )


def hunyuan_dit() -> Built:
    angles = draw(TOKENS, SIZE, seed=4)
    inputs = dict(
        hidden_states=latents(4, *IMAGE),
        timestep=times(),
        encoder_hidden_states=text(20, 7),
        text_embedding_mask=padding_mask(BATCH, 7, (2, 0)),
        encoder_hidden_states_t5=text(32, 9, seed=3),
        text_embedding_mask_t5=padding_mask(BATCH, 9),
        image_meta_size=draw(BATCH, 6, seed=5),
        style=torch.zeros(BATCH, dtype=torch.long),
        image_rotary_emb=(angles.cos(), angles.sin()),
    )
    return build(
        "HunyuanDiT2DModel",
        inputs,
        **HEAD,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=WIDTH,
        num_layers=4,
        cross_attention_dim=20,
        cross_attention_dim_t5=32,
        pooled_projection_dim=24,
        text_len=7,
        text_len_t5=9,
    )


def lumina_next() -> Built:
    angles = draw(6, 8, SIZE // 2, seed=4)
    inputs = dict(
        hidden_states=latents(4, *IMAGE),
        timestep=times(0.3, 0.7),
        encoder_hidden_states=text(),
        encoder_mask=padding_mask(BATCH, TEXT),
        image_rotary_emb=torch.polar(torch.ones_like(angles), angles),
        cross_attention_kwargs={},
    )
    return build(
        "LuminaNextDiT2DModel",
        inputs,
        sample_size=16,
        hidden_size=WIDTH,
        num_layers=2,
        num_attention_heads=HEADS,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=TEXT_WIDTH,
    )


def prior() -> Built:
    inputs = dict(
        hidden_states=draw(BATCH, 36),
        timestep=times(),
        proj_embedding=draw(BATCH, 36, seed=2),
        encoder_hidden_states=draw(BATCH, 20, 36, seed=3),
        attention_mask=padding_mask(BATCH, 20),
    )
    return build("PriorTransformer", inputs, **HEAD, num_layers=2, embedding_dim=36, num_embeddings=20)


def transformer_2d() -> Built:
    inputs = dict(hidden_states=latents(16, 6, 8), encoder_hidden_states=text())
    return build(
        "Transformer2DModel",
        inputs,
        **HEAD,
        in_channels=16,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
    )


def dreamlite() -> Built:
    inputs = dict(hidden_states=latents(16, 6, 8), encoder_hidden_states=text())
    return build(
        "DreamLiteTransformer2DModel",
        inputs,
        **HEAD,
        in_channels=16,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
    )


def transformer_temporal() -> Built:
    inputs = dict(hidden_states=draw(BATCH * 8, 16, 3, 5), num_frames=8)
    return build("TransformerTemporalModel", inputs, **HEAD, in_channels=16, num_layers=2, norm_num_groups=4)


def cogview3_plus() -> Built:
    inputs = dict(
        hidden_states=latents(5, *IMAGE),
        encoder_hidden_states=text(),
        timestep=times(),
        original_size=torch.full((BATCH, 2), 20.0),
        target_size=torch.full((BATCH, 2), 24.0),
        crop_coords=torch.zeros(BATCH, 2),
    )
    return build(
        "CogView3PlusTransformer2DModel",
        inputs,
        **HEAD,
        in_channels=5,
        out_channels=5,
        num_layers=2,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=24,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=16,
    )


def cogview4() -> Built:
    inputs = dict(
        hidden_states=latents(5, *IMAGE),
        encoder_hidden_states=text(),
        timestep=times(),
        original_size=torch.full((BATCH, 2), 20.0),
        target_size=torch.full((BATCH, 2), 24.0),
        crop_coords=torch.zeros(BATCH, 2),
    )
    return build(
        "CogView4Transformer2DModel",
        inputs,
        **HEAD,
        in_channels=5,
        out_channels=5,
        num_layers=2,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=24,
        condition_dim=8,
        rope_axes_dim=(32, 32),
        sample_size=16,
    )


def _flux_like(channels: int = 20, **more: Any) -> Inputs:
    return dict(
        hidden_states=tokens(channels),
        encoder_hidden_states=text(),
        timestep=times(0.3, 0.9),
        img_ids=image_ids(ROWS, COLUMNS),
        txt_ids=torch.zeros(TEXT, 3),
        **more,
    )


_FLUX_LIKE: dict[str, Any] = dict(
    **HEAD, in_channels=20, num_layers=2, num_single_layers=2, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(4, 6, 6)
)


def bria() -> Built:
    return build("BriaTransformer2DModel", _flux_like(), **_FLUX_LIKE)


def longcat_image() -> Built:
    return build("LongCatImageTransformer2DModel", _flux_like(), **_FLUX_LIKE, pooled_projection_dim=36)


def ovis_image() -> Built:
    return build("OvisImageTransformer2DModel", _flux_like(), **_FLUX_LIKE, out_channels=20)


def flux3() -> Built:
    inputs = _flux_like() | dict(img_ids=image_ids(ROWS, COLUMNS, axes=4), txt_ids=torch.zeros(TEXT, 4))
    configuration = _FLUX_LIKE | dict(axes_dims_rope=(4, 4, 4, 4), cond_in_channels=20, timestep_channels=32)
    return build("Flux3Transformer2DModel", inputs, **configuration)


def ernie_image() -> Built:
    inputs = dict(
        hidden_states=latents(20, ROWS, COLUMNS),
        timestep=times(),
        text_bth=text(),
        text_lens=torch.tensor([12, 9]),
    )
    return build(
        "ErnieImageTransformer2DModel",
        inputs,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_layers=2,
        ffn_hidden_size=104,
        in_channels=20,
        out_channels=20,
        text_in_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
    )


def hunyuan_image() -> Built:
    inputs = dict(
        hidden_states=latents(6, ROWS, COLUMNS),
        timestep=times(),
        encoder_hidden_states=text(),
        encoder_attention_mask=padding_mask(BATCH, TEXT),
    )
    return build(
        "HunyuanImageTransformer2DModel",
        inputs,
        **HEAD,
        in_channels=6,
        out_channels=6,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        rope_axes_dim=(8, 8),
    )


def ideogram4() -> Built:
    length = TEXT + TOKENS
    places = torch.cat([torch.arange(TEXT)[:, None].expand(TEXT, 3), image_ids(ROWS, COLUMNS).long() + 100])
    kinds = torch.tensor([3] * TEXT + [2] * TOKENS)
    from diffusers.models.transformers import transformer_ideogram4 as module

    kinds[:TEXT], kinds[TEXT:] = module.LLM_TOKEN_INDICATOR, module.OUTPUT_IMAGE_INDICATOR
    inputs = dict(
        hidden_states=draw(BATCH, length, 20),
        encoder_hidden_states=draw(BATCH, length, TEXT_WIDTH, seed=2),
        timestep=times(0.3, 0.7),
        position_ids=places.expand(BATCH, length, 3),
        segment_ids=torch.ones(BATCH, length, dtype=torch.long),
        indicator=kinds.expand(BATCH, length),
    )
    return build(
        "Ideogram4Transformer2DModel",
        inputs,
        **HEAD,
        in_channels=20,
        num_layers=2,
        intermediate_size=104,
        adaln_dim=24,
        llm_features_dim=TEXT_WIDTH,
        mrope_section=(3, 3, 2),
    )


def joy_image_edit() -> Built:
    inputs = dict(hidden_states=latents(6, *VIDEO), timestep=times(), encoder_hidden_states=text())
    return build(
        "JoyImageEditTransformer3DModel",
        inputs,
        in_channels=6,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        text_dim=TEXT_WIDTH,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )


def joy_image_edit_plus() -> Built:
    inputs = dict(
        hidden_states=draw(BATCH, 24 + 12, 6, 1, 2, 2),
        timestep=times(),
        encoder_hidden_states=text(),
        shape_list=[[(1, 4, 6), (1, 3, 4)]] * BATCH,
    )
    return build(
        "JoyImageEditPlusTransformer3DModel",
        inputs,
        in_channels=6,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        text_dim=TEXT_WIDTH,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )


def nucleus_moe() -> Built:
    inputs = dict(
        hidden_states=tokens(20),
        img_shapes=[(1, ROWS, COLUMNS)] * BATCH,
        encoder_hidden_states=text(),
        timestep=times(0.3, 0.7),
    )
    return build(
        "NucleusMoEImageTransformer2DModel",
        inputs,
        **HEAD,
        patch_size=2,
        in_channels=20,
        out_channels=5,
        num_layers=5,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        num_experts=4,
        moe_intermediate_dim=40,
        capacity_factors=2.0,
    )


def prx() -> Built:
    inputs = dict(
        hidden_states=latents(5, *IMAGE),
        timestep=times(0.3, 0.7),
        encoder_hidden_states=text(),
        attention_mask=padding_mask(BATCH, TEXT),
    )
    return build(
        "PRXTransformer2DModel",
        inputs,
        in_channels=5,
        context_in_dim=TEXT_WIDTH,
        hidden_size=WIDTH,
        num_heads=HEADS,
        depth=2,
        axes_dim=[8, 8],
    )


def qwen_image_21() -> Built:
    mask = torch.zeros(BATCH, TEXT + TOKENS // 4, dtype=torch.bool)
    mask[:, TEXT:] = True
    inputs = dict(
        hidden_states=tokens(20),
        encoder_hidden_states=text(),
        encoder_hidden_states_mask=torch.ones(BATCH, TEXT, dtype=torch.long),
        timestep=times(0.3, 0.7),
        img_shapes=[[(1, ROWS, COLUMNS)]] * BATCH,
        img_mask=mask,
    )
    return build(
        "QwenImage21Transformer2DModel",
        inputs,
        **HEAD,
        in_channels=20,
        out_channels=20,
        num_layers=2,
        context_in_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def bria_fibo_2() -> Built:
    inputs = dict(
        hidden_states=latents(6, *IMAGE),
        timestep=times(0.3, 0.7),
        encoder_hidden_states=draw(BATCH, 2, TEXT, TEXT_WIDTH, seed=2),
        encoder_attention_mask=padding_mask(BATCH, TEXT),
    )
    return build(
        "BriaFibo2Transformer2DModel",
        inputs,
        in_channels=6,
        dim=WIDTH,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=HEADS,
        cap_feat_dim=TEXT_WIDTH,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(4, 6, 6),
        axes_lens=(64, 32, 32),
    )


# Videos


def latte() -> Built:
    inputs = dict(hidden_states=latents(4, 3, 8, 8), timestep=times(), encoder_hidden_states=text())
    return build(
        "LatteTransformer3DModel",
        inputs,
        **HEAD,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_size=8,
        num_layers=2,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        video_length=3,
    )


def allegro() -> Built:
    frames, height, width = 3, 4, 6
    axes = [torch.arange(size).expand(1, -1) for size in (frames, height, width)]
    grid = torch.cartesian_prod(*(axis[0] for axis in axes)).T.reshape(3, 1, -1)
    ropes = [(draw(50, 8, seed=seed).cos(), draw(50, 8, seed=seed).sin()) for seed in (4, 5, 6)]
    inputs = dict(
        hidden_states=latents(4, *VIDEO),
        encoder_hidden_states=text(),
        timestep=times(),
        attention_mask=torch.ones(BATCH, *VIDEO),
        encoder_attention_mask=padding_mask(BATCH, TEXT).long(),
        image_rotary_emb=(ropes, grid),
    )
    return build(
        "AllegroTransformer3DModel",
        inputs,
        num_attention_heads=HEADS,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=96,
        caption_channels=TEXT_WIDTH,
        sample_height=8,
        sample_width=12,
        sample_frames=3,
    )


_WAN: dict[str, Any] = dict(
    num_attention_heads=HEADS,
    attention_head_dim=18,
    in_channels=5,
    out_channels=5,
    text_dim=TEXT_WIDTH,
    freq_dim=32,
    ffn_dim=104,
    num_layers=2,
)


def _wan_inputs(**more: Any) -> Inputs:
    return dict(hidden_states=latents(5, *VIDEO), timestep=times(), encoder_hidden_states=text(), **more)


def skyreels_v2() -> Built:
    return build("SkyReelsV2Transformer3DModel", _wan_inputs(), **_WAN, rope_max_seq_len=32)


def chrono_edit() -> Built:
    return build("ChronoEditTransformer3DModel", _wan_inputs(), **_WAN, rope_max_seq_len=32)


def wan_vace() -> Built:
    inputs = _wan_inputs(
        control_hidden_states=draw(BATCH, 7, *VIDEO, seed=3), control_hidden_states_scale=torch.tensor([0.7])
    )
    return build("WanVACETransformer3DModel", inputs, **_WAN, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=7)


def wan_animate() -> Built:
    inputs = dict(
        hidden_states=draw(1, 12, 5, 8, 12),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=draw(1, TEXT, TEXT_WIDTH, seed=2),
        encoder_hidden_states_image=draw(1, 7, 20, seed=3),
        pose_hidden_states=draw(1, 4, 4, 8, 12, seed=4),
        face_pixel_values=draw(1, 3, 13, 16, 16, seed=5),
    )
    configuration = _WAN | dict(in_channels=12, out_channels=4, latent_channels=4, image_dim=20, rope_max_seq_len=32)
    return build(
        "WanAnimateTransformer3DModel",
        inputs,
        **configuration,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def wan_animate_2() -> Built:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    inputs = dict(
        hidden_states=[draw(4, 3, 8, 12)],
        timestep=torch.tensor([1.0]),
        encoder_hidden_states=[draw(TEXT, TEXT_WIDTH, seed=2)],
        condition_latents=[draw(5, 3, 8, 12, seed=3)],
        encoder_hidden_states_image=draw(1, 7, 1280, seed=4),
        kv_cache=WanAnimate2KVCache(2),
        kv_cache_mode="extract",
        seq_len=3 * 4 * 6,
        offset_grid_sizes=torch.tensor([[3, 4, 6]]),
    )
    return build(
        "WanAnimate2Transformer3DModel",
        inputs,
        text_len=16,
        in_dim=9,
        dim=72,
        ffn_dim=104,
        freq_dim=32,
        text_dim=TEXT_WIDTH,
        out_dim=4,
        num_heads=HEADS,
        num_layers=2,
    )


def anyflow() -> Built:
    inputs = dict(
        hidden_states=draw(BATCH, 3, 5, 8, 12),
        timestep=torch.full((BATCH, 3), 500.0),
        r_timestep=torch.full((BATCH, 3), 250.0),
        encoder_hidden_states=text(),
    )
    return build("AnyFlowTransformer3DModel", inputs, **_WAN, rope_max_seq_len=32)


def anyflow_far() -> Built:
    inputs = dict(
        hidden_states=draw(1, 4, 5, 16, 16),
        timestep=torch.full((1, 4), 500.0),
        r_timestep=torch.full((1, 4), 250.0),
        encoder_hidden_states=draw(1, TEXT, TEXT_WIDTH, seed=2),
        chunk_partition=[2, 2],
    )
    return build("AnyFlowFARTransformer3DModel", inputs, **_WAN, rope_max_seq_len=32)


def helios() -> Built:
    inputs = _wan_inputs(
        indices_hidden_states=torch.arange(3.0).expand(BATCH, 3),
        indices_latents_history_short=torch.ones(BATCH, 1),
        indices_latents_history_mid=torch.ones(BATCH, 1),
        indices_latents_history_long=torch.ones(BATCH, 4),
        latents_history_short=draw(BATCH, 5, 1, 8, 12, seed=3),
        latents_history_mid=draw(BATCH, 5, 1, 8, 12, seed=4),
        latents_history_long=draw(BATCH, 5, 4, 8, 12, seed=5),
    )
    return build("HeliosTransformer3DModel", inputs, **_WAN, rope_dim=(6, 6, 6))


def consis_id() -> Built:
    inputs = dict(
        hidden_states=draw(BATCH, 3, 4, 8, 12),
        encoder_hidden_states=text(),
        timestep=times(),
        id_vit_hidden=[draw(BATCH, 2, 6, seed=3)],
        id_cond=draw(BATCH, 6, seed=4),
    )
    return build(
        "ConsisIDTransformer3DModel",
        inputs,
        **HEAD,
        in_channels=4,
        out_channels=4,
        time_embed_dim=24,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TEXT,
        cross_attn_interval=1,
        is_train_face=True,
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


def cosmos() -> Built:
    inputs = dict(
        hidden_states=latents(5, *VIDEO),
        timestep=times(0.3, 0.7),
        encoder_hidden_states=text(),
        fps=16,
    )
    return build(
        "CosmosTransformer3DModel",
        inputs,
        num_attention_heads=HEADS,
        attention_head_dim=18,
        in_channels=5,
        out_channels=5,
        num_layers=2,
        text_embed_dim=TEXT_WIDTH,
        adaln_lora_dim=8,
        concat_padding_mask=False,  # which takes torchvision
        max_size=(4, 32, 32),
    )


def cosmos_3() -> Built:
    length = 7 + 24
    indexes = torch.arange(7, length)
    places = torch.arange(length).expand(3, length)
    inputs = dict(
        input_ids=torch.arange(7),
        text_indexes=torch.arange(7),
        position_ids=places,
        und_len=7,
        sequence_length=length,
        vision_tokens=[draw(1, 5, 1, 8, 12)],
        vision_token_shapes=[(1, 4, 6)],
        vision_sequence_indexes=indexes,
        vision_mse_loss_indexes=indexes,
        vision_timesteps=torch.full((24,), 500.0),
        vision_noisy_frame_indexes=[torch.tensor([0])],
    )
    return build(
        "Cosmos3OmniTransformer",
        inputs,
        head_dim=SIZE,
        hidden_size=WIDTH,
        intermediate_size=104,
        latent_channel=5,
        num_attention_heads=HEADS,
        num_hidden_layers=2,
        num_key_value_heads=2,
        patch_latent_dim=20,
        rope_axes_dim=[2, 3, 3],
        vocab_size=32,
    )


def easy_animate() -> Built:
    inputs = dict(hidden_states=latents(5, *VIDEO), timestep=times(), encoder_hidden_states=text())
    return build(
        "EasyAnimateTransformer3DModel",
        inputs,
        **HEAD,
        in_channels=5,
        out_channels=5,
        patch_size=2,
        sample_width=12,
        sample_height=8,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=24,
        text_embed_dim=TEXT_WIDTH,
    )


def kandinsky_5() -> Built:
    frames, height, width = VIDEO
    inputs = dict(
        hidden_states=draw(BATCH, frames, height, width, 5),
        encoder_hidden_states=text(),
        timestep=times(),
        pooled_projections=draw(BATCH, 36, seed=3),
        visual_rope_pos=[torch.arange(frames), torch.arange(height // 2), torch.arange(width // 2)],
        text_rope_pos=torch.arange(TEXT),
    )
    return build(
        "Kandinsky5Transformer3DModel",
        inputs,
        in_visual_dim=5,
        out_visual_dim=5,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=36,
        time_dim=24,
        model_dim=WIDTH,
        ff_dim=104,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )


def kandinsky_6() -> Built:
    frames, height, width = VIDEO
    inputs = dict(
        hidden_states=draw(BATCH, frames, height, width, 11),
        encoder_hidden_states=text(),
        pooled_projections=draw(BATCH, 36, seed=3),
        timestep=times(),
    )
    return build(
        "Kandinsky6Transformer3DModel",
        inputs,
        in_visual_dim=5,
        out_visual_dim=5,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=36,
        time_dim=24,
        model_dim=WIDTH,
        ff_dim=104,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=4,
        out_audio_dim=4,
    )


def kandinsky_6_sr() -> Built:
    inputs = dict(hidden_states=draw(1, 3, 8, 8, 11), timestep=torch.tensor([500.0]))
    return build(
        "Kandinsky6SRTransformer3DModel",
        inputs,
        in_visual_dim=5,
        out_visual_dim=5,
        time_dim=24,
        model_dim=WIDTH,
        ff_dim=104,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )


_LTX2: dict[str, Any] = dict(
    **HEAD,
    in_channels=10,
    out_channels=10,
    cross_attention_dim=WIDTH,
    audio_in_channels=6,
    audio_out_channels=6,
    audio_num_attention_heads=HEADS,
    audio_attention_head_dim=8,
    audio_cross_attention_dim=32,
    num_layers=2,
    caption_channels=TEXT_WIDTH,
    rope_double_precision=False,
)


def ltx_2() -> Built:
    inputs = dict(
        hidden_states=draw(BATCH, 3 * 4 * 6, 10),
        audio_hidden_states=draw(BATCH, 9, 6, seed=3),
        encoder_hidden_states=text(),
        audio_encoder_hidden_states=text(seed=4),
        timestep=times(),
        encoder_attention_mask=padding_mask(BATCH, TEXT),
        audio_encoder_attention_mask=padding_mask(BATCH, TEXT),
        num_frames=3,
        height=4,
        width=6,
        audio_num_frames=9,
        fps=25.0,
    )
    return build("LTX2VideoTransformer3DModel", inputs, **_LTX2)


def sana_wm_refiner() -> Built:
    inputs = dict(
        hidden_states=draw(BATCH, 3 * 4 * 6, 10),
        encoder_hidden_states=text(),
        timestep=torch.linspace(100.0, 900.0, 72).expand(BATCH, 72),
        encoder_attention_mask=padding_mask(BATCH, TEXT).float(),
    )
    model, inputs = build("SanaWMLTX2RefinerTransformer3DModel", inputs, **_LTX2)
    inputs["video_rotary_emb"] = cast(Any, model).build_rotary_emb_for_absolute_positions(
        batch_size=BATCH, frame_positions=[0, 1, 2], height=4, width=6, device="cpu", fps=24.0
    )
    return model, inputs


def minimax_h3() -> Built:
    audio = 5
    length = TEXT + audio + TOKENS
    kinds = torch.tensor([1] * TEXT + [2] * audio + [0] * TOKENS)
    places = torch.cat([torch.arange(TEXT + audio)[:, None].expand(-1, 3).float(), image_ids(ROWS, COLUMNS)])
    inputs = dict(
        hidden_states=tokens(20),
        audio_hidden_states=draw(BATCH, audio, 6, seed=3),
        encoder_hidden_states=text(),
        timestep=torch.tensor([0.7, 0.3]),
        timestep_indices=(kinds == 2).long(),
        token_tags=kinds,
        position_ids=places,
        text_indices=torch.arange(TEXT),
        audio_indices=torch.arange(TEXT, TEXT + audio),
        video_indices=torch.arange(TEXT + audio, length),
    )
    return build(
        "MiniMaxH3Transformer3DModel",
        inputs,
        **HEAD,
        hidden_size=40,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=104,
        in_channels=5,
        audio_in_channels=6,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        time_embed_hidden_dim=40,
        time_embed_dim=24,
        rope_freq_dim=2,
    )


def motif_video() -> Built:
    inputs = dict(
        hidden_states=latents(11, *VIDEO),
        timestep=times(),
        encoder_hidden_states=text(),
        encoder_attention_mask=padding_mask(BATCH, TEXT),
    )
    return build(
        "MotifVideoTransformer3DModel",
        inputs,
        **HEAD,
        in_channels=11,
        out_channels=5,
        num_layers=2,
        num_single_layers=2,
        text_embed_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
    )


def sana_wm() -> Built:
    frames, height, width = 4, 6, 8
    camera = torch.eye(4).repeat(1, frames, 1, 1)
    camera[..., 2, 3] = torch.arange(frames) * 0.1
    lens = torch.tensor([8.0, 6.0, 4.0, 3.0]).expand(1, frames, 4)
    inputs = dict(
        hidden_states=draw(1, 4, frames, height, width),
        timestep=torch.full((1, 1, frames), 500.0),
        encoder_hidden_states=draw(1, 1, TEXT, TEXT_WIDTH, seed=2),
        encoder_attention_mask=torch.ones(1, TEXT, dtype=torch.long),
        camera_conditions=torch.cat([camera.flatten(-2), lens], dim=-1),
        chunk_plucker=draw(1, 8, frames, height, width, seed=3),
    )
    return build(
        "SanaWMTransformer3DModel",
        inputs,
        in_channels=4,
        num_layers=2,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        softmax_every_n=2,
        linear_head_dim=SIZE,
        caption_channels=TEXT_WIDTH,
        mlp_ratio=2.0,
        chunk_plucker_channels=8,
        chunk_plucker_post_attn_blocks=2,
    )


# Sound


def minimax_music3_codes() -> Built:
    """Predicts the codes of one moment, one after the other."""
    model, inputs = build(
        "MiniMaxMusic3RVQDepthDecoder",
        dict(inputs_embeds=draw(BATCH, 9, WIDTH)),
        hidden_size=WIDTH,
        num_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=104,
        audio_vocab_size=20,
    )
    del inputs["return_dict"]
    return model, inputs


def ace_step() -> Built:
    inputs = dict(
        hidden_states=draw(BATCH, 24, 8),
        timestep=times(0.3, 0.7),
        timestep_r=times(0.2, 0.5),
        encoder_hidden_states=draw(BATCH, 10, WIDTH, seed=2),
        context_latents=draw(BATCH, 24, 16, seed=3),
    )
    return build(
        "AceStepTransformer1DModel",
        inputs,
        hidden_size=WIDTH,
        intermediate_size=104,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=SIZE,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        sliding_window=4,
    )


def stable_audio() -> Built:
    angles = draw(49, 8, seed=4)
    inputs = dict(
        hidden_states=draw(BATCH, 10, TOKENS),
        timestep=times(0.3, 0.7),
        encoder_hidden_states=text(),
        global_hidden_states=draw(BATCH, 1, 36, seed=3),
        rotary_embedding=(angles.cos(), angles.sin()),
    )
    return build(
        "StableAudioDiTModel",
        inputs,
        in_channels=10,
        out_channels=10,
        num_layers=2,
        attention_head_dim=SIZE,
        num_attention_heads=HEADS,
        num_key_value_attention_heads=2,
        cross_attention_dim=32,
        time_proj_dim=24,
        global_states_input_dim=36,
        cross_attention_input_dim=TEXT_WIDTH,
        sample_size=TOKENS,
    )


def longcat_audio() -> Built:
    inputs = dict(
        hidden_states=draw(BATCH, TOKENS, 10),
        encoder_hidden_states=text(),
        encoder_attention_mask=padding_mask(BATCH, TEXT),
        timestep=times(0.3, 0.7),
        latent_cond=draw(BATCH, TOKENS, 10, seed=3),
    )
    return build(
        "LongCatAudioDiTTransformer",
        inputs,
        dit_dim=WIDTH,
        dit_depth=2,
        dit_heads=HEADS,
        dit_text_dim=TEXT_WIDTH,
        latent_dim=10,
    )


def t5_film() -> Built:
    inputs = dict(
        encodings_and_masks=[(draw(BATCH, 9, WIDTH, seed=2), torch.ones(BATCH, 9))],
        decoder_input_tokens=draw(BATCH, TOKENS, 10),
        decoder_noise_time=times(0.3, 0.7),
    )
    model, inputs = build(
        "T5FilmDecoder",
        inputs,
        input_dims=10,
        targets_length=TOKENS,
        d_model=WIDTH,
        num_layers=2,
        num_heads=HEADS,
        d_kv=SIZE,
        d_ff=104,
    )
    del inputs["return_dict"]
    return model, inputs


OTHER_FAMILIES: dict[str, Callable[[], Built]] = {
    function.__name__: function
    for function in (
        *(dit, pixart, hunyuan_dit, lumina_next, prior, transformer_2d, dreamlite, transformer_temporal),
        *(cogview3_plus, cogview4, bria, longcat_image, ovis_image, flux3, ernie_image, hunyuan_image, ideogram4),
        *(joy_image_edit, joy_image_edit_plus, nucleus_moe, prx, qwen_image_21, bria_fibo_2, latte, allegro),
        *(skyreels_v2, chrono_edit, wan_vace, wan_animate, wan_animate_2, anyflow, anyflow_far, helios, consis_id),
        *(cosmos, cosmos_3, easy_animate, kandinsky_5, kandinsky_6, kandinsky_6_sr, ltx_2, minimax_h3, motif_video),
        *(sana_wm, sana_wm_refiner, minimax_music3_codes, ace_step, stable_audio, longcat_audio, t5_film),
    )
}

NOT_BUILT: dict[str, str] = {
    "RFD4ProteinaTransformer": "denoises proteins, and takes some thirty features of each residue",
}
