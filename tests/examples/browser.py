"""Chromium without a window, as the tests of pages use it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

ARTEFACTS = Path(__file__).parents[2] / "build" / "artefacts"
WAIT_SECONDS = 60


class Browser:
    """A browser, with `driver` for whatever is not here.

    Args:
        program: Path of Chromium.
        driver: Path of its driver.
    """

    def __init__(self, program: str, driver: str) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1240,960"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript, and return its result."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Wait until a condition is true, and return it."""
        return WebDriverWait(self.driver, WAIT_SECONDS).until(lambda _: condition())

    def text(self) -> str:
        return str(self.run("return document.documentElement.textContent"))

    def type(self, identity: str, text: str) -> None:
        """Replace the text of a field."""
        (field,) = self.find(f"#{identity} textarea, #{identity} input")
        field.clear()
        field.send_keys(text)

    def click(self, selector: str) -> None:
        self.wait(lambda: [one for one in self.find(selector) if one.is_displayed()])[0].click()

    def open_tab(self, name: str) -> None:
        self.wait(lambda: [tab for tab in self.find("button[role=tab]") if tab.text == name])[0].click()

    def upload(self, identity: str, path: Path) -> None:
        self.find(f"#{identity} input[type=file]")[0].send_keys(str(path))

    def labels(self, identity: str) -> list[str]:
        """The captions below the pictures of a gallery, in one call, so that the page does not change between them."""
        script = "return [...document.querySelectorAll(arguments[0])].map(label => label.textContent.trim())"
        return self.run(script, f"#{identity} .caption-label")

    def pictures(self, selector: str) -> list[WebElement]:
        """The pictures that are shown."""
        found = self.find(f"{selector} img")
        return [one for one in found if one.is_displayed() and int(one.get_property("naturalWidth")) > 0]

    def shoot(self, name: str) -> None:
        """Store a screenshot, to be looked at."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        assert self.driver.save_screenshot(str(ARTEFACTS / f"{name}.png"))

    def other_addresses(self, address: str) -> set[str]:
        """What was requested from elsewhere than an address."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        return {url for url in sent if not url.startswith((address, "data:", "blob:"))}
