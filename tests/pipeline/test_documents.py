"""The README shows the committed results, and names files that exist."""

import re
import subprocess

import pytest
from support import ROOT, load_script


def committed(path: str) -> str:
    done = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{path} is not committed")
    return done.stdout


def test_the_readme_shows_the_committed_results():
    readme = committed("README.md")
    filled = load_script("tools/readme.py").fill(readme, committed("metrics/model_card.md"))
    assert filled == readme, "run `make readme` and commit"


def test_links_between_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
