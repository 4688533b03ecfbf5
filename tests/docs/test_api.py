"""docs/api.md says what the docstrings say; the pages' links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reference_is_that_of_the_code():
    done = subprocess.run([sys.executable, ROOT / "scripts/make_api.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run: python scripts/make_api.py"


def test_links_lead_to_files():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
