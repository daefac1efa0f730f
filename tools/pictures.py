"""Pictures of a run for the first page: its curve as SVG; its report as PNG, light and dark, desktop and phone.

python tools/pictures.py RUN FOLDER        `make pictures` trains the run first
"""

import base64
import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from megarl import report
from megarl.bench.common.browser import PHONE, chromium, opened
from megarl.errors import UserError
from megarl.run.directory import read_metrics

SCREENS = {"desktop": (1280, 796, 1.0), "phone": (PHONE, 640, 2.0)}  # width and height in CSS pixels, and their scale
FRAME = Path(__file__).with_name("curve.svg")


def curve(run: Path) -> str:
    """Held-out accuracy and response tokens by step, as SVG. Raises UserError with fewer than two evaluations."""
    lines = [line for line in read_metrics(run) if "eval/accuracy" in line]
    if len(lines) < 2:
        raise UserError(f"{run}: {len(lines)} evaluations; a curve needs two (evaluation.every=4)")
    right = [(line["step"], 100 * line["eval/accuracy"]) for line in lines]
    tokens = [(line["step"], line["eval/response_tokens"]) for line in lines]
    shares, most = [share for _, share in right], max(count for _, count in tokens)
    low, high = 10 * math.ceil(min(shares) / 10 - 1), 10 * math.ceil(max(shares) / 10)
    panels = _panel(20, "a", "accuracy", "%", right, low, high)
    panels += _panel(315, "b", "tokens", "", tokens, 0, 40 * math.ceil(most / 40))
    return FRAME.read_text().replace("<!-- panels -->", panels)


def _panel(left: int, color: str, name: str, unit: str, points: list[tuple[int, float]], low: int, high: int) -> str:
    def y(value: float) -> float:
        return round(222 - 155 * (value - low) / (high - low), 1)

    (first, old), (last, new) = points[0], points[-1]
    found = f'<text class="name" x="{left}" y="36">{name}: {old:.1f}{unit} → {new:.1f}{unit}</text>'
    for tick in (low, (low + high) / 2, high):
        found += f'\n<path class="grid" d="M{left + 50} {y(tick)}h210"/>'
        found += f'<text x="{left + 42}" y="{y(tick) + 6}" text-anchor="end">{tick:g}{unit}</text>'
    line = " ".join(f"{left + 50 + 210 * step / last:.1f},{y(value)}" for step, value in points)
    found += f'\n<polyline class="{color}" points="{line}"/>\n<text x="{left + 50}" y="246">step {first}</text>'
    return found + f'<text x="{left + 260}" y="246" text-anchor="end">{last}</text>'


def screenshots(page: Path, folder: Path) -> None:
    """The top of a report, as report_{desktop,phone}_{light,dark}.png."""
    with TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
        for screen, (width, height, scale) in SCREENS.items():
            for scheme in ("light", "dark"):
                opened(browser, page.resolve(), width, scheme)
                clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": scale}
                png = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip})["data"]
                (folder / f"report_{screen}_{scheme}.png").write_bytes(base64.b64decode(png))


if __name__ == "__main__":
    (Path(sys.argv[2]) / "quickstart.svg").write_text(curve(Path(sys.argv[1])))
    screenshots(report.write([Path(sys.argv[1])], None), Path(sys.argv[2]))
