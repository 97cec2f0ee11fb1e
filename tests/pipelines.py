"""diffusers' own pipelines with small random parts: nothing is downloaded, prompts are given as embeddings.

Transformers are those of `families`, `more_families` and `pieces`, some with another configuration, and real schedulers
run them. What takes pictures or videos has a small VAE, and gives its latents where it can.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from families import cogvideox, flux, hunyuan_video, ltx_video, mochi, qwen_image, stable_diffusion_3, wan
from more_families import auraflow, chroma, flux2, hunyuan_dit, krea2, latte, sana, sana_video
from pieces import hidream, lumina2, z_image
from random_tensors import draw, randomise
from torch import Tensor, nn

STEPS = 6
HEIGHT, WIDTH = 48, 64  # of pictures, eight times those of their latents
TEXT = 12  # tokens of a prompt
MOST_HITS = 2  # in a row

Hits = tuple[bool, ...]

SKIPS: Hits = (False, True, True, False, True, True)
"""What a slot of `STEPS` steps does where nothing but `MOST_HITS` keeps it from skipping."""
LEARNS: Hits = (False, False, True, True, False, True)
"""The same where the second step is computed, because an input that changes at each step could be another prompt."""


@dataclass(frozen=True)
class Entry:
    """A pipeline, and how to call it.

    attributes:
        build: makes it.
        prompt: the arguments that say what is wanted, for a seed.
        call: its other arguments.
        slots: of each component that is compiled, the hits of each slot.
        fullgraph: whether the components are compiled as one graph each.
        never: why nothing is ever skipped, in words of the warning that tells so.
    """

    build: Callable[[], DiffusionPipeline]
    prompt: Callable[[int], dict[str, Any]]
    call: Mapping[str, Any] = field(default_factory=dict)
    slots: Mapping[str, Mapping[str, Hits]] = field(default_factory=lambda: {"transformer": {"call 1": SKIPS}})
    fullgraph: bool = True
    never: str | None = None


def of_transformer(*slots: str, hits: Hits = SKIPS) -> dict[str, dict[str, Hits]]:
    return {"transformer": dict.fromkeys(slots, hits)}


PASSES = of_transformer("cond", "uncond")
"""Where the pipeline names its passes."""
TWO_CALLS = of_transformer("call 1", "call 2")
"""Where it does not."""
NOTHING: dict[str, dict[str, Hits]] = {"transformer": {}}
"""Where nothing is ever skipped."""


# Parts


def pipeline(kind: str, **parts: Any) -> DiffusionPipeline:
    """A pipeline of these parts; what it takes besides, as text encoders, is None."""
    made = getattr(diffusers, kind)
    parameters = list(inspect.signature(made.__init__).parameters.values())[1:]
    nothing = {each.name: None for each in parameters if each.default is inspect.Parameter.empty}
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), **parts}
    result: DiffusionPipeline = made(**{**nothing, **parts})
    result.set_progress_bar_config(disable=True)
    return result


def changed(model: nn.Module, **config: Any) -> nn.Module:
    """A model of the same class with another configuration."""
    return like(type(model), model, **config)


def like(kind: type[nn.Module], model: Any, **config: Any) -> nn.Module:
    """A model of this class with the configuration of another one, where it takes it, and these changes."""
    taken = inspect.signature(kind.__init__).parameters
    return randomise(kind(**{**{name: value for name, value in model.config.items() if name in taken}, **config}))


def vae(channels: int = 5, kind: str = "AutoencoderKL", **config: Any) -> nn.Module:
    """One of pictures, whose latents are an eighth as high and wide."""
    if kind == "AutoencoderKL":
        config = {"shift_factor": 0.1, "scaling_factor": 0.5, **config}
    return randomise(
        getattr(diffusers, kind)(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4,) * 4,
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=2,
            **config,
        )
    )


def vae_in_time(kind: str, channels: int = 5) -> nn.Module:
    """One of videos, whose latents are a quarter as long besides."""
    return randomise(
        getattr(diffusers, kind)(
            base_dim=4,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1] * channels,
            latents_std=[2.0] * channels,
        )
    )


def embeds(**shapes: tuple[int, ...]) -> Callable[[int], dict[str, Tensor]]:
    """A prompt as tensors of these shapes, drawn anew for each seed."""
    return lambda seed: {name: draw(*shape, seed=100 * seed + n) for n, (name, shape) in enumerate(shapes.items())}


def guided(**shapes: tuple[int, ...]) -> Callable[[int], dict[str, Tensor]]:
    """A prompt and a negative one."""
    return embeds(**shapes, **{f"negative_{name}": shape for name, shape in shapes.items()})


def picture(seed: int = 5) -> Tensor:
    return torch.sigmoid(draw(1, 3, HEIGHT, WIDTH, seed=seed))


def video() -> list[Tensor]:
    return list(torch.sigmoid(draw(9, 3, HEIGHT, WIDTH, seed=8)))


def mask() -> Tensor:
    return (draw(1, 1, HEIGHT, WIDTH, seed=6) > 0).float()


IN = {"height": HEIGHT, "width": WIDTH}
PICTURE = {"image": picture()}
WITH_STRENGTH = {**PICTURE, "strength": 1.0}
MASKED = {**WITH_STRENGTH, "mask_image": mask()}
CONTROL = {"control_image": picture(7)}


# FLUX


def flux_of(kind: str, channels: int = 20, **parts: Any) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        transformer = changed(flux()[0], in_channels=channels, out_channels=20)
        return pipeline(kind, transformer=transformer, vae=vae(), **{name: make() for name, make in parts.items()})

    return build


def flux_controlnet() -> nn.Module:
    return like(diffusers.FluxControlNetModel, flux()[0], num_layers=1, num_single_layers=1)


FLUX_PROMPT = {"prompt_embeds": (1, TEXT, 28), "pooled_prompt_embeds": (1, 36)}
TRUE_CFG = {**IN, "true_cfg_scale": 2.0}

FLUX = {
    "FluxPipeline": Entry(flux_of("FluxPipeline"), guided(**FLUX_PROMPT), TRUE_CFG, PASSES),
    "FluxImg2ImgPipeline": Entry(
        flux_of("FluxImg2ImgPipeline"), guided(**FLUX_PROMPT), {**TRUE_CFG, **WITH_STRENGTH}, TWO_CALLS
    ),
    "FluxInpaintPipeline": Entry(
        flux_of("FluxInpaintPipeline"), guided(**FLUX_PROMPT), {**TRUE_CFG, **MASKED}, TWO_CALLS
    ),
    "FluxKontextPipeline": Entry(
        flux_of("FluxKontextPipeline"),
        guided(**FLUX_PROMPT),
        {**TRUE_CFG, **PICTURE, "max_area": HEIGHT * WIDTH, "_auto_resize": False},
        TWO_CALLS,
    ),
    # latents, those of the masked picture, and the mask of each pixel
    "FluxFillPipeline": Entry(flux_of("FluxFillPipeline", 20 + 20 + 4 * 64), embeds(**FLUX_PROMPT), {**IN, **MASKED}),
    "FluxControlPipeline": Entry(flux_of("FluxControlPipeline", 40), embeds(**FLUX_PROMPT), {**IN, **CONTROL}),
    "FluxControlNetPipeline": Entry(
        flux_of("FluxControlNetPipeline", controlnet=flux_controlnet),
        guided(**FLUX_PROMPT),
        {**TRUE_CFG, **CONTROL},
        of_transformer("call 1", "call 2", hits=LEARNS),
    ),
    "FluxControlNetImg2ImgPipeline": Entry(
        flux_of("FluxControlNetImg2ImgPipeline", controlnet=flux_controlnet),
        embeds(**FLUX_PROMPT),
        {**IN, **CONTROL, **WITH_STRENGTH},
        of_transformer("call 1", hits=LEARNS),
    ),
    "FluxControlNetInpaintPipeline": Entry(
        flux_of("FluxControlNetInpaintPipeline", controlnet=flux_controlnet),
        embeds(**FLUX_PROMPT),
        {**IN, **CONTROL, **MASKED},
        of_transformer("call 1", hits=LEARNS),
    ),
}


# FLUX.2


def flux2_of(kind: str, **config: Any) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        autoencoder = vae(kind="AutoencoderKLFlux2")
        return pipeline(kind, transformer=changed(flux2(double=1)[0], **config), vae=autoencoder)

    return build


FLUX2 = {
    "Flux2Pipeline": Entry(flux2_of("Flux2Pipeline", guidance_embeds=True), embeds(prompt_embeds=(1, TEXT, 28)), IN),
    "Flux2KleinPipeline": Entry(
        flux2_of("Flux2KleinPipeline"), guided(prompt_embeds=(1, TEXT, 28)), {**IN, "guidance_scale": 4.0}, PASSES
    ),
}


# Stable Diffusion 3


def sd3_of(kind: str, channels: int = 5, **parts: Any) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        transformer = changed(stable_diffusion_3()[0], in_channels=channels, out_channels=channels)
        made = {name: make() for name, make in parts.items()}
        return pipeline(kind, transformer=transformer, vae=vae(channels), **made)

    return build


def sd3_controlnet() -> nn.Module:
    return like(diffusers.SD3ControlNetModel, stable_diffusion_3(dual=False)[0], num_layers=1)


SD3_PROMPT = {"prompt_embeds": (1, TEXT, 28), "pooled_prompt_embeds": (1, 36)}
SD3 = {
    "StableDiffusion3Pipeline": Entry(sd3_of("StableDiffusion3Pipeline"), guided(**SD3_PROMPT), IN),
    "StableDiffusion3Img2ImgPipeline": Entry(
        sd3_of("StableDiffusion3Img2ImgPipeline"), guided(**SD3_PROMPT), {**IN, **WITH_STRENGTH}
    ),
    "StableDiffusion3InpaintPipeline": Entry(
        sd3_of("StableDiffusion3InpaintPipeline", 16), guided(**SD3_PROMPT), {**IN, **MASKED}
    ),
    "StableDiffusion3ControlNetPipeline": Entry(
        sd3_of("StableDiffusion3ControlNetPipeline", controlnet=sd3_controlnet),
        guided(**SD3_PROMPT),
        {**IN, **CONTROL},
        of_transformer("call 1", hits=LEARNS),
    ),
}


# Qwen-Image and Krea 2


def qwen_of(kind: str, **parts: Any) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        made = {name: make() for name, make in parts.items()}
        return pipeline(kind, transformer=qwen_image()[0], vae=vae_in_time("AutoencoderKLQwenImage"), **made)

    return build


def qwen_controlnet() -> nn.Module:
    return like(diffusers.QwenImageControlNetModel, qwen_image()[0], num_layers=1)


SHOWN = torch.ones(1, TEXT, dtype=torch.bool)
PADDED = torch.arange(TEXT)[None] < TEXT - 3
TEXT_MASKS = {"prompt_embeds_mask": SHOWN, "negative_prompt_embeds_mask": PADDED}

QWEN = {
    "QwenImagePipeline": Entry(
        qwen_of("QwenImagePipeline"), guided(prompt_embeds=(1, TEXT, 28)), {**IN, **TEXT_MASKS}, PASSES
    ),
    "QwenImageImg2ImgPipeline": Entry(
        qwen_of("QwenImageImg2ImgPipeline"),
        guided(prompt_embeds=(1, TEXT, 28)),
        {**IN, **TEXT_MASKS, **WITH_STRENGTH},
        PASSES,
    ),
    "QwenImageInpaintPipeline": Entry(
        qwen_of("QwenImageInpaintPipeline"),
        guided(prompt_embeds=(1, TEXT, 28)),
        {**IN, **TEXT_MASKS, **MASKED},
        PASSES,
    ),
    "QwenImageControlNetPipeline": Entry(
        qwen_of("QwenImageControlNetPipeline", controlnet=qwen_controlnet),
        guided(prompt_embeds=(1, TEXT, 28)),
        {**IN, **TEXT_MASKS, **CONTROL},
        PASSES,
    ),
    "Krea2Pipeline": Entry(
        lambda: pipeline("Krea2Pipeline", transformer=krea2()[0]),
        guided(prompt_embeds=(1, TEXT, 3, 28)),
        {**IN, **TEXT_MASKS, "guidance_scale": 2.0},  # more would make more of rounding
        TWO_CALLS,
    ),
}


# Wan


def wan_of(kind: str, channels: int = 5, **more: Any) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        transformer = changed(wan()[0], in_channels=channels)
        return pipeline(kind, transformer=transformer, vae=vae_in_time("AutoencoderKLWan"), **more)

    return build


def wan_vace() -> DiffusionPipeline:
    transformer = like(
        diffusers.WanVACETransformer3DModel, wan()[0], vace_layers=[0, 1], vace_in_channels=2 * 5 + 8 * 8
    )
    return pipeline("WanVACEPipeline", transformer=transformer, vae=vae_in_time("AutoencoderKLWan"))


def wan_22() -> DiffusionPipeline:
    both = {"transformer": wan()[0], "transformer_2": randomise(wan()[0], seed=2)}
    return pipeline("WanPipeline", **both, boundary_ratio=0.8)


VIDEO = {**IN, "num_frames": 9}
HALF: Hits = SKIPS[:3]

WAN = {
    "WanPipeline": Entry(
        lambda: pipeline("WanPipeline", transformer=wan()[0]), guided(prompt_embeds=(1, TEXT, 28)), VIDEO, PASSES
    ),
    "WanPipeline with two transformers": Entry(
        wan_22,
        guided(prompt_embeds=(1, TEXT, 28)),
        VIDEO,
        {name: {"cond": HALF, "uncond": HALF} for name in ("transformer", "transformer_2")},
    ),
    # latents, those of the picture, and the mask of four frames
    "WanImageToVideoPipeline": Entry(
        wan_of("WanImageToVideoPipeline", 5 + 5 + 4), guided(prompt_embeds=(1, TEXT, 28)), {**VIDEO, **PICTURE}, PASSES
    ),
    "WanVideoToVideoPipeline": Entry(
        wan_of("WanVideoToVideoPipeline"),
        guided(prompt_embeds=(1, TEXT, 28)),
        {**IN, "video": video(), "strength": 1.0},
        TWO_CALLS,
    ),
    "WanVACEPipeline": Entry(wan_vace, guided(prompt_embeds=(1, TEXT, 28)), VIDEO, PASSES),
}


# Other videos


def cogvideox_of(kind: str, channels: int = 5, **more: Any) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        transformer = changed(
            cogvideox(text=TEXT)[0], in_channels=channels, sample_height=HEIGHT // 8, sample_width=WIDTH // 8
        )
        return pipeline(kind, transformer=transformer, scheduler=diffusers.CogVideoXDDIMScheduler(), **more)

    return build


HUNYUAN_PROMPT = {"prompt_embeds": (1, TEXT, 28), "pooled_prompt_embeds": (1, 36)}
MASKS = {"prompt_attention_mask": SHOWN, "negative_prompt_attention_mask": PADDED}

VIDEOS = {
    "CogVideoXPipeline": Entry(
        cogvideox_of("CogVideoXPipeline"),
        guided(prompt_embeds=(1, TEXT, 28)),
        VIDEO,
        of_transformer("cond_uncond"),
    ),
    "HunyuanVideoPipeline": Entry(
        lambda: pipeline("HunyuanVideoPipeline", transformer=changed(hunyuan_video()[0], guidance_embeds=True)),
        guided(**HUNYUAN_PROMPT),
        {**VIDEO, **MASKS, "true_cfg_scale": 2.0},
        PASSES,
    ),
    "LTXPipeline": Entry(
        lambda: pipeline("LTXPipeline", transformer=ltx_video()[0]),
        guided(prompt_embeds=(1, TEXT, 28)),
        {"height": 96, "width": 128, "num_frames": 9, **MASKS},
        of_transformer("cond_uncond"),
    ),
    "MochiPipeline": Entry(
        lambda: pipeline("MochiPipeline", transformer=changed(mochi(text=TEXT)[0], in_channels=12)),
        guided(prompt_embeds=(1, TEXT, 32)),
        {**VIDEO, "num_frames": 7, **MASKS},
        of_transformer("cond_uncond"),
    ),
}


# Other pictures

PICTURES = {
    "AuraFlowPipeline": Entry(
        lambda: pipeline("AuraFlowPipeline", transformer=changed(auraflow()[0], sample_size=8)),
        guided(prompt_embeds=(1, TEXT, 28)),
        {**IN, **MASKS},
    ),
    "ChromaPipeline": Entry(
        lambda: pipeline("ChromaPipeline", transformer=chroma()[0]),
        guided(prompt_embeds=(1, TEXT, 28)),
        {**IN, **MASKS},
        TWO_CALLS,
    ),
    "SanaPipeline": Entry(
        lambda: pipeline("SanaPipeline", transformer=sana()[0]),
        guided(prompt_embeds=(1, TEXT, 28)),
        {"height": 8 * 32, "width": 8 * 32, "use_resolution_binning": False, "negative_prompt": None, **MASKS},
    ),
}


def cosmos(**config: Any) -> nn.Module:
    return randomise(
        diffusers.CosmosTransformer3DModel(
            **{
                "in_channels": 5,
                "out_channels": 5,
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "num_layers": 3,
                "mlp_ratio": 2,
                "text_embed_dim": 28,
                "adaln_lora_dim": 8,
                "max_size": (4, 16, 16),
                "encoder_hidden_states_channels": 28,
                "concat_padding_mask": False,  # it is resized by torchvision
                **config,
            }
        )
    )


class NoChecks:
    """Stands for the checker of texts and pictures that Cosmos asks for."""

    def to(self, device: str | torch.device) -> NoChecks:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True


def kandinsky5(kind: str) -> DiffusionPipeline:
    transformer = diffusers.Kandinsky5Transformer3DModel(
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
    made = pipeline(kind, transformer=randomise(transformer))
    made.resolutions = [(WIDTH, HEIGHT)]
    return made


def pixart(kind: str) -> DiffusionPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=5,
        out_channels=10,
        num_layers=3,
        cross_attention_dim=64,
        caption_channels=28,
        sample_size=32,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return pipeline(kind, transformer=randomise(transformer), scheduler=scheduler)


def cogview4() -> DiffusionPipeline:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=5,
        out_channels=5,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        text_embed_dim=28,
        time_embed_dim=24,
        condition_dim=6,
        pos_embed_max_size=24,
        sample_size=16,
        rope_axes_dim=(8, 8),
    )
    return pipeline("CogView4Pipeline", transformer=randomise(transformer))


def dit() -> DiffusionPipeline:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=5, out_channels=10, num_layers=3, sample_size=8
    )
    scheduler = diffusers.DDIMScheduler()
    return pipeline("DiTPipeline", transformer=randomise(transformer), scheduler=scheduler, vae=vae())


def allegro() -> DiffusionPipeline:
    transformer = diffusers.AllegroTransformer3DModel(
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
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    return pipeline("AllegroPipeline", transformer=randomise(transformer), scheduler=scheduler)


def bria() -> DiffusionPipeline:
    transformer = like(diffusers.BriaTransformer2DModel, flux()[0], pooled_projection_dim=None, guidance_embeds=False)
    return pipeline("BriaPipeline", transformer=transformer, vae=vae())


def z_image_prompt(seed: int) -> dict[str, list[Tensor]]:
    return {"prompt_embeds": [draw(10, 20, seed=seed)], "negative_prompt_embeds": [draw(7, 20, seed=seed + 50)]}


def hidream_image() -> DiffusionPipeline:
    made = pipeline("HiDreamImagePipeline", transformer=hidream()[0])
    made.default_sample_size = 8
    return made


def skyreels() -> DiffusionPipeline:
    transformer = like(diffusers.SkyReelsV2Transformer3DModel, wan()[0])
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return pipeline("SkyReelsV2Pipeline", transformer=transformer, scheduler=scheduler)


def hunyuan_image() -> DiffusionPipeline:
    transformer = diffusers.HunyuanImageTransformer2DModel(
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
    return pipeline(
        "HunyuanImagePipeline",
        transformer=randomise(transformer),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=2.0),
    )


def prx() -> DiffusionPipeline:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=5, context_in_dim=28, hidden_size=64, mlp_ratio=2.0, num_heads=4, depth=3, axes_dim=[8, 8]
    )
    return pipeline("PRXPipeline", transformer=randomise(transformer))


def easyanimate() -> DiffusionPipeline:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=5,
        out_channels=5,
        patch_size=2,
        sample_width=WIDTH // 8,
        sample_height=HEIGHT // 8,
        num_layers=3,
        mmdit_layers=3,
        time_embed_dim=24,
        text_embed_dim=28,
    )
    autoencoder = diffusers.AutoencoderKLMagvit(
        latent_channels=5, block_out_channels=[4] * 4, layers_per_block=1, norm_num_groups=2
    )
    return pipeline("EasyAnimatePipeline", transformer=randomise(transformer), vae=randomise(autoencoder))


MORE = {
    "CosmosTextToWorldPipeline": Entry(
        lambda: pipeline(
            "CosmosTextToWorldPipeline",
            transformer=cosmos(),
            scheduler=diffusers.EDMEulerScheduler(),
            safety_checker=NoChecks(),
        ),
        guided(prompt_embeds=(1, TEXT, 28)),
        VIDEO,
        TWO_CALLS,
    ),
    "Cosmos2TextToImagePipeline": Entry(
        lambda: pipeline(
            "Cosmos2TextToImagePipeline",
            transformer=cosmos(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
            safety_checker=NoChecks(),
        ),
        guided(prompt_embeds=(1, TEXT, 28)),
        IN,
        TWO_CALLS,
    ),
    "Kandinsky5T2VPipeline": Entry(
        lambda: kandinsky5("Kandinsky5T2VPipeline"),
        guided(prompt_embeds_qwen=(1, TEXT, 28), prompt_embeds_clip=(1, 36)),
        {**VIDEO, "prompt_cu_seqlens": torch.tensor([0, TEXT]), "negative_prompt_cu_seqlens": torch.tensor([0, TEXT])},
        TWO_CALLS,
    ),
    "Kandinsky5T2IPipeline": Entry(
        lambda: kandinsky5("Kandinsky5T2IPipeline"),
        guided(prompt_embeds_qwen=(1, TEXT, 28), prompt_embeds_clip=(1, 36)),
        {**IN, "prompt_cu_seqlens": torch.tensor([0, TEXT]), "negative_prompt_cu_seqlens": torch.tensor([0, TEXT])},
        TWO_CALLS,
    ),
    "PixArtAlphaPipeline": Entry(
        lambda: pixart("PixArtAlphaPipeline"),
        guided(prompt_embeds=(1, TEXT, 28)),
        {**IN, **MASKS, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "PixArtSigmaPipeline": Entry(
        lambda: pixart("PixArtSigmaPipeline"),
        guided(prompt_embeds=(1, TEXT, 28)),
        {**IN, **MASKS, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "CogView4Pipeline": Entry(cogview4, guided(prompt_embeds=(1, TEXT, 28)), IN, PASSES),
    "DiTPipeline": Entry(dit, lambda seed: {"class_labels": [seed]}, {"output_type": "pt"}),
    "LattePipeline": Entry(
        lambda: pipeline(
            "LattePipeline",
            transformer=changed(latte()[0], out_channels=10, sample_size=8, video_length=2),
            scheduler=diffusers.DDIMScheduler(clip_sample=False),
        ),
        guided(prompt_embeds=(1, TEXT, 28)),
        {**IN, "video_length": 2, "negative_prompt": None},
    ),
    "AllegroPipeline": Entry(
        allegro, guided(prompt_embeds=(1, TEXT, 28)), {**VIDEO, **MASKS, "num_frames": 8, "negative_prompt": None}
    ),
    "HunyuanDiTPipeline": Entry(
        lambda: pipeline(
            "HunyuanDiTPipeline",
            transformer=changed(hunyuan_dit(text=TEXT)[0], learn_sigma=True, sample_size=8, text_len_t5=TEXT),
            scheduler=diffusers.DDPMScheduler(),
            requires_safety_checker=False,
        ),
        guided(prompt_embeds=(1, TEXT, 28), prompt_embeds_2=(1, TEXT, 24)),
        {**IN, **MASKS, **{f"{name}_2": mask for name, mask in MASKS.items()}, "use_resolution_binning": False},
    ),
    "BriaPipeline": Entry(bria, guided(prompt_embeds=(1, TEXT, 28)), IN),
    "SanaVideoPipeline": Entry(
        lambda: pipeline("SanaVideoPipeline", transformer=sana_video()[0]),
        guided(prompt_embeds=(1, TEXT, 28)),
        {"height": 64, "width": 64, **MASKS, "frames": 9, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "ZImagePipeline": Entry(
        lambda: pipeline("ZImagePipeline", transformer=z_image()[0]),
        z_image_prompt,
        IN,
        of_transformer("call 1", hits=LEARNS),  # of two images one is the sample, the other changes at each step
    ),
    "Lumina2Pipeline": Entry(
        lambda: pipeline("Lumina2Pipeline", transformer=changed(lumina2()[0], in_channels=5)),
        guided(prompt_embeds=(1, TEXT, 28)),
        {**IN, **MASKS},
        of_transformer("call 1", "call 1 (1)", hits=LEARNS),  # prompts of two lengths are two graphs
        fullgraph=False,
    ),
    "OvisImagePipeline": Entry(
        lambda: pipeline(
            "OvisImagePipeline", transformer=like(diffusers.OvisImageTransformer2DModel, flux()[0], out_channels=20)
        ),
        guided(prompt_embeds=(1, TEXT, 28)),
        {**IN, "negative_prompt": None},
        PASSES,
    ),
    "SkyReelsV2Pipeline": Entry(skyreels, guided(prompt_embeds=(1, TEXT, 28)), VIDEO, PASSES),
    "HunyuanImagePipeline": Entry(
        hunyuan_image,
        guided(prompt_embeds=(1, TEXT, 28), prompt_embeds_2=(1, 7, 20)),
        {
            "height": 6 * 32,
            "width": 8 * 32,
            **TEXT_MASKS,
            "prompt_embeds_mask_2": torch.ones(1, 7, dtype=torch.bool),
            "negative_prompt_embeds_mask_2": torch.ones(1, 7, dtype=torch.bool),
        },
        NOTHING,
        fullgraph=False,
        never="only a piece of its model",  # it asks whether any text is there, and reads masks row by row
    ),
    "PRXPipeline": Entry(
        prx,
        guided(prompt_embeds=(1, TEXT, 28)),
        {**IN, **MASKS, "use_resolution_binning": False, "negative_prompt": None},
    ),
    "EasyAnimatePipeline": Entry(easyanimate, guided(prompt_embeds=(1, TEXT, 28)), {**VIDEO, **MASKS}),
    "ChromaImg2ImgPipeline": Entry(
        lambda: pipeline("ChromaImg2ImgPipeline", transformer=chroma()[0], vae=vae()),
        guided(prompt_embeds=(1, TEXT, 28)),
        {**IN, **MASKS, **WITH_STRENGTH},
        TWO_CALLS,
    ),
    "ZImageImg2ImgPipeline": Entry(
        lambda: pipeline("ZImageImg2ImgPipeline", transformer=z_image()[0], vae=vae(6)),
        z_image_prompt,
        {**IN, **WITH_STRENGTH},
        of_transformer("call 1", hits=LEARNS),
    ),
    "HiDreamImagePipeline": Entry(
        lambda: hidream_image(),
        guided(prompt_embeds_t5=(1, 9, 20), prompt_embeds_llama3=(2, 1, 7, 28), pooled_prompt_embeds=(1, 36)),
        {"height": 64, "width": 64},
        NOTHING,
        fullgraph=False,
        never="only a piece of its model",  # its mixture of experts reads which tokens go where, in each block
    ),
}

PIPELINES: dict[str, Entry] = {**FLUX, **FLUX2, **SD3, **QWEN, **WAN, **VIDEOS, **PICTURES, **MORE}
