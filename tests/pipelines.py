"""diffusers' own pipelines with small random parts: nothing is downloaded, prompts are given as embeddings.

    pipeline = build("FluxPipeline")
    entry = PIPELINES["FluxPipeline"]
    pipeline(**entry.call, **entry.prompt(seed=1))

Real schedulers run them. What takes pictures or videos has a small VAE, and gives its latents where it can.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from families import cogvideox, flux, hunyuan_video, ltx_video, mochi, qwen_image, stable_diffusion_3, wan
from more_families import auraflow, chroma, flux2, hunyuan_dit, krea2, latte, sana, sana_video
from pieces import hidream, lumina2, z_image
from pipeline_parts import (
    HEIGHT,
    WIDTH,
    NoChecks,
    ace_step,
    ace_step_conditions,
    allegro,
    changed,
    cogvideox_vae,
    cogview4,
    consis_id,
    cosmos,
    dit,
    easyanimate,
    flux2_vae,
    hunyuan_image,
    hunyuan_video_15,
    kandinsky5,
    letters,
    like,
    magvit,
    mask,
    picture,
    picture_vae,
    pixart,
    prx,
    qwen3,
    small,
    vae_in_time,
    video,
)
from random_tensors import draw
from torch import Tensor

STEPS = 6
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
        parts: its components and other arguments of its class, or what makes them.
        prompt: the arguments of a call that say what is wanted, for a seed.
        call: the other ones.
        slots: of each component that is compiled, the hits of each slot.
        settings: attributes that are set on the pipeline.
        fullgraph: whether the components are compiled as one graph each.
        never: why nothing is ever skipped, in words of the warning that tells so.
        needs: a module that its class imports, and that is no dependency of the tests.
    """

    parts: Mapping[str, Any]
    prompt: Callable[[int], dict[str, Any]]
    call: Mapping[str, Any] = field(default_factory=dict)
    slots: Mapping[str, Mapping[str, Hits]] = field(default_factory=lambda: {"transformer": {"call 1": SKIPS}})
    settings: Mapping[str, Any] = field(default_factory=dict)
    fullgraph: bool = True
    never: str | None = None
    needs: str | None = None


def build(name: str) -> DiffusionPipeline:
    """The pipeline of this entry; what its class takes besides, as text encoders, is None."""
    entry, kind = PIPELINES[name], getattr(diffusers, name.split()[0])
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    nothing = {each.name: None for each in parameters if each.default is inspect.Parameter.empty}
    parts = {name: part() if callable(part) else part for name, part in entry.parts.items()}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline: DiffusionPipeline = kind(**{**nothing, "scheduler": scheduler, **parts})
    for name, value in entry.settings.items():
        setattr(pipeline, name, value)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Slots


def slots(*names: str, hits: Hits = SKIPS) -> dict[str, dict[str, Hits]]:
    return {"transformer": dict.fromkeys(names, hits)}


PASSES = slots("cond", "uncond")
"""Where the pipeline names its passes."""
BOTH = slots("cond_uncond")
"""Where it names the one call that has both in one batch."""
TWO_CALLS = slots("call 1", "call 2")
"""Where it does not name them."""
LEARNING, TWO_LEARNING = slots("call 1", hits=LEARNS), slots("call 1", "call 2", hits=LEARNS)
NOTHING: dict[str, dict[str, Hits]] = {"transformer": {}}
"""Where nothing is ever skipped."""


# Prompts


def embeds(**shapes: tuple[int, ...]) -> Callable[[int], dict[str, Tensor]]:
    """A prompt as tensors of these shapes, drawn anew for each seed."""
    return lambda seed: {name: draw(*shape, seed=100 * seed + n) for n, (name, shape) in enumerate(shapes.items())}


def guided(**shapes: tuple[int, ...]) -> Callable[[int], dict[str, Tensor]]:
    """A prompt and a negative one."""
    return embeds(**shapes, **{f"negative_{name}": shape for name, shape in shapes.items()})


def z_image_prompt(seed: int) -> dict[str, list[Tensor]]:
    return {"prompt_embeds": [draw(10, 20, seed=seed)], "negative_prompt_embeds": [draw(7, 20, seed=seed + 50)]}


PROMPT = {"prompt_embeds": (1, TEXT, 28)}
POOLED = {**PROMPT, "pooled_prompt_embeds": (1, 36)}
SHOWN, PADDED = torch.ones(1, TEXT, dtype=torch.bool), torch.arange(TEXT)[None] < TEXT - 3
MASKS = {"prompt_embeds_mask": SHOWN, "negative_prompt_embeds_mask": PADDED}
ATTENTION_MASKS = {"prompt_attention_mask": SHOWN, "negative_prompt_attention_mask": PADDED}
LENGTHS = {"prompt_cu_seqlens": torch.tensor([0, TEXT]), "negative_prompt_cu_seqlens": torch.tensor([0, TEXT])}


# Other arguments

SIZE = {"height": HEIGHT, "width": WIDTH}
VIDEO = {**SIZE, "num_frames": 9}
TRUE_CFG = {"true_cfg_scale": 2.0}
PICTURE = {"image": picture(5)}
FROM_PICTURE = {**SIZE, **PICTURE, "strength": 1.0}
INPAINT = {**FROM_PICTURE, "mask_image": mask(6)}
CONTROL = {**SIZE, "control_image": picture(7)}
TWO_MASKS = {**MASKS, **{f"{name}_2": value for name, value in MASKS.items()}}
TWO_TEXTS = guided(**PROMPT, prompt_embeds_2=(1, TEXT, 20))
GUIDER = partial(diffusers.ClassifierFreeGuidance, guidance_scale=2.0)
AS_IT_IS = {"use_resolution_binning": False, "negative_prompt": None}


# The parts of more than one pipeline

FLUX = {"transformer": changed(flux), "vae": picture_vae}
FLUX_CONTROLNET = {**FLUX, "controlnet": like("FluxControlNetModel", flux, num_layers=1, num_single_layers=1)}
SD3 = {"transformer": changed(stable_diffusion_3), "vae": picture_vae}
QWEN = {"transformer": changed(qwen_image), "vae": vae_in_time("AutoencoderKLQwenImage")}
WAN = {"transformer": changed(wan), "vae": vae_in_time("AutoencoderKLWan")}
CHROMA = {"transformer": changed(chroma), "vae": picture_vae}
PIXART = {"transformer": pixart, "scheduler": diffusers.DPMSolverMultistepScheduler}
Z_IMAGE = {"transformer": changed(z_image), "vae": partial(picture_vae, 6)}


PIPELINES: dict[str, Entry] = {
    # FLUX
    "FluxPipeline": Entry(FLUX, guided(**POOLED), {**SIZE, **TRUE_CFG}, PASSES),
    "FluxImg2ImgPipeline": Entry(FLUX, guided(**POOLED), {**FROM_PICTURE, **TRUE_CFG}, TWO_CALLS),
    "FluxInpaintPipeline": Entry(FLUX, guided(**POOLED), {**INPAINT, **TRUE_CFG}, TWO_CALLS),
    "FluxKontextPipeline": Entry(
        FLUX,
        guided(**POOLED),
        {**SIZE, **PICTURE, **TRUE_CFG, "max_area": HEIGHT * WIDTH, "_auto_resize": False},
        TWO_CALLS,
    ),
    "FluxFillPipeline": Entry(
        # latents, those of the masked picture, and the mask of each pixel
        {**FLUX, "transformer": changed(flux, in_channels=20 + 20 + 4 * 64, out_channels=20)},
        embeds(**POOLED),
        INPAINT,
    ),
    "FluxControlPipeline": Entry(
        {**FLUX, "transformer": changed(flux, in_channels=20 + 20, out_channels=20)}, embeds(**POOLED), CONTROL
    ),
    "FluxControlNetPipeline": Entry(FLUX_CONTROLNET, guided(**POOLED), {**CONTROL, **TRUE_CFG}, TWO_LEARNING),
    "FluxControlNetImg2ImgPipeline": Entry(FLUX_CONTROLNET, embeds(**POOLED), {**CONTROL, **FROM_PICTURE}, LEARNING),
    "FluxControlNetInpaintPipeline": Entry(FLUX_CONTROLNET, embeds(**POOLED), {**CONTROL, **INPAINT}, LEARNING),
    # FLUX.2
    "Flux2Pipeline": Entry(
        {"transformer": changed(partial(flux2, double=1), guidance_embeds=True)}, embeds(**PROMPT), SIZE
    ),
    "Flux2KleinPipeline": Entry(
        {"transformer": changed(partial(flux2, double=1)), "vae": flux2_vae},
        guided(**PROMPT),
        {**SIZE, "guidance_scale": 4.0},
        PASSES,
    ),
    # Stable Diffusion 3
    "StableDiffusion3Pipeline": Entry(SD3, guided(**POOLED), SIZE),
    "StableDiffusion3Img2ImgPipeline": Entry(SD3, guided(**POOLED), FROM_PICTURE),
    "StableDiffusion3InpaintPipeline": Entry(
        {
            "transformer": changed(stable_diffusion_3, in_channels=16, out_channels=16),
            "vae": partial(picture_vae, 16),
        },
        guided(**POOLED),
        INPAINT,
    ),
    "StableDiffusion3ControlNetPipeline": Entry(
        {**SD3, "controlnet": like("SD3ControlNetModel", partial(stable_diffusion_3, dual=False), num_layers=1)},
        guided(**POOLED),
        CONTROL,
        LEARNING,
    ),
    "StableDiffusion3Pipeline with Heun's method": Entry(
        {**SD3, "scheduler": diffusers.FlowMatchHeunDiscreteScheduler},
        guided(**POOLED),
        SIZE,
        slots("call 1", hits=(SKIPS * 2)[: 2 * STEPS - 1]),  # two evaluations a step, but for the last
    ),
    # Qwen-Image
    "QwenImagePipeline": Entry(QWEN, guided(**PROMPT), {**SIZE, **MASKS}, PASSES),
    "QwenImageImg2ImgPipeline": Entry(QWEN, guided(**PROMPT), {**FROM_PICTURE, **MASKS}, PASSES),
    "QwenImageInpaintPipeline": Entry(QWEN, guided(**PROMPT), {**INPAINT, **MASKS}, PASSES),
    "QwenImageControlNetPipeline": Entry(
        {**QWEN, "controlnet": like("QwenImageControlNetModel", qwen_image, num_layers=1)},
        guided(**PROMPT),
        {**CONTROL, **MASKS},
        PASSES,
    ),
    # Wan, and SkyReels, which is like it
    "WanPipeline": Entry(WAN, guided(**PROMPT), VIDEO, PASSES),
    "WanPipeline with two transformers": Entry(
        {**WAN, "transformer_2": changed(wan, seed=2), "boundary_ratio": 0.8},
        guided(**PROMPT),
        VIDEO,
        {name: dict.fromkeys(("cond", "uncond"), SKIPS[:3]) for name in ("transformer", "transformer_2")},
    ),
    "WanImageToVideoPipeline": Entry(
        # latents, those of the picture, and the mask of four frames
        {**WAN, "transformer": changed(wan, in_channels=5 + 5 + 4)},
        guided(**PROMPT),
        {**VIDEO, **PICTURE},
        PASSES,
    ),
    "WanVideoToVideoPipeline": Entry(WAN, guided(**PROMPT), {**SIZE, "video": video(8), "strength": 1.0}, TWO_CALLS),
    "WanVACEPipeline": Entry(
        {
            **WAN,
            "transformer": like("WanVACETransformer3DModel", wan, vace_layers=[0, 1], vace_in_channels=5 + 5 + 8 * 8),
        },
        guided(**PROMPT),
        VIDEO,
        PASSES,
    ),
    "SkyReelsV2Pipeline": Entry(
        {
            "transformer": like("SkyReelsV2Transformer3DModel", wan),
            "scheduler": partial(
                diffusers.UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True
            ),
        },
        guided(**PROMPT),
        VIDEO,
        PASSES,
    ),
    # Other videos
    "HunyuanVideoPipeline": Entry(
        {"transformer": changed(hunyuan_video)}, guided(**POOLED), {**VIDEO, **ATTENTION_MASKS, **TRUE_CFG}, PASSES
    ),
    "LTXPipeline": Entry(
        {"transformer": changed(ltx_video)},
        guided(**PROMPT),
        {"height": 96, "width": 128, "num_frames": 9, **ATTENTION_MASKS},
        BOTH,
    ),
    "CogVideoXPipeline": Entry(
        {
            "transformer": changed(partial(cogvideox, text=TEXT), sample_height=HEIGHT // 8, sample_width=WIDTH // 8),
            "scheduler": diffusers.CogVideoXDDIMScheduler,
        },
        guided(**PROMPT),
        VIDEO,
        BOTH,
    ),
    "ConsisIDPipeline": Entry(
        {"transformer": consis_id, "scheduler": diffusers.CogVideoXDPMScheduler, "vae": cogvideox_vae},
        guided(**PROMPT),
        {**VIDEO, **PICTURE, "id_vit_hidden": [draw(2, 2, 6, seed=3)], "id_cond": draw(2, 6, seed=4)},
        needs="cv2",
    ),
    "MochiPipeline": Entry(
        {"transformer": changed(partial(mochi, text=TEXT), in_channels=12)},
        guided(prompt_embeds=(1, TEXT, 32)),
        {**SIZE, "num_frames": 7, **ATTENTION_MASKS},
        BOTH,
    ),
    "CosmosTextToWorldPipeline": Entry(
        {"transformer": cosmos, "scheduler": diffusers.EDMEulerScheduler, "safety_checker": NoChecks},
        guided(**PROMPT),
        VIDEO,
        TWO_CALLS,
    ),
    "Kandinsky5T2VPipeline": Entry(
        {"transformer": kandinsky5},
        guided(prompt_embeds_qwen=(1, TEXT, 28), prompt_embeds_clip=(1, 36)),
        {**VIDEO, **LENGTHS},
        TWO_CALLS,
    ),
    "LattePipeline": Entry(
        {
            "transformer": changed(latte, out_channels=10, sample_size=8, video_length=2),
            "scheduler": partial(diffusers.DDIMScheduler, clip_sample=False),
        },
        guided(**PROMPT),
        {**SIZE, "video_length": 2, "negative_prompt": None},
    ),
    "AllegroPipeline": Entry(
        {"transformer": allegro, "scheduler": diffusers.EulerAncestralDiscreteScheduler},
        guided(**PROMPT),
        {**SIZE, "num_frames": 8, **ATTENTION_MASKS, "negative_prompt": None},
    ),
    "SanaVideoPipeline": Entry(
        {"transformer": changed(sana_video)},
        guided(**PROMPT),
        {"height": 64, "width": 64, "frames": 9, **ATTENTION_MASKS, **AS_IT_IS},
    ),
    "EasyAnimatePipeline": Entry(
        {"transformer": easyanimate, "vae": magvit}, guided(**PROMPT), {**VIDEO, **ATTENTION_MASKS}
    ),
    # Music
    "AceStepPipeline": Entry(
        {
            "transformer": ace_step,
            "condition_encoder": ace_step_conditions,
            "text_encoder": qwen3,
            "tokenizer": letters,
            "scheduler": partial(FlowMatchEulerDiscreteScheduler, num_train_timesteps=1, shift=1.0),
        },
        lambda seed: {"prompt": f"song number {seed}"},
        {"lyrics": "la la", "audio_duration": 0.96},
    ),
    # Other pictures
    "AuraFlowPipeline": Entry(
        {"transformer": changed(auraflow, sample_size=8)}, guided(**PROMPT), {**SIZE, **ATTENTION_MASKS}
    ),
    "BriaPipeline": Entry(
        {
            "transformer": like("BriaTransformer2DModel", flux, pooled_projection_dim=None, guidance_embeds=False),
            "vae": picture_vae,
        },
        guided(**PROMPT),
        SIZE,
    ),
    "ChromaPipeline": Entry(CHROMA, guided(**PROMPT), {**SIZE, **ATTENTION_MASKS}, TWO_CALLS),
    "ChromaImg2ImgPipeline": Entry(CHROMA, guided(**PROMPT), {**FROM_PICTURE, **ATTENTION_MASKS}, TWO_CALLS),
    "CogView4Pipeline": Entry({"transformer": cogview4}, guided(**PROMPT), SIZE, PASSES),
    "Cosmos2TextToImagePipeline": Entry(
        {
            "transformer": cosmos,
            "scheduler": partial(FlowMatchEulerDiscreteScheduler, use_karras_sigmas=True),
            "safety_checker": NoChecks,
        },
        guided(**PROMPT),
        SIZE,
        TWO_CALLS,
    ),
    "DiTPipeline": Entry(
        {"transformer": dit, "scheduler": diffusers.DDIMScheduler, "vae": picture_vae},
        lambda seed: {"class_labels": [seed]},
        {"output_type": "pt"},
    ),
    "HunyuanDiTPipeline": Entry(
        {
            "transformer": changed(partial(hunyuan_dit, text=TEXT), learn_sigma=True, sample_size=8, text_len_t5=TEXT),
            "scheduler": diffusers.DDPMScheduler,
            "requires_safety_checker": False,
        },
        guided(**PROMPT, prompt_embeds_2=(1, TEXT, 24)),
        {
            **SIZE,
            **ATTENTION_MASKS,
            **{f"{name}_2": value for name, value in ATTENTION_MASKS.items()},
            "use_resolution_binning": False,
        },
    ),
    "Kandinsky5T2IPipeline": Entry(
        {"transformer": kandinsky5},
        guided(prompt_embeds_qwen=(1, TEXT, 28), prompt_embeds_clip=(1, 36)),
        {**SIZE, **LENGTHS},
        TWO_CALLS,
        settings={"resolutions": [(WIDTH, HEIGHT)]},
    ),
    "Krea2Pipeline": Entry(
        {"transformer": changed(krea2)},
        guided(prompt_embeds=(1, TEXT, 3, 28)),
        {**SIZE, **MASKS, "guidance_scale": 2.0},  # a larger one would make more of rounding
        TWO_CALLS,
    ),
    "Lumina2Pipeline": Entry(
        {"transformer": changed(lumina2)},
        guided(**PROMPT),
        {**SIZE, **ATTENTION_MASKS},
        slots("call 1", "call 1, graph 2", hits=LEARNS),  # prompts of two lengths are two graphs
        fullgraph=False,
    ),
    "Lumina2Pipeline with guidance in the first half": Entry(
        {"transformer": changed(lumina2)},
        guided(**PROMPT),
        {**SIZE, **ATTENTION_MASKS, "cfg_trunc_ratio": 0.5},
        {"transformer": {"call 1": LEARNS, "call 1, graph 2": LEARNS[:3]}},
        fullgraph=False,
    ),
    "OvisImagePipeline": Entry(
        {"transformer": like("OvisImageTransformer2DModel", flux, out_channels=20)},
        guided(**PROMPT),
        {**SIZE, "negative_prompt": None},
        PASSES,
    ),
    "PixArtAlphaPipeline": Entry(PIXART, guided(**PROMPT), {**SIZE, **ATTENTION_MASKS, **AS_IT_IS}),
    "PixArtSigmaPipeline": Entry(PIXART, guided(**PROMPT), {**SIZE, **ATTENTION_MASKS, **AS_IT_IS}),
    "PRXPipeline": Entry({"transformer": prx}, guided(**PROMPT), {**SIZE, **ATTENTION_MASKS, **AS_IT_IS}),
    "SanaPipeline": Entry(
        {"transformer": changed(sana)},
        guided(**PROMPT),
        {"height": 8 * 32, "width": 8 * 32, **ATTENTION_MASKS, **AS_IT_IS},
    ),
    # latents are a list of two: one is the sample, the other an input that changes at each step
    # its first call makes tables in a way that breaks the graph
    "ZImagePipeline": Entry(Z_IMAGE, z_image_prompt, SIZE, LEARNING, fullgraph=False),
    "ZImagePipeline with guidance in the first half": Entry(
        Z_IMAGE,
        z_image_prompt,
        {**SIZE, "cfg_truncation": 0.2},
        {"transformer": {"call 1": LEARNS[:3], "call 1, graph 2": SKIPS[:3]}},
        fullgraph=False,
    ),
    "ZImageImg2ImgPipeline": Entry(Z_IMAGE, z_image_prompt, FROM_PICTURE, LEARNING, fullgraph=False),
    # Pipelines that never skip
    "HiDreamImagePipeline": Entry(
        {"transformer": changed(hidream)},
        guided(prompt_embeds_t5=(1, 9, 20), prompt_embeds_llama3=(2, 1, 7, 28), pooled_prompt_embeds=(1, 36)),
        {"height": 64, "width": 64},
        NOTHING,
        settings={"default_sample_size": 8},
        fullgraph=False,
        never="in moe_infer",  # each block has a mixture of experts: how many tokens one gets, data tells
    ),
    "HunyuanVideo15Pipeline": Entry(
        {
            "transformer": hunyuan_video_15,
            "vae": small(
                "AutoencoderKLHunyuanVideo15", latent_channels=5, block_out_channels=(8,) * 5, layers_per_block=1
            ),
            "guider": GUIDER,
        },
        TWO_TEXTS,
        {"height": 6 * 16, "width": 8 * 16, "num_frames": 9, **TWO_MASKS},
        NOTHING,
        fullgraph=False,
        never="none of the model's",  # all of it, image and text, is reordered by its masks, row by row, in a loop
    ),
    "HunyuanImagePipeline": Entry(
        {"transformer": hunyuan_image, "guider": GUIDER},
        TWO_TEXTS,
        {"height": 6 * 32, "width": 8 * 32, **TWO_MASKS},
        NOTHING,
        fullgraph=False,
        never="none of the model's",  # text is reordered by its masks, row by row, in a loop
    ),
}
