"""Makes the small FLUX pipeline from nothing: trains the autoencoder, then transformer and text encoders together.

    python examples/tiny_flux/train.py

Stopped at any time, the same command goes on where the last checkpoint was taken and comes to the same bits as a run
that was never stopped: every batch is drawn from the seed and the number of its step alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import FluxPipeline
from models import TEXT_TOKENS, build_pipeline
from pictures import PICTURE_SIZE, draw, split_scenes
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

FOLDER = Path(__file__).parent
CHECKPOINTS = FOLDER.parents[1] / "output" / "tiny_flux"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the weights. Equal settings on equal machines give equal bits."""

    steps: int = 8_000
    """Of the transformer and the text encoders."""

    batch: int = 16
    learning_rate: float = 3e-3
    shift: float = 3.0
    """How far noise levels are shifted up, as by the scheduler: at high ones it is decided which shape lies where."""

    autoencoder_steps: int = 800
    autoencoder_batch: int = 16
    autoencoder_learning_rate: float = 3e-3
    kl_weight: float = 1e-3
    """How much the latents are drawn towards a normal distribution."""

    pictures: int = 16_000
    """Pictures drawn and encoded once to train the transformer on."""

    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a run is carried out; it changes no bit of what comes out on the same device and number of threads."""

    checkpoints: Path = CHECKPOINTS
    device: str = "cpu"
    checkpoint_every: int = 250
    pause_after: int | None = None
    """Stop with a checkpoint after this run has made so many steps of the autoencoder, or of the rest."""


class Paused(Exception):
    """The run has made as many steps as it was asked to, and has taken a checkpoint."""


class OtherSettings(ValueError):
    """A checkpoint is of a run with other settings."""


class Average:
    """The exponential moving average of weights, which makes better pictures than the last weights do."""

    def __init__(self, modules: nn.Module, decay: float) -> None:
        self.weights: list[Tensor] = list(modules.parameters())
        self.averages: list[Tensor] = [weight.detach().clone() for weight in self.weights]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # a short run forgets its first weights too
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        torch._foreach_copy_(self.weights, self.averages)


def learning_rate_share(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm_up = min(200, steps // 10 + 1)
    return min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def matrices_of_blocks(modules: nn.Module) -> list[nn.Parameter]:
    """The weights of the linear layers in the models' blocks; the autoencoder has none."""
    blocks = [part for part in modules.modules() if isinstance(part, nn.ModuleList) and part is not modules]
    linear = [part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)]
    return list(dict.fromkeys(part.weight for part in linear))


def optimizers(modules: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks, AdamW for all else.

    Muon (Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024) takes each step's direction
    orthogonal. With the scale of Moonlight ("Muon is Scalable for LLM Training", 2025) one learning rate suits both.
    """
    matrices = matrices_of_blocks(modules)
    others = [weight for weight in modules.parameters() if all(weight is not matrix for matrix in matrices)]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ]
    if matrices:
        made.append(torch.optim.Muon(matrices, learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return made


def train(
    name: str,
    modules: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    settings: Settings,
    run: Run,
) -> None:
    """Trains modules in place and leaves them with their averaged weights, or goes on where a checkpoint was taken.

    `loss` takes the number of a step and must depend on nothing else but the weights.

    Raises:
        Paused: the run has made its steps and has taken a checkpoint.
        OtherSettings: the checkpoint cannot be gone on from.
    """
    updates = optimizers(modules, learning_rate)
    average = Average(modules, decay=0.998)
    losses: list[float] = []
    path = run.checkpoints / f"{name}.pt"
    if path.exists():
        state = torch.load(path, map_location=run.device, weights_only=True)
        if state["settings"] != asdict(settings):
            before = state["settings"].items() - asdict(settings).items()
            raise OtherSettings(
                f"{path} is of a run with other settings, {dict(before)}: give another --checkpoints, or remove it"
            )
        modules.load_state_dict(state["modules"])
        for update, before in zip(updates, state["optimizers"], strict=True):
            update.load_state_dict(before)
        average.averages = state["average"]
        losses = state["losses"]

    def take_checkpoint() -> None:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": asdict(settings),
            "modules": modules.state_dict(),
            "optimizers": [update.state_dict() for update in updates],
            "average": average.averages,
            "losses": losses,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    first = len(losses)
    progress = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=1)
    for step in progress:
        for group in itertools.chain.from_iterable(update.param_groups for update in updates):
            group["lr"] = learning_rate * learning_rate_share(step, steps)
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for update in updates:
            update.step()
            update.zero_grad()
        average.update(step)
        losses.append(value.item())
        recent = losses[-100:]
        progress.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
        paused = run.pause_after is not None and step + 1 - first == run.pause_after
        if paused or (step + 1) % run.checkpoint_every == 0 or step + 1 == steps:
            take_checkpoint()
        if paused:
            raise Paused
    average.apply()


def draw_pictures(source: random.Random, count: int) -> tuple[Tensor, list[str]]:
    """Pictures (count, 3, height, width) in [-1, 1] of random training scenes, and their prompts."""
    scenes = source.choices(split_scenes()[0], k=count)
    return torch.stack([draw(scene, source) for scene in scenes]) * 2 - 1, [scene.prompt for scene in scenes]


def train_autoencoder(pipeline: FluxPipeline, settings: Settings, run: Run) -> None:
    vae = pipeline.vae

    def loss(step: int) -> Tensor:
        source = random.Random(f"autoencoder {settings.seed} {step}")
        pictures = draw_pictures(source, settings.autoencoder_batch)[0].to(run.device)
        posterior = vae.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(source.getrandbits(32)))
        decoded = vae.decode(posterior.mean + posterior.std * noise.to(run.device)).sample
        difference: Tensor = functional.l1_loss(decoded, pictures) + functional.mse_loss(decoded, pictures)
        return difference + settings.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()

    train("autoencoder", vae, loss, settings.autoencoder_steps, settings.autoencoder_learning_rate, settings, run)


@torch.no_grad()
def encode_pictures(pipeline: FluxPipeline, settings: Settings, run: Run) -> tuple[Tensor, list[str]]:
    """Draws the pictures to train on and gives their latents, packed and normalised as the pipeline wants them.

    The factors of the normalisation are measured here and entered into the autoencoder's configuration.
    """
    vae, latents, prompts = pipeline.vae, [], []
    source = random.Random(f"pictures {settings.seed}")
    for start in tqdm(range(0, settings.pictures, 64), desc="encoding"):
        pictures, some = draw_pictures(source, min(64, settings.pictures - start))
        latents.append(vae.encode(pictures.to(run.device)).latent_dist.mean)
        prompts += some
    encoded = torch.cat(latents)
    shift, scale = float(encoded.mean()), 1 / float(encoded.std())
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return pipeline._pack_latents((encoded - shift) * scale, *encoded.shape), prompts


def train_flux(pipeline: FluxPipeline, latents: Tensor, prompts: list[str], settings: Settings, run: Run) -> None:
    """Rectified flow: between picture (t = 0) and noise (t = 1) the model tells the direction, noise - picture."""
    transformer, encoder, encoder_2 = pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2
    longest = dict(padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt")
    tokens = pipeline.tokenizer(prompts, **longest).input_ids
    tokens_2 = pipeline.tokenizer_2(prompts, **longest).input_ids
    side = PICTURE_SIZE // (2 * pipeline.vae_scale_factor)
    image_ids = pipeline._prepare_latent_image_ids(1, side, side, run.device, torch.float32)
    text_ids = torch.zeros(TEXT_TOKENS, 3, device=run.device)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        chosen = torch.randint(len(prompts), (settings.batch,), generator=generator)
        noise = torch.randn(settings.batch, *latents.shape[1:], generator=generator).to(run.device)
        time = torch.randn(settings.batch, generator=generator).sigmoid().to(run.device)
        time = settings.shift * time / (1 + (settings.shift - 1) * time)
        guidance = (1 + 4 * torch.rand(settings.batch, generator=generator)).to(run.device)
        pictures = latents[chosen.to(latents.device)]
        weight = time[:, None, None]
        predicted = transformer(
            hidden_states=(1 - weight) * pictures + weight * noise,
            encoder_hidden_states=encoder_2(tokens_2[chosen].to(run.device))[0],
            pooled_projections=encoder(tokens[chosen].to(run.device)).pooler_output,
            timestep=time,
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=guidance,
            return_dict=False,
        )[0]
        return functional.mse_loss(predicted, noise - pictures)

    modules = nn.ModuleList([transformer, encoder, encoder_2])
    train("flux", modules, loss, settings.steps, settings.learning_rate, settings, run)


def make_pipeline(settings: Settings, run: Run) -> FluxPipeline:
    """Trains everything and gives the pipeline, on the CPU."""
    pipeline = build_pipeline(settings.seed).to(run.device)
    for module in (pipeline.vae, pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        module.eval().requires_grad_(True)
    train_autoencoder(pipeline, settings, run)
    latents, prompts = encode_pictures(pipeline, settings, run)
    train_flux(pipeline, latents, prompts, settings, run)
    return pipeline.to("cpu")


def main() -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(description="trains the small FLUX pipeline from nothing")
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder that is made, or overwritten")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="where a stopped run goes on from")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="of transformer and text encoders")
    parser.add_argument("--autoencoder-steps", type=int, default=defaults.autoencoder_steps)
    parser.add_argument("--pictures", type=int, default=defaults.pictures, help="drawn pictures to train on")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads for the CPU; torch's choice by default")
    parser.add_argument("--pause-after", type=int, help="stop with a checkpoint after so many steps")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        steps=options.steps,
        autoencoder_steps=options.autoencoder_steps,
        pictures=options.pictures,
        seed=options.seed,
    )
    run = Run(checkpoints=options.checkpoints, device=options.device, pause_after=options.pause_after)
    try:
        pipeline = make_pipeline(settings, run)
    except Paused:
        print(f"paused; the same command without --pause-after goes on from {options.checkpoints}")
        return
    except OtherSettings as error:
        parser.error(str(error))
    pipeline.save_pretrained(options.output)
    print(f"the pipeline is in {options.output}")


if __name__ == "__main__":
    main()
