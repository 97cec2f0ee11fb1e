"""What is built holds what the tree holds, under one name each. No network: the builds use the installed setuptools."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = {"paracompile/passes": "../passes", "paracompile/patterns": "../patterns"}
UNTRACKED = shutil.ignore_patterns(".*", "build", "dist", "output", "__pycache__", "*.egg-info")


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def tracked_files() -> list[Path] | None:
    """What git tracks or would track (nothing that .gitignore hides); None without git or outside a repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return [Path(name) for name in listing.split("\0") if name and os.path.lexists(ROOT / name)]


def copy_tree(target: Path) -> Path:
    files = tracked_files()
    if files is None:
        return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=UNTRACKED))
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, target / file, follow_symlinks=False)
    return target


def modules_of_the_tree() -> set[str]:
    """Every source file of the package, through the symlinks, as a path below the root."""
    found = set()
    for folder, _, files in os.walk(ROOT / "paracompile", followlinks=True):
        found |= {(Path(folder) / file).relative_to(ROOT).as_posix() for file in files if file.endswith(".py")}
    return found


def names_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def modules_in_wheel(wheel: Path) -> set[str]:
    return {name for name in names_in_wheel(wheel) if name.endswith(".py")}


def build_wheel(source: Path, target: Path) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", target]
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=source)
    (wheel,) = target.glob("*.whl")
    return wheel


def build_sdist(source: Path, target: Path) -> Path:
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", program, target, cwd=source)
    (sdist,) = target.glob("*.tar.gz")
    return sdist


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = copy_tree(tmp_path_factory.mktemp("for_wheel") / "source")
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = copy_tree(tmp_path_factory.mktemp("for_sdist") / "source")
    return build_sdist(source, tmp_path_factory.mktemp("sdist"))


def test_symlinks_are_relative_and_tracked() -> None:
    files = tracked_files()
    for link, target in LINKS.items():
        assert os.readlink(ROOT / link) == target
        assert files is None or Path(link) in files


def test_wheel_holds_every_module_once(wheel: Path) -> None:
    modules = modules_in_wheel(wheel)
    assert modules == modules_of_the_tree()
    assert {"paracompile/passes/__init__.py", "paracompile/patterns/__init__.py"} <= modules
    top_level = {name.partition("/")[0] for name in names_in_wheel(wheel)}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"paracompile"}


def test_wheel_is_marked_as_typed_and_carries_the_licence(wheel: Path) -> None:
    names = names_in_wheel(wheel)
    assert "paracompile/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_from_sdist_is_the_same(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert names_in_wheel(build_wheel(source, tmp_path / "wheel")) == names_in_wheel(wheel)


def test_wheel_registers_the_backend(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(name).decode())
    assert dict(entry_points["torch_dynamo_backends"]) == {"paracompile": "paracompile.backend:paracompile"}


def test_installed_backend_loads() -> None:
    (entry_point,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="paracompile")
    assert callable(entry_point.load())


def imports_of(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def test_nothing_imports_passes_or_patterns_by_their_bare_names() -> None:
    folders = ("paracompile", "passes", "patterns", "examples", "tests")
    sources = [source for folder in folders for source in (ROOT / folder).rglob("*.py")]
    assert sources
    bare = [
        f"{source.relative_to(ROOT)}: {name}"
        for source in sources
        for name in imports_of(source)
        if name.partition(".")[0] in ("passes", "patterns")
    ]
    assert not bare


@pytest.mark.parametrize(
    "line",
    [
        "import passes",
        "import patterns.attention",
        "from passes import normalise",
        "from patterns.attention import find",
    ],
)
def test_lint_rule_rejects_bare_names(line: str) -> None:
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select=TID251", "--output-format=concise"]
    # The name says where the file would lie, for the configuration that ruff applies to it.
    checks = [*command, "--stdin-filename", ROOT / "paracompile" / "example.py", "-"]

    result = subprocess.run(checks, input=line + "\n", cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "TID251" in result.stdout
    assert "every class would exist twice" in result.stdout

    qualified = line.replace("passes", "paracompile.passes").replace("patterns", "paracompile.patterns")
    result = subprocess.run(checks, input=qualified + "\n", cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
