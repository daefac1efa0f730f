"""A headless Chromium, and the time a page takes in it; for the report's benchmark and tests. Downloads nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.errors import RunError, UserError

PHONE, DESKTOP = 375, 1440  # CSS pixels
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """Chromium with its console and network logs; raises UserError if it is not installed."""
    try:
        from selenium import webdriver
    except ImportError:
        raise UserError("selenium is not installed; run `pip install 'megarl[dev]'`") from None
    needed = ("chromium", "chromedriver")
    found = {name: place for name in needed if (place := shutil.which(name))}
    if missing := [name for name in needed if name not in found]:
        raise UserError(f"not installed: {', '.join(missing)}; `make test-report` installs both")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found["chromedriver"]))
    driver.set_script_timeout(300)  # axe-core's, on a busy machine
    try:
        yield driver
    finally:
        driver.quit()


def opened(browser: Any, page: Path, width: int = DESKTOP, scheme: str = "light") -> float:
    """Open a report, wait until its curves, tables and newest group are drawn, and return the seconds it took."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}  # clicks must not chase a scroll
    media = [{"name": name, "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    began = time.monotonic()
    browser.get(page.as_uri())
    wait(lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    return time.monotonic() - began


def wait(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true value of `condition`, called 50 times a second; raises RunError after `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.02)
    raise RunError(f"the page was not ready after {seconds:g} s")
