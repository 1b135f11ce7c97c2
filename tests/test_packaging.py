"""The project as pip sees it: it runs from its clone, and a wheel of it installs no package."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def test_a_wheel_holds_no_packages(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    clone, out = tmp_path / "clone", tmp_path / "out"
    for package in ROOT.glob("*/__init__.py"):  # a copy, since building leaves files behind
        shutil.copytree(package.parent, clone / package.parent.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "train.py"):
        shutil.copy(ROOT / name, clone)
    out.mkdir()
    built = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=clone, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = out.glob("*.whl")
    folders = {name.split("/")[0] for name in ZipFile(wheel).namelist()}
    assert len(folders) == 1 and folders.pop().endswith(".dist-info")
