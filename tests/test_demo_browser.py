"""The page of `armm demo` in a real Chromium without a window: it draws, answers and repaints, and reaches no other machine.

Screenshots are left in the folder that the environment variable ARMM_SCREENSHOTS names.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import time
from pathlib import Path
from urllib.parse import urlparse

import pytest
from PIL import Image

pytest.importorskip("gradio", reason='the page needs gradio: pip install "armm[demo]"')
webdriver = pytest.importorskip("selenium.webdriver", reason="driving a browser needs selenium")

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --window-size=1280,1080 "
    # Painting a mask needs WebGL, here in software.
    "--enable-unsafe-swiftshader --use-angle=swiftshader"
).split()
PATIENCE = 120.0  # seconds; a busy machine with one core is slow


@pytest.fixture(scope="module")
def address():
    from armm.serving.demo import serve
    from armm.serving.studio import Studio

    with serve(Studio(), port=0) as address:
        yield address


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    folder = Path(os.environ.get("ARMM_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def page(address, screenshots, tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    try:
        yield Page(browser, address, screenshots)
    finally:
        browser.quit()


class Page:
    """The opened page and what a person does with it."""

    def __init__(self, browser, address, screenshots):
        self.browser, self.address, self.screenshots = browser, address, screenshots
        self.requests: set[str] = set()
        browser.set_page_load_timeout(PATIENCE)
        browser.get(address)
        self.wait(lambda: self.find("#draw"), "the page")

    def wait(self, condition, what):
        """The first truthy value of `condition`, asked again and again."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except Exception:  # elements come and go while the page draws itself
                pass
            time.sleep(0.1)
        self.shoot("failed")
        raise AssertionError(f"waited {PATIENCE:.0f} seconds for {what}; the page says:\n{self.text()[:2000]}")

    def text(self):
        return self.browser.find_element(By.TAG_NAME, "body").text

    def find(self, selector):
        """The first visible element."""
        return next((e for e in self.browser.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()), None)

    def click(self, selector):
        element = self.wait(lambda: self.find(selector), selector)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def open_tab(self, name):
        buttons = "button[role=tab]"
        tab = self.wait(
            lambda: [e for e in self.browser.find_elements(By.CSS_SELECTOR, buttons) if e.text == name], name
        )[0]
        self.browser.execute_script("window.scrollTo(0, 0)")
        tab.click()
        self.wait(lambda: tab.get_attribute("aria-selected") == "true", f"the tab {name}")

    def write(self, selector, text):
        field = self.wait(lambda: self.find(selector), selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE)
        field.send_keys(text, Keys.TAB)

    def picture(self, selector):
        """The picture that an <img> shows, as the server sent it."""
        code = """
        const done = arguments[1];
        fetch(arguments[0]).then(r => r.blob()).then(blob => {
          const reader = new FileReader();
          reader.onload = () => done(reader.result);
          reader.readAsDataURL(blob);
        }).catch(error => done("error: " + error));
        """
        source = self.wait(lambda: self.find(selector), selector).get_attribute("src")
        data = self.browser.execute_async_script(code, source)
        assert data.startswith("data:image"), data
        return Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB")

    def shoot(self, name):
        self.browser.execute_script("window.scrollTo(0, 0)")
        height = self.browser.execute_script("return Math.min(document.documentElement.scrollHeight, 2200)")
        self.browser.set_window_size(1280, max(800, height + 10))
        time.sleep(0.4)
        self.browser.save_screenshot(str(self.screenshots / f"{name}.png"))
        self.browser.set_window_size(1280, 1080)

    def hosts(self):
        """Hosts of all requests since the page was opened, but for the browser's own pages (chrome://...)."""
        for entry in self.browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requests.add(message["params"]["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                self.requests.add(message["params"]["url"])
        return {
            urlparse(url).hostname for url in self.requests if urlparse(url).scheme in ("http", "https", "ws", "wss")
        }


def varied(image):
    """Whether a picture shows more than one color."""
    return max(high - low for low, high in image.getextrema()) > 40


def generate_draws_token_by_token(page):
    page.open_tab("Generate")
    page.shoot("generate-before")
    page.write("#prompt textarea", "a large red cube")
    page.click("#draw")
    page.wait(lambda: page.find("#stage .armm-stage img"), "a preview")
    page.browser.save_screenshot(str(page.screenshots / "generate-live.png"))
    page.wait(lambda: page.find("#drawn img"), "the picture")
    image = page.picture("#drawn img")
    assert image.size == (64, 64) and varied(image)
    red, green, blue = (sorted(band.tobytes())[-200] for band in image.split())
    assert red > 90, "a red cube was asked for"
    shown = page.wait(lambda: page.find("#facts").text, "the figures")
    assert "calls of the transformer" in shown and "64" in shown
    page.shoot("generate")


def generate_with_an_accelerator_shows_what_it_saved(page):
    page.open_tab("Generate")
    page.click("#accelerator input[value=JacobiSpeculative]")
    page.wait(lambda: page.find("#window"), "the window")
    page.write("#prompt textarea", "a small yellow sphere in front of a large blue cylinder")
    page.click("#draw")
    page.wait(lambda: page.find("#facts") and "of the drafts taken" in page.find("#facts").text, "the figures")
    page.wait(lambda: varied(page.picture("#facts img")), "the heat map")
    page.shoot("generate-accelerated")
    page.click("#decoder input[value=neighboring]")
    page.wait(lambda: page.find("#accelerator input[value=none]").is_selected(), "the accelerator to go")


def a_mistake_is_explained_on_the_page(page):
    page.open_tab("Generate")
    page.write("#prompt textarea", "a purple dinosaur")
    page.click("#draw")
    toast = page.wait(lambda: page.find(".toast-body"), "the message")
    assert "dinosaur" in toast.text and "Traceback" not in page.text()
    page.shoot("mistake")
    page.click(".toast-body .toast-close")
    page.wait(lambda: page.find(".toast-body") is None, "the message to go")


def understand_answers_and_explains(page):
    page.open_tab("Understand")
    page.wait(lambda: page.find("#seen img"), "the example picture")
    page.write("#question textarea", "how many objects are there?")
    page.click("#ask")
    page.wait(lambda: page.find("#answer textarea").get_attribute("value"), "the answer")
    assert page.find("#answer textarea").get_attribute("value") in ("one", "two", "three")
    page.wait(lambda: page.find("#overlays img"), "the explanation")
    image = page.picture("#overlays img")
    assert image.size == (192, 192) and varied(image)
    page.shoot("understand")


def understand_writes_a_caption(page):
    page.open_tab("Understand")
    page.write("#question textarea", "")
    page.click("#ask")
    page.wait(lambda: len(page.browser.find_elements(By.CSS_SELECTOR, "#overlays img")) >= 4, "the explanations")
    caption = page.find("#answer textarea").get_attribute("value")  # whole by now; before, it was being written
    assert any(shape in caption for shape in ("cube", "sphere", "cylinder", "cone"))
    page.shoot("understand-caption")


def inpaint_repaints_what_was_painted(page):
    page.open_tab("Inpaint")
    canvas = page.wait(lambda: page.find("#editor canvas"), "the canvas")
    time.sleep(1.0)
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    width, height = canvas.size["width"], canvas.size["height"]
    pointer = ActionChains(page.browser, duration=60)
    pointer.move_to_element_with_offset(canvas, -width // 10, -height // 10).click_and_hold()
    for across, down in ((0.1, -0.1), (0.1, 0.0), (-0.1, 0.0), (-0.1, 0.1), (0.1, 0.1)):
        pointer.move_to_element_with_offset(canvas, int(across * width), int(down * height))
    pointer.release().perform()
    time.sleep(1.0)
    page.shoot("inpaint-painted")
    page.click("#repaint")
    page.wait(lambda: page.find("#repainted img"), "the result")
    image = page.picture("#repainted img")
    assert image.size == (64, 64) and varied(image)
    shown = page.wait(lambda: page.find("#paint-facts").text, "the figures")
    anew = int(shown.split("tokens drawn anew")[0].split()[-1])
    assert 1 <= anew < 64, "some of the tokens are drawn anew, not all"
    page.shoot("inpaint")


def a_drawn_picture_can_be_asked_about(page):
    page.open_tab("Generate")
    page.write("#prompt textarea", "a large green cone")
    before = page.find("#drawn img").get_attribute("src")
    page.click("#draw")
    page.wait(lambda: page.find("#drawn img").get_attribute("src") != before, "the picture")
    page.click("#ask-about")
    page.wait(lambda: page.find("#question textarea"), "the other tab")
    page.write("#question textarea", "what color is the cone?")
    page.click("#ask")
    page.wait(lambda: page.find("#answer textarea").get_attribute("value") == "green", "the answer")


def no_request_leaves_this_machine(page):
    assert page.hosts() == {"127.0.0.1"}
    severe = [
        entry["message"] for entry in page.browser.get_log("browser") if "Content Security Policy" in entry["message"]
    ]
    assert not severe, severe


@pytest.mark.slow
def test_the_page(page):
    """Everything in one browser, one thing after the other: a page and a model for each would take minutes."""
    generate_draws_token_by_token(page)
    generate_with_an_accelerator_shows_what_it_saved(page)
    a_mistake_is_explained_on_the_page(page)
    understand_answers_and_explains(page)
    understand_writes_a_caption(page)
    inpaint_repaints_what_was_painted(page)
    a_drawn_picture_can_be_asked_about(page)
    no_request_leaves_this_machine(page)
