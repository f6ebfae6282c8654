"""The README tells the results on real lungs, and documents name files that exist."""

import re

import pandas as pd
from support import ROOT

from chest.reporting.findings import findings


def test_readme_and_results_page_tell_what_the_tables_hold():
    folder = ROOT / "docs/results"
    found = findings({path.stem: pd.read_csv(path) for path in folder.glob("*.csv")})
    assert len(found) == 10
    told = "\n".join(f"- {line}" for line in found)
    for page in ("README.md", "docs/results.md"):
        assert told in (ROOT / page).read_text(encoding="utf-8"), (
            "run `tools/real.py DATA --report`"
        )


def test_links_between_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
