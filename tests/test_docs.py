"""The documentation builds without a warning and without network."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
INTERNAL = {"BlockProgressBar", "PrunableModule"}
"""A bar that a pruning run makes, and a base class."""


def test_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    settings = (tmp_path / "site" / "settings" / "index.html").read_text(encoding="utf-8")
    for name in ("num_calibration", "update_rule", "lambda1", "spread", "class_token_weight", "diffusion_steps", "on_corrupt"):
        assert f"<code>{name}</code>" in settings, f"{name} is not in the generated settings"
    assert (tmp_path / "site" / "results" / "attention_map.png").is_file()


def test_every_class_that_a_config_can_name_has_its_settings():
    """What the three packages export is in docs/settings.md."""
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    exported = set()
    for package in ("callbacks", "lightning_modules", "datamodules"):
        exported |= set(re.findall(r'"([A-Z]\w+)": "', (ROOT / package / "__init__.py").read_text(encoding="utf-8")))
    assert len(exported) > 25
    missing = [name for name in sorted(exported - INTERNAL) if f".{name}\n" not in page]
    assert not missing, f"add a ::: line for {', '.join(missing)} to docs/settings.md"
