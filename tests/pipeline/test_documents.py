"""The README tells the results on real lungs, and documents name files that exist."""

import re

from support import ROOT


def test_the_readme_tells_what_the_results_page_tells():
    readme, page = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md")
    )
    told = re.search(r"<!-- real: .*? -->\n(.*?)<!-- /real -->", readme, re.DOTALL)[1]
    assert told.count("\n") >= 8
    assert told in page, "run `python tools/real.py DATA --report`"


def test_links_between_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
