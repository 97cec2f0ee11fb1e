"""diffusers' autoencoders, small and with random weights: what is decoded and encoded, and how.

Numbers of channels differ from level to level, and a latent image has other numbers of rows and columns than ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
from random_tensors import draw, randomise
from torch import Tensor, nn


@dataclass(frozen=True)
class Autoencoder:
    """One class of diffusers'.

    attributes:
        build: makes the model.
        channels: of its latents.
        scale: pixels of a latent's side.
        frames: latent frames and frames of a video; None where there are images.
    """

    build: Callable[[], nn.Module]
    channels: int
    scale: int
    frames: tuple[int, int] | None = None

    def latents(self, rows: int, columns: int) -> Tensor:
        return self._drawn(self.channels, 0, rows, columns)

    def pixels(self, rows: int, columns: int) -> Tensor:
        return self._drawn(3, 1, self.scale * rows, self.scale * columns)

    def _drawn(self, channels: int, which: int, rows: int, columns: int) -> Tensor:
        frames = () if self.frames is None else (self.frames[which],)
        return draw(1, channels, *frames, rows, columns, seed=3 + which)


def decoding(vae: Any) -> Callable[[Tensor], Tensor]:
    return lambda latents: vae.decode(latents, return_dict=False)[0]


def encoding(vae: Any) -> Callable[[Tensor], Tensor]:
    def encode(pixels: Tensor) -> Tensor:
        found = vae.encode(pixels, return_dict=False)[0]
        return found if isinstance(found, Tensor) else found.parameters

    return encode


def _blocks(kind: str, levels: int) -> dict[str, Any]:
    down, up = kind.split()
    return {"down_block_types": (down,) * levels, "up_block_types": (up,) * levels}


def _kl(name: str, **how: Any) -> Callable[[], nn.Module]:
    blocks = _blocks("DownEncoderBlock2D UpDecoderBlock2D", 3)
    sizes = {"block_out_channels": (8, 12, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return lambda: randomise(getattr(diffusers, name)(**{**blocks, **sizes, **how}))


def _causal(name: str) -> Callable[[], nn.Module]:
    return lambda: randomise(
        getattr(diffusers, name)(
            base_dim=6,
            z_dim=4,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    )


def _hunyuan_video() -> nn.Module:
    blocks = _blocks("HunyuanVideoDownBlock3D HunyuanVideoUpBlock3D", 4)
    return randomise(
        diffusers.AutoencoderKLHunyuanVideo(
            **blocks, latent_channels=4, block_out_channels=(8, 8, 12, 16), layers_per_block=1, norm_num_groups=4
        )
    )


def _ltx() -> nn.Module:
    return randomise(
        diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 12, 16),
            decoder_block_out_channels=(8, 12, 16),
            down_block_types=("LTXVideoDownBlock3D",) * 3,
            layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatio_temporal_scaling=(True, False, False),
            decoder_spatio_temporal_scaling=(True, False, False),
            decoder_inject_noise=(False,) * 4,
            downsample_type=("conv",) * 3,
            upsample_residual=(False,) * 3,
            upsample_factor=(1,) * 3,
            patch_size=2,
            encoder_causal=True,
            decoder_causal=False,
        )
    )


def _mochi() -> nn.Module:
    return randomise(
        diffusers.AutoencoderKLMochi(
            latent_channels=4,
            encoder_block_out_channels=(32, 32, 64, 64),
            decoder_block_out_channels=(32, 32, 64, 64),
            layers_per_block=(1, 1, 1, 1, 1),
            latents_mean=(0.0,) * 4,
            latents_std=(1.0,) * 4,
        )
    )


def _cogvideox() -> nn.Module:
    blocks = _blocks("CogVideoXDownBlock3D CogVideoXUpBlock3D", 4)
    return randomise(
        diffusers.AutoencoderKLCogVideoX(
            **blocks, block_out_channels=(8, 8, 12, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4
        )
    )


def _dc() -> nn.Module:
    return randomise(
        diffusers.AutoencoderDC(
            latent_channels=8,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 16, 16),
            decoder_block_out_channels=(8, 16, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
        )
    )


AUTOENCODERS: dict[str, Autoencoder] = {
    "flux": Autoencoder(_kl("AutoencoderKL", latent_channels=5, use_quant_conv=False, use_post_quant_conv=False), 5, 4),
    "stable_diffusion": Autoencoder(_kl("AutoencoderKL", latent_channels=4), 4, 4),
    "flux2": Autoencoder(_kl("AutoencoderKLFlux2", latent_channels=5), 5, 4),
    "qwen_image": Autoencoder(_causal("AutoencoderKLQwenImage"), 4, 4, (1, 1)),
    "wan": Autoencoder(_causal("AutoencoderKLWan"), 4, 4, (2, 3)),
    "hunyuan_video": Autoencoder(_hunyuan_video, 4, 8, (2, 5)),
    "ltx_video": Autoencoder(_ltx, 8, 4, (2, 3)),
    "mochi": Autoencoder(_mochi, 4, 8, (2, 7)),
    "cogvideox": Autoencoder(_cogvideox, 4, 8, (2, 5)),
    "sana": Autoencoder(_dc, 8, 4),
}
