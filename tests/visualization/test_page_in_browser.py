"""What a page shows in Chromium"""

import io
import json

import numpy as np
import pytest
from pages import NASTY, SENTENCE, SIDE, captioned, document, one_hot
from PIL import Image

from visualization import page

pytestmark = pytest.mark.slow


class Browser:
    """Chromium with one page open"""

    def __init__(self, driver, folder):
        self.driver, self.path = driver, folder / "x.html"

    def open(self, source, width=1000, height=900, touch=False):
        """Open a page, or that of several captioned photographs, in a window of this size."""
        source = source if isinstance(source, str) else document(*source)
        self.path.write_text(source, encoding="utf-8")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        still = [{"name": "prefers-reduced-motion", "value": "reduce"}]  # so nothing fades
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": still})
        self.driver.get("about:blank")
        self.actions().move_by_offset(0, 0).perform()
        self.driver.get(self.path.as_uri())

    def actions(self, kind="mouse"):
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        return ActionChains(self.driver, duration=0, devices=[PointerInput(kind, kind)])

    def hover(self, element):
        self.actions().move_to_element(element).perform()

    def tap(self, element):
        self.actions("touch").move_to_element(element).click().perform()

    def press(self, *keys):
        from selenium.webdriver.common.keys import Keys

        self.actions().send_keys(*(getattr(Keys, key.upper()) for key in keys)).perform()

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def shown(self):
        """The words that are shown: at most one per photograph"""
        return [element.text for element in self.all(".sat-word.sat-shown")]

    def picture(self, i=0):
        """What is seen of photograph i, float (h, w, 3)"""
        element = self.all(".sat-picture")[i]
        self.run("arguments[0].style.borderRadius = 0", element)  # the page is seen behind corners
        picture = Image.open(io.BytesIO(element.screenshot_as_png))
        return np.asarray(picture.convert("RGB")).astype(float)

    def complaints(self):
        """Lines on the console, and requested URLs other than that of the page"""
        lines = [entry["message"] for entry in self.driver.get_log("browser")]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                lines.append(message["params"]["request"]["url"])
        harmless = ("data:", "about:", self.path.as_uri())
        return [line for line in lines if not line.startswith(harmless)]


@pytest.fixture
def browser(chromium, tmp_path):
    browser = Browser(chromium, tmp_path)
    browser.complaints()  # clears them
    yield browser
    assert browser.complaints() == []


def brightest(picture):
    """Row and column of the brightest point, in locations"""
    light = picture.sum(2)
    rows, columns = np.nonzero(light >= light.max() - 1)
    return SIDE * (rows.mean() + 0.5) / len(light), SIDE * (columns.mean() + 0.5) / len(light[0])


@pytest.mark.parametrize("shape", [(300, 300), (120, 600), (900, 500)])
def test_pointing_at_a_word_shows_where_the_model_looked(browser, shape):
    cells = [(2, 11), (9, 4), (6, 7)]
    browser.open([captioned(["one", "two", "three"], one_hot(*cells), shape)])
    plain = browser.picture()
    assert abs(plain - 128).max() < 4 and browser.shown() == []
    for word, cell in zip(browser.all(".sat-word"), cells):
        browser.hover(word)
        assert browser.shown() == [word.text]
        picture = browser.picture()
        # The photograph keeps its shape.
        assert abs(picture.shape[1] / picture.shape[0] / (shape[1] / shape[0]) - 1) < 0.03
        assert abs(np.subtract(brightest(picture), cell) - 0.5).max() < 0.3
        assert picture.max() > 200 and abs(np.median(picture) - 64) < 3
    browser.hover(browser.all("h1")[0])
    assert browser.shown() == [] and (browser.picture() == plain).all()


def test_arrow_keys_move_from_word_to_word_and_escape_shows_the_photograph(browser):
    browser.open([captioned(["one", "two", "three"], one_hot((2, 2), (7, 7), (12, 12)))] * 2)
    plain, seen = browser.picture(), []
    for key in ("tab", "arrow_right", "arrow_right", "arrow_right", "arrow_left", "arrow_right"):
        browser.press(key)
        seen += browser.shown()
    assert seen == ["one", "two", "three", "three", "two", "three"]
    assert np.allclose(brightest(browser.picture()), 12.5, atol=0.3)
    pressed = [word.get_attribute("aria-pressed") for word in browser.all(".sat-word")]
    assert pressed == ["false", "false", "true", *["false"] * 3]
    assert "three: most attention at the lower right" in browser.all(".sat-where")[0].text
    browser.hover(browser.all(".sat-word")[0])
    assert browser.shown() == ["one"]
    browser.press("arrow_left")  # keys take precedence over a resting mouse
    assert browser.shown() == ["two"]
    browser.press("tab")  # once for each photograph
    assert browser.shown() == ["two", "one"]
    browser.press("escape")
    assert browser.shown() == [] and (browser.picture() == plain).all()
    browser.open([captioned(["כלב", "רץ"], one_hot((2, 2), (7, 7)))])
    browser.press("tab", "arrow_left")  # in text from right to left
    assert browser.shown() == ["רץ"]


def test_a_tap_or_click_selects_a_word_and_a_second_one_shows_the_photograph(browser):
    browser.open([captioned(["one", "two"])], width=360, height=740, touch=True)
    one, two = browser.all(".sat-word")
    picture = browser.all(".sat-picture")[0]
    for element, shown in zip((one, two, two, one, picture), ("one", "two", "", "one", "")):
        browser.tap(element)
        assert browser.shown() == shown.split()
    assert min(word.size["height"] for word in (one, two)) >= 32  # pixels, for a finger
    browser.open([captioned(["one", "two"])])
    browser.all(".sat-word")[1].click()
    browser.hover(browser.all("h1")[0])
    assert browser.shown() == ["two"]


def test_a_switch_shows_evidence_instead_of_attention(browser):
    evidence = one_hot((12, 3), (4, 11))
    browser.open([captioned(["one", "two"], one_hot((2, 2), (7, 7)), evidence=evidence)])
    one, two = browser.all(".sat-word")
    [switch], [status] = browser.all(".sat-evidence"), browser.all(".sat-where")
    two.click()
    assert np.allclose(brightest(browser.picture()), (7.5, 7.5), atol=0.3)
    switch.click()
    assert browser.shown() == ["two"] and "most evidence at the upper right" in status.text
    assert np.allclose(brightest(browser.picture()), (4.5, 11.5), atol=0.3)
    browser.hover(one)
    assert np.allclose(brightest(browser.picture()), (12.5, 3.5), atol=0.3)
    browser.press("escape")
    browser.hover(one)
    switch.click()  # leaving the word, whose line below is longer or shorter, does not move it
    browser.hover(one)
    assert "most attention" in status.text
    assert np.allclose(brightest(browser.picture()), (2.5, 2.5), atol=0.3)


def test_nothing_overflows_sideways_on_a_phone(browser):
    names = {"name": "n" * 200 + ".jpg", "references": ["r" * 200]}
    one = captioned(["w" * 90, *["word"] * 15], **names, n_best=[("c" * 200, -1e6), ("b", -2.0)])
    browser.open([one, captioned(shape=(60, 900))], width=360, height=740, touch=True)
    browser.run("document.querySelector('details').open = true")
    assert browser.run("return document.documentElement.scrollWidth") == 360
    elements = "[...document.body.querySelectorAll('*')]"
    boxes = browser.run(f"return {elements}.map((e) => e.getBoundingClientRect())")
    assert all(0 <= box["left"] and box["right"] <= 360 for box in boxes)


def test_a_screen_reader_finds_the_photograph_and_the_words(browser):
    browser.open([captioned()])
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [node for node in nodes if not node["ignored"] and "name" in node]
    found = [(node["role"]["value"], node["name"]["value"]) for node in named]
    assert {("article", "dog.jpg"), ("toolbar", "Words of the caption")} <= set(found)
    assert [name for role, name in found if role == "button"] == SENTENCE.split()
    assert [name for role, name in found if role == "image"] == [SENTENCE]  # and no layers


def test_words_are_never_run_as_script_and_no_script_but_ours_runs(browser):
    one = captioned(NASTY, name=NASTY[3], references=NASTY, n_best=[(NASTY[4], -2.0)] * 2)
    for source in (page.fragment(one), [one]):
        browser.open(source)
        for word, text in zip(browser.all(".sat-word"), NASTY, strict=True):
            browser.hover(word)
            assert browser.shown() == [text]
        assert browser.run("return window.hacked === undefined && document.scripts.length === 1")
    browser.run(
        "const script = document.createElement('script');"
        "script.textContent = 'window.hacked = 1'; document.body.append(script);"
        "fetch('https://example.invalid/').catch(() => {})"
    )
    assert browser.run("return window.hacked === undefined")
    complaints = browser.complaints()
    assert len(complaints) >= 2 and all("Content Security Policy" in line for line in complaints)


# As JupyterLab inserts output: by innerHTML, then with each script created again
INSERT = """
const output = document.createElement("div");
output.innerHTML = arguments[0];
for (const old of output.querySelectorAll("script")) {
  const script = document.createElement("script");
  script.textContent = old.textContent;
  old.replaceWith(script);
}
document.body.append(output);
"""


def test_fragments_in_one_notebook_do_not_clash(browser):
    fragment = page.fragment(captioned(["one", "two"], one_hot((2, 2), (11, 11))))
    browser.open("<!DOCTYPE html><p>A notebook</p>", height=1400)
    for _ in range(3):
        browser.run(INSERT, fragment)
    plain = browser.picture()
    browser.hover(browser.all(".sat-word")[3])  # the second word of the second cell
    assert browser.shown() == ["two"]
    assert (browser.picture(0) == plain).all() and (browser.picture(2) == plain).all()
    assert np.allclose(brightest(browser.picture(1)), 11.5, atol=0.3)
    browser.all(".sat-word")[5].click()
    assert browser.all(".sat-word")[5].get_attribute("aria-pressed") == "true"  # toggled once
    browser.run("document.querySelectorAll('.sat')[1].remove()")
    browser.press("escape")
    assert browser.shown() == []
