"""Runs a pipeline with each setting, on the same prompts and seeds.

Wall times are of whole calls that compile nothing: the first call of each compile, and each call in which something was
compiled, is made again. All settings make one picture before the next is begun, so that a machine that is slower for a
while is so for all of them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from tqdm import tqdm

import paracompile
from paracompile.errors import ParacompileError
from paracompile.torch_private import BackendCompilerFailed
from paracompile.tune.results import Figures, Job, Results
from paracompile.tune.settings import Setting, setting_of

__all__ = ["Runner", "check_call", "load", "run_jobs", "state_of"]

_ALWAYS = 1e30
"""A threshold under which everything is skipped: warms up what a skipped step runs, too."""

_COMPILES = 8
"""Of one setting at most, Dynamo's own default."""

_OURS = ("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt")


def load(folder: Path, device: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a folder that `save_pretrained` wrote.

    raises:
        ParacompileError: no such folder, or a pipeline without the one transformer that is tuned.
    """
    _check_folder(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(device)
    if not isinstance(getattr(pipeline, "transformer", None), nn.Module):
        raise ParacompileError(f"--pipe {folder}: a {type(pipeline).__name__} has no transformer")
    if isinstance(getattr(pipeline, "transformer_2", None), nn.Module):
        raise ParacompileError(f"--pipe {folder}: a {type(pipeline).__name__} has two transformers; one can be tuned")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def state_of(folder: Path) -> str:
    """A text on what a pipeline loads from its folder: another one after its weights changed.

    raises:
        ParacompileError: no such folder.
    """
    _check_folder(folder)
    index = folder / "model_index.json"
    parts = [folder / name for name in json.loads(index.read_text()) if not name.startswith("_")]
    files = [index, *(path for part in parts for path in part.rglob("*") if path.is_file())]
    facts = sorted((str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def check_call(pipeline: DiffusionPipeline, arguments: Mapping[str, Any]) -> None:
    """Whether the pipeline's call takes these arguments.

    raises:
        ParacompileError: it does not.
    """
    known = inspect.signature(pipeline.__call__).parameters
    for name in arguments:
        if name in _OURS:
            raise ParacompileError(f"--call {name}: tune sets this argument itself")
        if name not in known:
            names = ", ".join(known)
            raise ParacompileError(f"{type(pipeline).__name__} takes no argument {name!r}; it takes {names}")


def run_jobs(jobs: Sequence[Job], results: Results, runner: Callable[[], Runner]) -> dict[Job, Figures]:
    """The figures of all pictures; makes those that are missing, in the order given.

    args:
        runner: loads what makes them; not called where nothing is missing.
    """
    figures = {job: done for job in jobs if (done := results.done(job)) is not None}
    waiting = [job for job in jobs if job not in figures]
    if waiting:
        with tqdm(total=len(jobs), initial=len(figures), unit="picture") as bar:
            bar.set_description("loading")
            run = runner()
            for job in waiting:
                name = job.setting.name
                bar.set_description(name if run.ready_for(job.setting) else f"warming up for {name}")
                picture, figures[job] = run(job)
                results.save(job, picture, figures[job])
                bar.update()
    return figures


@dataclass
class _Model:
    """The transformer as some settings share it, and the reports of its compiles."""

    module: nn.Module
    reports: list[paracompile.Report] = field(default_factory=list)


class Runner:
    """Calls a pipeline with any setting; each compile stays for the next picture.

    args:
        arguments: of the pipeline's call, besides the prompt and the generator.
        compiler: the option of that name.
    """

    def __init__(self, pipeline: DiffusionPipeline, arguments: Mapping[str, Any], compiler: str) -> None:
        check_call(pipeline, arguments)
        self.pipeline = pipeline
        self.arguments = arguments
        self.compiler = compiler
        self.transformer: nn.Module = pipeline.transformer
        self._models: dict[tuple[object, ...], _Model] = {}

    def ready_for(self, setting: Setting) -> bool:
        """Whether the setting needs no further compile."""
        return setting.fixed in self._models

    def __call__(self, job: Job) -> tuple[Image.Image, Figures]:
        """Makes one picture.

        raises:
            ParacompileError: the pipeline makes no picture, or the cache can skip nothing in it.
        """
        if not self.ready_for(job.setting):
            self._models[job.setting.fixed] = self._prepared(job)
        model = self._models[job.setting.fixed]
        if job.setting.rdt is not None:
            paracompile.set_rdt(model.module, job.setting.rdt)
        while True:
            compiled = len(model.reports)
            picture, seconds = self._call(model, job)
            if len(model.reports) == compiled:
                return picture, self._figures(model, job.setting, seconds)

    def magnitudes(self, prompt: str, seed: int) -> list[float]:
        """For each step, how large what the blocks add is, relative to the step before; of the first pass."""
        job = Job(setting_of({"rdt": _ALWAYS}), prompt, seed)
        model = self._prepared(job)
        self._models[job.setting.fixed] = model
        return next(iter(paracompile.magnitude_ratios(model.module, lambda: self._call(model, job)).values()))

    def _prepared(self, job: Job) -> _Model:
        """Compiled for a setting, by a first call.

        raises:
            ParacompileError: the setting does not go with this transformer.
        """
        setting = job.setting
        model = _Model(self.transformer)
        if setting.compiled:
            options: dict[str, Any] = dict(setting.knobs) | {"compiler": self.compiler, "report": model.reports.append}
            compiled = torch.compile(self.transformer, backend="paracompile", fullgraph=True, options=options)
            model.module = cast(nn.Module, compiled)
        if setting.rdt is not None:
            paracompile.set_rdt(model.module, _ALWAYS)
        try:
            self._call(model, job)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, ParacompileError):
                raise ParacompileError(f"{setting.name}: {error.inner_exception}") from error
            raise
        if setting.rdt is not None and not (model.reports and all(report.blocks for report in model.reports)):
            name = type(self.transformer).__name__
            raise ParacompileError(f"{setting.name}: there are no blocks in {name} that the cache could skip")
        return model

    def _call(self, model: _Model, job: Job) -> tuple[Image.Image, float]:
        generator = torch.Generator("cpu").manual_seed(job.seed)  # the same noise on every device
        self.pipeline.transformer = model.module
        self._wait()
        start = time.perf_counter()
        # Dynamo counts the compiles of all settings together; each may need some for different lengths of prompts.
        limit = _COMPILES * (1 + len(self._models))
        with torch.compiler.config.patch(recompile_limit=limit):  # type: ignore[attr-defined]
            output = self.pipeline(prompt=job.prompt, generator=generator, output_type="pil", **self.arguments)
        self._wait()
        seconds = time.perf_counter() - start
        images = getattr(output, "images", None)
        if not isinstance(images, list) or len(images) != 1 or not isinstance(images[0], Image.Image):
            raise ParacompileError(f"a {type(self.pipeline).__name__} makes no single picture: it cannot be tuned")
        return images[0], seconds

    def _wait(self) -> None:
        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize()

    def _figures(self, model: _Model, setting: Setting, seconds: float) -> Figures:
        if setting.rdt is None:
            return Figures(seconds)
        stats, report = paracompile.cache_stats(model.module), model.reports[-1]
        return Figures(seconds, stats.steps, stats.hits, report.blocks, report.blocks_skipped)


def _check_folder(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        what = "has no model_index.json" if folder.is_dir() else "there is no such folder"
        raise ParacompileError(
            f"--pipe {folder}: {what}. Give a folder that a pipeline's save_pretrained wrote; a model of the Hub "
            "becomes one by `hf download NAME --local-dir FOLDER`"
        )
