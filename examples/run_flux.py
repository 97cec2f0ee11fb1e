"""FLUX. The small one, in the folder `tiny_flux`, is trained: it draws a coloured shape on a coloured background."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from running import Example, main

FOLDER = Path(__file__).parent / "tiny_flux"


def small(options: argparse.Namespace) -> Any:
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(FOLDER)


EXAMPLE = Example(
    name="flux",
    pipeline="FluxPipeline",
    model="black-forest-labs/FLUX.1-dev",
    prompt="a large red circle on a blue background in the middle",
    small=small,
    call=dict(height=48, width=48, num_inference_steps=28, max_sequence_length=16),
    model_call=dict(height=1024, width=1024, num_inference_steps=28, max_sequence_length=512),
    vae=True,
    next="a video, `python examples/run_wan.py`, or your own pipeline, step by step: docs/fastest_flux.md",
)

if __name__ == "__main__":
    main(EXAMPLE)
