"""`python -m paracompile tune` on a very small FLUX pipeline: what it runs, what it measures, what it leaves behind."""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from random_tensors import randomise

import paracompile
from paracompile.__main__ import main
from paracompile.errors import OptionError, ParacompileError
from paracompile.tune.command import add_parser
from paracompile.tune.metrics import PSNR_LIMIT, load_judge, quality
from paracompile.tune.results import Figures, Job, Results
from paracompile.tune.settings import NO_CACHE, PLAIN, by_compile, knob_text, knob_value, plan_of, setting_of, sweep
from paracompile.tune.table import Limits, Row, advice, recommended, rows_of

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[1]
SIZE, STEPS, BLOCKS = 64, 3, 3
NEVER, ALWAYS = 1e-6, 1000.0
"""Thresholds: at the first no step is skipped, at the second all but the first of a picture are."""
PROMPTS = ["a large red circle", "a small green square"]
CALL = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "max_sequence_length": 16}
VARIANTS = ["plain", "no cache", *(f"rdt {rdt}{more}" for more in ("", ", taylor-order 1") for rdt in (NEVER, ALWAYS))]

JUDGE = """
from brightness import mean  # lies beside it

def score(image, prompt):
    return mean(image) / 255 if prompt.startswith("a large") else 1.0
"""
BRIGHTNESS = """
import numpy as np

def mean(image):
    return float(np.asarray(image).mean())
"""


@dataclass(frozen=True)
class Given:
    """Files for the command."""

    pipe: Path
    prompts: Path
    judge: Path

    def arguments(self, output: Path, *more: str) -> list[str]:
        size = ["--steps", str(STEPS), "--height", str(SIZE), "--width", str(SIZE), "--max-sequence-length", "16"]
        how = ["--compiler", "eager", "--device", "cpu", "--output", str(output)]
        return ["tune", "--pipe", str(self.pipe), "--prompts", str(self.prompts), *size, *how, *more]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("given")
    pipeline = FluxPipeline.from_pretrained(ROOT / "examples" / "tiny_flux")
    config = dict(pipeline.transformer.config, num_layers=0, num_single_layers=BLOCKS)
    pipeline.transformer = randomise(FluxTransformer2DModel.from_config(config))
    pipeline.save_pretrained(folder / "pipe")
    (folder / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n  {PROMPTS[1]}  \n{PROMPTS[0]}\n")
    (folder / "judge.py").write_text(JUDGE)
    (folder / "brightness.py").write_text(BRIGHTNESS)
    return Given(folder / "pipe", folder / "prompts.txt", folder / "judge.py")


@dataclass(frozen=True)
class Swept:
    """A finished sweep over thresholds and TaylorSeer's order."""

    arguments: list[str]
    output: Path
    said: str
    calls: int

    def table(self) -> dict[str, dict[str, str]]:
        with (self.output / "table.csv").open(newline="") as file:
            return {row["setting"]: row for row in csv.DictReader(file)}


class Calls:
    """Counts calls of pipelines; `before` is told the number of each, from 1."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.before: Callable[[int], object] = lambda count: None
        original = FluxPipeline.__call__

        def call(pipeline: FluxPipeline, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            self.before(self.count)
            return original(pipeline, *args, **kwargs)

        call.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        patch.setattr(FluxPipeline, "__call__", call)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture(scope="module")
def swept(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    output = tmp_path_factory.mktemp("swept") / "made" / "when needed"
    arguments = given.arguments(output, "--rdt", f"{NEVER},{ALWAYS}", "--taylor-order", "0,1", "--judge")
    arguments += [str(given.judge), "--min-psnr", "0"]
    with pytest.MonkeyPatch.context() as patch:
        calls, said = Calls(patch), []
        patch.setattr("builtins.print", lambda *words, **_: said.extend(words))
        assert main(arguments) == 0
    return Swept(arguments, output, "\n".join(said), calls.count)


@pytest.fixture(scope="module", autouse=True)
def _one_pipeline_for_all() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def pictures(output: Path, variant: str) -> dict[str, np.ndarray[Any, Any]]:
    folder = output / "pictures" / variant.replace(", ", "-").replace(" ", "_")
    return {path.stem: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 1
    return capsys.readouterr().err


# Settings


def test_sweep_is_the_product_with_the_thresholds_innermost() -> None:
    settings = sweep({"rdt": [0.08, 0.12, 0.080], "first_blocks": [1, 2], "taylor_order": [0, 1]})
    names = [setting.name for setting in settings]
    assert names[:4] == ["rdt 0.08", "rdt 0.12", "rdt 0.08, taylor-order 1", "rdt 0.12, taylor-order 1"]
    assert len(names) == 8 == len({setting.folder for setting in settings})
    assert dict(settings[-1].knobs) == {"rdt": 0.12, "taylor_order": 1, "first_blocks": 2}
    assert len({setting.fixed for setting in settings}) == 4


def test_settings_that_share_a_compile_come_together() -> None:
    first, other, again = (setting_of(each) for each in ({"rdt": 0.1}, {"rdt": 0.1, "last_blocks": 1}, {"rdt": 0.2}))
    assert by_compile([first, other, again]) == [first, again, other]


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("rdt", "0.1", 0.1),
        ("max_consecutive_hits", "none", None),
        ("taylor_order", "2", 2),
        ("steps", "1?0", "1?0"),
        ("watch", "modulation", "modulation"),
        ("coefficients", "498:-283.5:0.25", (498.0, -283.5, 0.25)),
    ],
)
def test_a_value_is_read_as_it_is_written(name: str, text: str, value: Any) -> None:
    assert knob_value(name, text) == value
    assert knob_text(value).lower() == text


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["tune", "--pipe", "pipe", "--prompts", "prompts.txt", *arguments])


def test_a_plan_of_steps_has_a_flag_of_its_own() -> None:
    """`--steps` is how many the pipeline makes."""
    setting = setting_of({"rdt": 0.1, "steps": "10", "watch": "modulation", "coefficients": (1.0, 0.0)})
    assert setting.name == "rdt 0.1, step-plan 10, watch modulation, coefficients 1:0"
    options = parse("--rdt", "0.1", "--step-plan", "10,1?0", "--coefficients", "1:0,2:1:0", "--steps", "28")
    assert (options.steps, options.num_inference_steps) == (["10", "1?0"], 28)
    assert options.coefficients == [(1.0, 0.0), (2.0, 1.0, 0.0)]
    (added,) = parse("--setting", "rdt=0.1,step-plan=10,watch=modulation").setting
    assert added == {"rdt": 0.1, "steps": "10", "watch": "modulation"}


@pytest.mark.parametrize("name, text", [("coefficients", "1,0"), ("coefficients", ""), ("taylor_order", "1:0")])
def test_what_is_no_value(name: str, text: str) -> None:
    with pytest.raises(ParacompileError, match="is not"):
        knob_value(name, text)


def test_default_values_make_no_other_setting() -> None:
    defaults = {"warmup_steps": 0, "max_consecutive_hits": None, "downsample_factor": 1, "last_blocks": 0}
    assert setting_of({"rdt": 0.1, **defaults}) == setting_of({"rdt": 0.1})


@pytest.mark.parametrize(
    "values, word",
    [({"rdt": 0.0}, "above 0"), ({"rdt": math.inf}, "finite"), ({"rdt": 0.1, "taylor_order": 3}, "from 0 to 2")],
)
def test_values_that_cannot_work(values: dict[str, Any], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        setting_of(values)


# Metrics


def flat(*levels: int) -> Image.Image:
    """16 x 16, a column for each level, or all of one level."""
    row = np.repeat(np.array(levels, dtype=np.uint8), 16 // len(levels))
    return Image.fromarray(np.broadcast_to(row[None, :, None], (16, 16, 3)).copy())


def test_psnr_and_ssim_of_two_grey_levels() -> None:
    measured = quality(flat(110), flat(100), "")
    assert measured.psnr == pytest.approx(10 * math.log10(255**2 / 10**2))
    constant = (0.01 * 255) ** 2
    assert measured.ssim == pytest.approx((2 * 100 * 110 + constant) / (100**2 + 110**2 + constant), abs=1e-6)
    assert measured.score is None


def test_psnr_counts_all_pixels() -> None:
    measured = quality(flat(0, 50, 0, 0), flat(0, 0, 0, 0), "")
    assert measured.psnr == pytest.approx(10 * math.log10(255**2 / (50**2 / 4)))
    assert 0 < measured.ssim < 1


def test_equal_pictures() -> None:
    picture = flat(0, 80, 160, 255)
    measured = quality(picture, picture.copy(), "a prompt", lambda image, prompt: len(prompt) / 16)
    assert (measured.psnr, measured.ssim, measured.score) == (PSNR_LIMIT, 1.0, 0.5)


@pytest.mark.parametrize("score", [1.5, -0.1, float("nan"), "good", None])
def test_scores_that_are_none(score: Any) -> None:
    with pytest.raises(ParacompileError, match="from 0 to 1"):
        quality(flat(1), flat(1), "a prompt", lambda image, prompt: score)


def test_a_judge_that_fails_is_named_with_its_prompt() -> None:
    with pytest.raises(ParacompileError, match="the judge fails for 'a prompt': ZeroDivisionError: division by zero"):
        quality(flat(1), flat(1), "a prompt", lambda image, prompt: 1 / 0)


def test_judges_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ParacompileError, match="no such file"):
        load_judge(tmp_path / "judge.py")
    (tmp_path / "judge.py").write_text("score = 3")
    with pytest.raises(ParacompileError, match=r"no function score\(image"):
        load_judge(tmp_path / "judge.py")


# Rows and the recommendation


def row(rdt: float, time_ratio: float, psnr: float, score: float | None = None, computed: float = 0.5) -> Row:
    return Row(setting_of({"rdt": rdt}), computed, time_ratio, time_ratio, psnr, psnr - 1, 0.9, 0.8, score)


def test_rows_are_over_all_pictures() -> None:
    setting = setting_of({"rdt": 0.1})
    figures = {
        NO_CACHE: [Figures(2.0), Figures(4.0), Figures(10.0)],
        # A third of the blocks of a hit is computed: 1 - 2/4 * 2/3, 1 - 1/4 * 2/3, 1
        setting: [Figures(1.0, 4, 2, 3, 2), Figures(3.0, 4, 1, 3, 2), Figures(10.0, 4, 0, 3, 2)],
    }
    qualities = [quality(flat(100 + off), flat(100), "", lambda *_: 0.5) for off in (1, 10, 0)]
    without, cached = rows_of(figures, {NO_CACHE: qualities, setting: qualities})
    assert (without.computed, without.seconds, without.time_ratio) == (1.0, 4.0, 1.0)
    assert cached.computed == pytest.approx((2 / 3 + 5 / 6 + 1) / 3)
    assert (cached.seconds, cached.time_ratio) == (3.0, 0.75)  # the median of 1/2, 3/4, 1
    assert cached.psnr == pytest.approx((48.1308 + 28.1308 + PSNR_LIMIT) / 3, abs=1e-4)
    assert cached.psnr_worst == pytest.approx(28.1308, abs=1e-4)
    assert (cached.ssim_worst, cached.score) == (min(each.ssim for each in qualities), 0.5)


def test_recommended_is_the_fastest_that_is_good_enough() -> None:
    rows = [row(0.05, 0.9, 40, 0.9), row(0.1, 0.6, 30, 0.9), row(0.2, 0.4, 20, 0.7)]
    for limits, rdt in (
        (Limits(psnr=25), 0.1),
        (Limits(psnr=30), 0.1),
        (Limits(psnr=30.1), 0.05),
        (Limits(score=0.7), 0.2),
        (Limits(psnr=10, score=0.8), 0.1),
    ):
        chosen = recommended(rows, limits)
        assert chosen is not None
        assert chosen.setting.rdt == rdt
    said = advice(rows, Limits(psnr=25))
    assert "Recommended: rdt 0.1" in said
    assert "1.67 times" in said
    assert "options={'rdt': 0.1}" in said


def test_no_recommendation() -> None:
    without = Row(NO_CACHE, 1, 0.1, 1, 60, 60, 1, 1, 0.95)
    rows = [without, row(0.05, 1.1, 40, 0.9), row(0.2, 0.4, 20, 0.7)]
    assert recommended(rows, Limits(psnr=30)) is None
    assert "faster than no cache" in advice(rows, Limits(psnr=30))
    assert "closest to the plain pictures is rdt 0.05 with 40.00 dB and score 0.900" in advice(rows, Limits(psnr=50))
    for beyond in (Limits(psnr=61), Limits(psnr=50, score=0.96)):
        assert "not even the pictures without a cache" in advice(rows, beyond)
        assert "60.00 dB and score 0.950" in advice(rows, beyond)
    assert recommended([row(0.01, 0.9, 80, computed=1.0)], Limits(psnr=30)) is None  # faster by chance
    plain = Row(PLAIN, 1, 0.1, 0.1, PSNR_LIMIT, PSNR_LIMIT, 1, 1)
    assert recommended([plain], Limits(psnr=1)) is None


# Results


def test_half_a_picture_does_not_count(tmp_path: Path) -> None:
    results, job = Results(tmp_path, {}), Job(PLAIN, "a prompt / with a slash", 0)
    results.save(job, flat(7), Figures(1.5))
    assert results.done(job) == Figures(1.5)
    assert results.picture(job).getpixel((3, 3)) == (7, 7, 7)
    (figures,) = tmp_path.rglob("plain/*.json")
    figures.rename(f"{figures}.part")
    assert results.done(job) is None
    Path(f"{figures}.part").rename(figures)
    (picture,) = tmp_path.rglob("plain/*.png")
    picture.unlink()
    assert results.done(job) is None


def test_writing_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, job = Results(tmp_path, {}), Job(PLAIN, "a prompt", 0)

    def save(self: Image.Image, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        with pytest.raises(KeyboardInterrupt):
            results.save(job, flat(7), Figures(1.5))
    assert results.done(job) is None
    assert not list(tmp_path.rglob("*.png"))
    results.save(job, flat(7), Figures(1.5))
    assert results.done(job) == Figures(1.5)


def test_prompts_and_seeds_have_pictures_of_their_own() -> None:
    prompts = ["a", "A", "a!", "b" * 200, "b" * 201, "圆"]
    names = {Job(PLAIN, prompt, seed).picture for prompt in prompts for seed in (0, 1)}
    assert len(names) == 12
    assert all(name.isascii() and len(name) < 64 and "/" not in name for name in names)


# The command


def test_every_picture_is_made_once_and_warmed_up_once_a_compile(swept: Swept) -> None:
    assert swept.calls == len(PROMPTS) * len(VARIANTS) + 4  # plain, no cache, and the two orders
    assert all(len(pictures(swept.output, variant)) == len(PROMPTS) for variant in VARIANTS)


@pytest.mark.slow
def test_pictures_are_those_of_the_pipeline(given: Given, swept: Swept) -> None:
    pipeline = FluxPipeline.from_pretrained(given.pipe)
    pipeline.set_progress_bar_config(disable=True)

    def picture() -> np.ndarray[Any, Any]:
        image = pipeline(PROMPTS[1], generator=torch.Generator().manual_seed(0), **CALL).images[0]
        return np.asarray(image)

    name = Job(PLAIN, PROMPTS[1], 0).picture
    assert np.array_equal(picture(), pictures(swept.output, "plain")[name])
    options = {"compiler": "eager", "rdt": ALWAYS}
    pipeline.transformer = torch.compile(pipeline.transformer, backend="paracompile", options=options)
    cached = picture()
    assert np.array_equal(cached, pictures(swept.output, f"rdt {ALWAYS}")[name])
    assert not np.array_equal(cached, pictures(swept.output, "plain")[name])
    assert paracompile.cache_stats(pipeline.transformer).hits == STEPS - 1


def test_table(swept: Swept) -> None:
    table = swept.table()
    assert list(table) == VARIANTS
    assert [(each["rdt"], each["taylor_order"]) for each in table.values()][-1] == (str(ALWAYS), "1")
    every_hit = 1 - (STEPS - 1) * (BLOCKS - 1) / (STEPS * BLOCKS)
    for name, figures in table.items():
        computed = every_hit if str(ALWAYS) in name else 1.0
        assert float(figures["blocks_computed"]) == pytest.approx(computed)
        assert float(figures["seconds"]) > 0
    assert float(table["no cache"]["time_ratio"]) == 1.0
    assert float(table["plain"]["psnr_mean"]) == PSNR_LIMIT
    assert float(table[f"rdt {NEVER}"]["psnr_mean"]) > 60 > float(table[f"rdt {ALWAYS}"]["psnr_mean"])


def test_table_agrees_with_the_pictures(swept: Swept) -> None:
    from skimage.metrics import peak_signal_noise_ratio

    plain, cached = (pictures(swept.output, variant) for variant in ("plain", f"rdt {ALWAYS}"))
    psnrs = [peak_signal_noise_ratio(plain[name], cached[name]) for name in plain]
    figures = swept.table()[f"rdt {ALWAYS}"]
    assert float(figures["psnr_mean"]) == pytest.approx(sum(psnrs) / 2)
    assert float(figures["psnr_worst"]) == pytest.approx(min(psnrs))
    large = cached[Job(PLAIN, PROMPTS[0], 0).picture]
    assert float(figures["score_mean"]) == pytest.approx((large.mean() / 255 + 1) / 2)


def test_what_is_said(swept: Swept) -> None:
    heads, rule, *lines = swept.said.splitlines()
    assert heads.split()[:3] == ["setting", "blocks", "computed"]
    assert heads.endswith("score")
    assert set(rule) == {"-"}
    for variant, line in zip(VARIANTS, lines, strict=False):
        assert line.startswith(variant)
        assert len(line) == len(heads)
    for name in ("table.csv", "plot.png", "grid.png"):
        assert str(swept.output / name) in swept.said


def test_plot(swept: Swept) -> None:
    with Image.open(swept.output / "plot.png") as image:
        assert image.width > 3 * 600  # a panel each for PSNR, SSIM and score
        assert image.height > 500
        colours = {colour for _, colour in image.convert("RGB").getcolors(image.width * image.height) or []}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line for each order


def test_plot_names_its_points(
    swept: Swept, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.figure import Figure

    texts: list[str] = []

    def savefig(figure: Figure, path: Path, **_: Any) -> None:
        texts.extend(text.get_text() for axes in figure.axes for text in axes.texts)
        texts.extend(text.get_text() for text in figure.legends[0].get_texts())

    monkeypatch.setattr(Figure, "savefig", savefig)
    assert main(swept.arguments) == 0
    assert texts.count(f"rdt {ALWAYS}") == 6  # three panels, two lines
    assert texts.count("no cache") == 2
    assert "no cache (equal)" in texts
    assert {"rdt alone (mean)", "taylor-order 1 (mean)", "worst picture", "limit"} <= set(texts)


def test_grid_shows_the_pictures(swept: Swept) -> None:
    sheet = np.asarray(Image.open(swept.output / "grid.png").convert("RGB"))
    side = 256
    places = []
    for variant in VARIANTS:
        for shown in pictures(swept.output, variant).values():
            large = shown.repeat(side // SIZE, axis=0).repeat(side // SIZE, axis=1)
            rows, columns = np.nonzero((sheet[: -side + 1, : -side + 1] == large[0, 0]).all(axis=-1))
            found = [
                (y, x)
                for y, x in zip(rows, columns, strict=True)
                if np.array_equal(sheet[y : y + side, x : x + side], large)
            ]
            assert found, f"{variant} is not in the grid"
            places += found
    assert len({y for y, _ in places}) == len(PROMPTS)
    assert len({x for _, x in places}) == len(VARIANTS)


def test_grid_keeps_to_its_rows(swept: Swept, tmp_path: Path) -> None:
    output = shutil.copytree(swept.output, tmp_path / "copy")
    assert main([*swept.arguments, "--output", str(output), "--grid-rows", "1"]) == 0
    before, after = (Image.open(folder / "grid.png").size for folder in (swept.output, output))
    assert after[0] == before[0]
    assert before[1] - after[1] > 256


def test_a_second_start_runs_nothing(swept: Swept, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    before = swept.table()
    monkeypatch.setattr(FluxPipeline, "from_pretrained", None)
    assert main(swept.arguments) == 0
    assert calls.count == 0
    assert swept.table() == before


def test_an_interrupt_is_no_error(
    given: Given, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    calls.before = interrupt
    assert main(given.arguments(tmp_path, "--rdt", "0.1")) == 130
    assert "goes on" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_more_seeds(
    given: Given, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = given.arguments(tmp_path, "--rdt", str(NEVER), "--last-blocks", "1")
    arguments += ["--setting", f"last-blocks=1,rdt={ALWAYS}", "--call", "guidance_scale=2.0"]

    def interrupt(count: int) -> None:
        if count == 7:  # three calls to warm up and three pictures are done: plain, no cache and one setting
            raise KeyboardInterrupt

    calls.before = interrupt
    assert main(arguments) == 130
    assert "goes on" in capsys.readouterr().err
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("pictures/**/*.*")}
    assert len(finished) == 2 * 3
    assert not (tmp_path / "table.csv").exists()

    calls.before, calls.count = lambda count: None, 0
    assert main([*arguments, "--seeds", "0,5"]) == 0
    assert calls.count == 4 * len(PROMPTS) * 2 - 3 + 3  # the other pictures, and the calls to warm up
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    with (tmp_path / "table.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert (last["rdt"], last["last_blocks"]) == (str(ALWAYS), "1")
    assert float(last["blocks_computed"]) == pytest.approx(1 - 2 / 3 * 1 / 3)  # one of three blocks is ever skipped
    assert len(pictures(tmp_path, last["setting"])) == 2 * len(PROMPTS)
    assert json.loads((tmp_path / "run.json").read_text())["call"] == {**CALL, "guidance_scale": 2.0}


def test_plans_by_magnitude(given: Given, calls: Calls, tmp_path: Path) -> None:
    """Their table is measured once; each rule is a setting that skips as its plan says."""
    arguments = given.arguments(tmp_path / "out", "--magnitude", "0:1,1e9:9:0.5")
    assert main(arguments) == 0
    ratios = json.loads((tmp_path / "out" / "magnitudes.json").read_text())
    assert len(ratios) == STEPS
    assert ratios[0] == 1
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        table = {row["setting"]: row for row in csv.DictReader(file)}
    plans = [("0:1", (0, 1)), ("1e+09:9:0.5", (1e9, 9, 0.5))]
    expected = {name: plan_of(ratios, rule) for name, rule in plans}
    assert list(table) == ["plain", "no cache", *(f"magnitude {name} ({plan})" for name, plan in expected.items())]
    for name, plan in expected.items():
        row = table[f"magnitude {name} ({plan})"]
        assert row["steps"] == plan
        computed = 1 - plan.count("0") * (BLOCKS - 1) / (STEPS * BLOCKS)
        assert float(row["blocks_computed"]) == pytest.approx(computed)
    assert len(set(expected.values())) == 2
    made = calls.count
    assert main(arguments) == 0
    assert calls.count == made


@pytest.mark.slow
def test_a_call_that_compiled_is_not_timed(given: Given, calls: Calls, tmp_path: Path) -> None:
    def forget(count: int) -> None:
        if count == 6:  # the picture of the one setting
            torch._dynamo.reset()

    calls.before = forget
    one = tmp_path / "one.txt"
    one.write_text("a circle")
    arguments = given.arguments(tmp_path / "out", "--rdt", str(ALWAYS))
    arguments[arguments.index("--prompts") + 1] = str(one)
    assert main(arguments) == 0
    assert calls.count == 3 * 2 + 1
    (figures,) = (tmp_path / "out").glob(f"pictures/rdt_{ALWAYS}/*.json")
    seen = json.loads(figures.read_text())["figures"]
    assert seen["hits"] == STEPS - 1
    assert seen["seconds"] < 1  # compiling takes longer


# Errors


@pytest.mark.parametrize(
    "more, words",
    [
        (["--pipe", "nowhere"], ["--pipe nowhere: there is no such folder", "save_pretrained"]),
        (["--pipe", "."], ["has no model_index.json"]),
        (["--prompts", "nowhere.txt"], ["--prompts nowhere.txt: there is no such file"]),
        (["--prompts", "empty.txt"], ["there is no prompt in it"]),
        (["--prompts", "picture.png"], ["cannot be read as UTF-8 text"]),
        (["--prompts", "."], ["cannot be read"]),
        (["--rdt", "0,0.1"], ["'rdt' = 0.0", "above 0"]),
        (["--taylor-order", "3"], ["'taylor_order' = 3", "from 0 to 2"]),
        (["--min-score", "0.9"], ["give --judge FILE"]),
        (["--judge", "nowhere.py"], ["--judge nowhere.py: there is no such file"]),
        (["--call", "steps=3"], ["FluxPipeline takes no argument 'steps'", "num_inference_steps"]),
        (["--call", "prompt=x"], ["tune sets this argument itself"]),
        (["--call", "height=32"], ["--call height: this argument was given already"]),
        (["--output", "empty.txt"], ["cannot make the output folder empty.txt"]),
        pytest.param(
            ["--device", "cuda"],
            ["torch finds no CUDA device"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_errors(
    given: Given,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n  \n")
    flat(200).save("picture.png")
    said = error_of([*given.arguments(Path("out"), "--rdt", "0.1"), *more], capsys)
    assert said.splitlines()[-1].startswith("error: ")
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    "more, words",
    [
        (["--rdt", "0.04,x"], "argument --rdt: 'x' is not a number"),
        (["--rdt", "0.04,"], "argument --rdt: '' is not a number"),
        (["--first-blocks", "1.5"], "argument --first-blocks: '1.5' is not a whole number"),
        (["--steps", "0"], "argument --steps: '0' is not a whole number of at least 1"),
        (["--seeds", "0,-1"], "argument --seeds: '-1' is not a whole number of at least 0"),
        (["--min-psnr", "nan"], "argument --min-psnr: 'nan' is not a finite number"),
        (["--setting", "rdt=0.1,order=1"], "'order=1' is not of the form KNOB=VALUE"),
        (["--setting", "rdt=0.1,rdt=0.2"], "rdt is there twice"),
        (["--call", "guidance"], "'guidance' is not of the form NAME=VALUE"),
        (["--compiler", "tensorrt"], "invalid choice: 'tensorrt'"),
        (["--magnitude", "0.1"], "'0.1' is not of the form LIMIT:MOST"),
        (["--magnitude=-1:2"], "give a finite number of at least 0"),
    ],
)
def test_bad_values(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*given.arguments(tmp_path), *more])
    assert words in capsys.readouterr().err


def test_nothing_to_sweep(given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing to run" in error_of(given.arguments(tmp_path), capsys)
    assert "thresholds are missing" in error_of(given.arguments(tmp_path, "--taylor-order", "1"), capsys)


def test_a_setting_that_leaves_nothing_to_skip(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = given.arguments(tmp_path, "--rdt", "0.1", "--first-blocks", str(BLOCKS))
    said = error_of(arguments, capsys)
    assert f"error: rdt 0.1, first-blocks {BLOCKS}: paracompile option 'first_blocks' = {BLOCKS}" in said
    assert "none is left to skip" in said


def test_a_transformer_without_repeated_blocks(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = FluxPipeline.from_pretrained(given.pipe)
    config = dict(pipeline.transformer.config, num_layers=0, num_single_layers=0)
    pipeline.transformer = FluxTransformer2DModel.from_config(config)
    pipeline.save_pretrained(tmp_path / "pipe")
    other = replace(given, pipe=tmp_path / "pipe")
    with pytest.warns(UserWarning, match="no repeated blocks"):
        said = error_of(other.arguments(tmp_path / "out", "--rdt", "0.1"), capsys)
    assert "error: rdt 0.1: there are no blocks in FluxTransformer2DModel that the cache could skip" in said


def test_another_run_does_not_go_into_the_same_folder(swept: Swept, capsys: pytest.CaptureFixture[str]) -> None:
    said = error_of([*swept.arguments, "--steps", "4"], capsys)
    assert "another run" in said
    assert "'num_inference_steps': 4" in said


def test_weights_that_changed_are_another_run(
    given: Given, swept: Swept, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = next((given.pipe / "transformer").glob("*.safetensors"))
    whole = weights.read_bytes()
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    weights.write_bytes(whole + b" ")
    try:
        assert "pipe_state" in error_of(swept.arguments, capsys)
    finally:
        weights.write_bytes(whole)
        os.utime(weights, ns=times)
    (given.pipe / "README.md").write_text("not read by the pipeline")
    assert main(swept.arguments) == 0


def test_several_processes_are_refused(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in error_of(given.arguments(tmp_path, "--rdt", "0.1"), capsys)


@pytest.mark.parametrize("name", ["skimage", "matplotlib", "tqdm", "diffusers"])
def test_a_missing_extra_is_named(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    said = error_of(given.arguments(tmp_path, "--rdt", "0.1"), capsys)
    assert f"{name} is missing: pip install 'paracompile[tune]'" in said


@pytest.mark.slow
def test_help_needs_no_extra() -> None:
    program = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(['skimage', 'matplotlib', 'PIL', 'diffusers', 'tqdm'])); "
        "sys.argv[1:] = ['tune', '--help']; runpy.run_module('paracompile', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    said = " ".join(result.stdout.split())
    for word in ("--rdt", "--taylor-order", "--last-blocks", "--judge", "compiled is compared with compiled"):
        assert word in said
    assert "threshold (with colons between them; 1:0: as they are)" in said
    assert '"auto"' not in said
