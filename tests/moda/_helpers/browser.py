"""A headless Chromium for tests of pages: what it shows at a width, in light, in dark and on paper."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import image

HINT = "apt-get install chromium chromium-driver (Debian, as root), which .ci/run does"


def chromium() -> str | None:
    """Where the browser is, under either of its names."""
    return shutil.which("chromium") or shutil.which("google-chrome")


def why_no_browser() -> str | None:
    """None if pages can be opened here, else what is missing and how to get it."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "needs selenium: pip install -e '.[dev]'"
    found = {"chromium": chromium(), "chromedriver": shutil.which("chromedriver")}
    missing = [name for name, path in found.items() if path is None]
    return f"needs {' and '.join(missing)}: {HINT}" if missing else None


class Browser:
    """Made by `open`; `close` it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.width = 0

    @classmethod
    def open(cls) -> Browser:
        """Start it; `why_no_browser` says where there is none."""
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = chromium() or ""
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        driver.set_page_load_timeout(60)
        return cls(driver)

    def close(self) -> None:
        """End it."""
        self.driver.quit()

    def show(self, page: Path, width: int, scheme: str = "light", media: str = "screen") -> None:
        """Open a page at a width of so many pixels."""
        self.width = width
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        self.driver.get(page.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a piece of JavaScript."""
        return self.driver.execute_script(script, *arguments)

    def messages(self) -> list[str]:
        """What the console said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requested(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def picture(self) -> np.ndarray:
        """The whole page, (height, width, 3) in [0, 1]."""
        height = self.run("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": self.width, "height": height, "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        return image.imread(io.BytesIO(base64.b64decode(shot["data"])), format="png")[..., :3]


OFF_SCREEN = """return [...document.querySelectorAll(arguments[0])].filter(each => {
  const box = each.getBoundingClientRect();
  return box.width === 0 || box.left < 0 || box.right > innerWidth + 0.5;
}).map(each => each.textContent)"""
HIDDEN_WITHOUT_HINT = """return [...document.querySelectorAll('.scroll')].filter(each => {
  const hint = each.parentElement.querySelector('.hint');
  const shown = hint !== null && getComputedStyle(hint).display !== 'none';
  return each.querySelector('svg') && (each.scrollWidth > each.clientWidth + 1) !== shown;
}).map(each => each.getAttribute('aria-label'))"""
SHADOWS = "return [...document.querySelectorAll('.scroll')].filter(e => getComputedStyle(e).backgroundImage === 'none').length"
