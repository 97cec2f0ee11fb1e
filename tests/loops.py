"""A pipeline of diffusers with a loop of its own: any number of passes in a step, of any conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from denoising import prompts
from diffusers import DiffusionPipeline
from torch import Tensor, nn


class Loop(DiffusionPipeline):
    """Calls a small Wan between the ends of steps that the progress bar is told of."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.model = transformer
        self.register_modules(transformer=getattr(transformer, "_orig_mod", transformer))
        self.set_progress_bar_config(disable=True)

    transformer: nn.Module

    @torch.no_grad()
    def __call__(self, texts: Sequence[Sequence[Tensor]], times: Sequence[float]) -> list[list[Tensor]]:
        """What each pass of each step gives; `texts` has the conditioning of each, and the samples are drawn."""
        noise = prompts("wan").noise
        found = []
        with self.progress_bar(total=len(texts)) as bar:
            for number, (passes, time) in enumerate(zip(texts, times, strict=True)):
                at = torch.full((len(noise),), time)
                found.append(
                    [
                        self.model(noise + 0.1 * number, timestep=at, encoder_hidden_states=text, return_dict=False)[0]
                        for text in passes
                    ]
                )
                bar.update()
        return found
