"""The report's page: whole, escaped, sortable in a real browser, without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

import reprune
from helpers import SWEEP_SETS, copied_run, run_tiny
from reprune.reporting import cli
from reprune.reporting.drawing import Plot
from reprune.reporting.page import Section, write_page

EVIL = "<script>alert('$x$ & \"y\"')</script>"
BROWSER = next(filter(None, map(shutil.which, ("chrome-headless-shell", "chromium", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no headless browser on PATH")
NUMBERS = [10.0, 9.5, None, 100.0, -2.0, 1e-5]


def report(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """`reprune-report` with arguments."""
    monkeypatch.setattr("sys.argv", ["reprune-report", *map(str, arguments)])
    cli.main()


def test_page_holds_tables_plots_verdicts_and_what_is_not_finished(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a page that leaves runs out, calls the network, or has no verdicts where claims are given."""
    runs = tmp_path / "runs"
    shutil.copytree(sweep, runs)
    unfinished = sorted(runs.glob("*-br_gp-*"))[0]
    (unfinished / "result.json").unlink()
    claims = tmp_path / "claims.yaml"
    claims.write_text(
        "- {name: br_gp helps, metric: reconstruction/probe/held_out/last, side: below,\n"
        "   arm: {choice/reconstruction: br_gp}, against: {choice/reconstruction: none}}\n"
    )
    out = tmp_path / "out"
    report(monkeypatch, runs, "--out", out, "--claims", claims)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "br_gp helps" in page
    assert f"{2 * SWEEP_SETS - 1} finished, 1 not finished" in page
    assert unfinished.name in page
    assert page.count("<svg") == 9
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:)""", page.replace("xlink:href", "href"))
    assert "url(http" not in page
    printed = capsys.readouterr().out
    # The runs have one sparsity.
    assert re.findall(r"(\w+) \(", "".join(line for line in printed.splitlines() if "not drawn" in line)) == [
        "essential_sparsity"
    ]
    verdicts = pd.read_csv(out / "verdicts.csv")
    assert list(verdicts["claim"]) == ["br_gp helps"]
    summary = pd.read_csv(out / "summary.csv").set_index("arm")
    frame = reprune.results(runs)
    for arm, some in frame[frame["state"] == "finished"].groupby("choice/reconstruction"):
        metric = "eval/pruned/perplexity/mine"
        assert summary.loc[arm, metric] == pytest.approx(some[metric].mean())


def test_what_run_folders_say_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a label of a run that becomes a script, in a table, a plot or the line of what is unfinished."""
    plan, _ = run_tiny(tmp_path / "runs")

    def rename(result: dict[str, Any], config: dict[str, Any]) -> None:
        result["choices"]["reconstruction"] = EVIL
        config["reconstruction"]["epochs"] = 9
        result["metrics"][f"eval/pruned/perplexity/{EVIL.replace('/', '')}"] = 3.0

    copied_run(plan.folder.path, 1, rename)
    ends = copied_run(plan.folder.path, 2, lambda result, config: None)
    (ends / "result.json").unlink()
    (ends / "status.json").write_text(f'{{"state": "failed", "error": "{EVIL[:16]}"}}')
    report(monkeypatch, tmp_path / "runs", "--out", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(" in page
    assert page.count("<script>") == 1


def made_page(folder: Path) -> Path:
    """A small page whose first table has numbers, words, and a missing cell."""
    table = pd.DataFrame({"name": ["b", "a", EVIL, "d", "c", "e"], "value": NUMBERS})
    plots = [Plot("pareto", "a caption", None, "needs two arms")]
    write_page(folder / "page.html", "title", "about", [Section("one", "One", "caption", table)], plots)
    return folder / "page.html"


def dom_of(page: Path, folder: Path) -> str:
    """The page as the browser ends up with."""
    return browse(page, folder, "--dump-dom")


def browse(page: Path, folder: Path, *what: str) -> str:
    """Open the page in a headless browser, whose own calls home end at a closed port; what it prints."""
    assert BROWSER is not None
    told = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         "--disable-component-update", "--disable-sync", "--disable-default-apps", f"--user-data-dir={folder}/profile",
         "--proxy-server=127.0.0.1:9", "--proxy-bypass-list=<-loopback>", "--virtual-time-budget=3000", *what,
         page.as_uri()],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    return told.stdout


def column(dom: str, number: int) -> list[str]:
    """The cells of a column of the page's first table."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", dom[dom.index("<tbody>") : dom.index("</tbody>")], re.S)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)[number] for row in rows]


def clicked(page: Path, *columns: int) -> Path:
    """A copy of the page that clicks on the heads of columns, one after the other, as a person would."""
    clicks = "".join(f"document.querySelectorAll('thead th')[{number}].click();" for number in columns)
    copy = page.with_stem(f"clicked{'_'.join(map(str, columns))}")
    copy.write_text(page.read_text().replace("</body>", f"<script>{clicks}</script></body>"))
    return copy


@needs_browser
def test_a_click_sorts_numbers_as_numbers(tmp_path: Path) -> None:
    """Catches '100' before '9.5', a missing value among the numbers, and a second click that does nothing."""
    page = made_page(tmp_path)
    rising = ["-2", "1e-05", "9.5", "10", "100", "–"]
    dom = dom_of(clicked(page, 1), tmp_path)
    assert column(dom, 1) == rising
    assert 'aria-sort="ascending"' in dom
    falling = dom_of(clicked(page, 1, 1), tmp_path)
    assert column(falling, 1) == [*rising[-2::-1], "–"]
    words = column(dom_of(clicked(page, 0), tmp_path), 0)
    assert words[-5:] == ["a", "b", "c", "d", "e"]
    assert words[0].startswith("&lt;script&gt;")


@needs_browser
def test_no_request_leaves_the_page(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a font, script or picture from elsewhere; a page with one shows that it would be seen."""
    ask = "document.title = 'asked ' + performance.getEntriesByType('resource').map(it => it.name).join(' ')"
    script = f"<script>addEventListener('load', () => {{ {ask} }})</script>"
    report(monkeypatch, sweep, "--out", tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    page.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    dom = dom_of(page, tmp_path)
    assert dom.count("<svg") == 8
    assert "<button>" in dom
    assert "<title>asked </title>" in dom
    leak = tmp_path / "leak.html"
    leak.write_text(f"<title></title><img src='http://example.org/pixel.png'>{script}")
    assert "<title>asked http://example.org/pixel.png</title>" in dom_of(leak, tmp_path)


@needs_browser
def test_page_is_light_and_dark(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page that is white at night, and plots whose axes are ink on ink."""
    report(monkeypatch, sweep, "--out", tmp_path)
    for dark in (False, True):
        picture = tmp_path / f"{'dark' if dark else 'light'}.png"
        browse(
            tmp_path / "report.html", tmp_path, f"--blink-settings=preferredColorScheme={int(not dark)}",
            f"--screenshot={picture}", "--window-size=1000,3000",
        )  # fmt: skip
        pixels = imread(picture)[..., :3].mean(axis=-1)
        ground = np.median(pixels)
        assert ground < 0.2 if dark else ground > 0.9
        # Text, axes and curves: enough of the page stands off from its ground, plots in the lower half included.
        for half in np.array_split(pixels, 2):
            assert (abs(half - ground) > 0.5).mean() > 0.005
