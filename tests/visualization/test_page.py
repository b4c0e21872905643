"""The page: what is in it, and in Chromium what it shows."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from visualization import page
from visualization.overlay import attention_overlays

SIDE = 14  # locations of the attention grid along an edge
SENTENCE = "a brown dog runs over the snow with a red ball &"
NASTY = [
    "<unk>",
    "\"&'",
    "</script>",
    "<img src=x onerror='window.hacked=1'>",
    "</style><script>window.hacked=1</script>",
    "&lt;",
    "naïve",
    "雪",
    "{{x}}",
]


def one_hot(*cells):
    """(T, P): for each word all attention at one location (row, column)"""
    return np.eye(SIDE * SIDE, dtype=np.float32)[[row * SIDE + column for row, column in cells]]


def captioned(words=None, attention=None, shape=(240, 320), **fields):
    """A captioned photograph: mid-grey, random attention"""
    words = SENTENCE.split() if words is None else words
    if attention is None:
        attention = np.random.default_rng(0).dirichlet(np.full(SIDE * SIDE, 0.3), len(words))
    usual = {
        "name": "photos/dog.jpg",
        "image": np.full((*shape, 3), 128, dtype=np.uint8),
        "words": words,
        "attention": attention,
        "score": -12.3456,
        "n_best": [(" ".join(words), -12.3456)],
    }
    return SimpleNamespace(**usual | fields)


def document(*captioned):
    return page.document("dogs", page.HINT, [page.view(one, "h2") for one in captioned])


class Elements(HTMLParser):
    """The elements of a page in order, as (tag, attributes, text within); every tag is closed."""

    VOID = ("meta", "link", "img")

    def __init__(self, source):
        super().__init__()
        self.all, self.open = [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.all.append([tag, dict(attributes), ""])
        assert len(attributes) == len(dict(attributes))
        if tag not in self.VOID:
            self.open.append(self.all[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def of(self, name):
        """(attributes, text) of those with this tag or class."""
        return [
            (attributes, text)
            for tag, attributes, text in self.all
            if name == tag or name in attributes.get("class", "").split()
        ]


def pictures_in(source, kind):
    """The PIL images of a class in a page"""
    pictures = []
    for attributes, _ in Elements(source).of(kind):
        head, data = attributes["src"].split(",")
        assert head in ("data:image/jpeg;base64", "data:image/png;base64")
        pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
    return pictures


# Without a browser


@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.0625, -0.03)])
def test_the_layers_of_the_page_are_those_of_the_figure(offset):
    y, x = np.mgrid[:336, :448] / 336
    waves = [(np.sin(12 * x + 5 * y + phase) + 1) * 127 for phase in (0, 1, 4)]
    image = np.stack(waves, axis=-1).astype(np.uint8)
    one = captioned(image=image, offset=offset)
    source = document(one)
    [photograph], [grey] = (pictures_in(source, kind) for kind in ("sat-photograph", "sat-grey"))
    assert abs(np.asarray(photograph).astype(int) - image).mean() < 3
    heats = pictures_in(source, "sat-heat")
    expected = list(attention_overlays(image, one.words, one.attention, True, offset))
    assert len(heats) == len(expected) == 12
    for heat, picture in zip(heats, expected):
        ours = grey.convert("RGBA")
        ours.alpha_composite(heat.convert("RGBA").resize(ours.size, Image.Resampling.BILINEAR))
        assert abs(np.asarray(ours.convert("RGB")).astype(int) - picture).mean() < 3


def test_page_of_twelve_words_adds_less_than_80_kb_to_the_photograph():
    source = document(captioned())
    without = re.sub(r"data:image/jpeg;base64,[^\"]*", "", source)
    assert len(without.encode()) < 80_000 and "jpeg" not in without


def test_words_names_and_references_are_shown_as_they_are():
    text, references = " ".join(NASTY), [*NASTY, "-->"]
    several = [(text, -1.0), (NASTY[4], -2.0)]
    one = captioned(NASTY, name=f"a/{NASTY[0]}", references=references, n_best=several)
    for source in (document(one), page.fragment(one)):
        elements = Elements(source)
        assert [text for _, text in elements.of("sat-word")] == NASTY
        assert elements.of("sat-name")[0][1] == NASTY[0]
        listed = [text for _, text in elements.of("li")]
        assert listed == [f"{text} -1.000", f"{NASTY[4]} -2.000", *references]
        assert "open" not in elements.of("details")[0][0]
        assert elements.of("sat-photograph")[0][0]["alt"] == text
        assert len(elements.of("script")) == len(elements.of("style")) == 1
    assert Elements(page.document(NASTY[4], "", [])).of("h1")[0][1] == NASTY[4]
    elements = Elements(document(captioned()))
    assert elements.of("ol") == [] and elements.of("details") == []
    assert "log-probability -12.346 nats" in [text for _, text in elements.of("p")]


def test_page_has_no_external_references():
    source = document(captioned())
    assert not re.search(r"https?:|@import|url\(|//\w+\.\w", re.sub(r"base64,[^\"]*", "", source))
    links = [
        attributes[key]
        for _, attributes, _ in Elements(source).all
        for key in ("src", "href")
        if key in attributes
    ]
    assert len(links) == 15 and all(link.startswith("data:") for link in links)


def test_large_photographs_are_scaled_down_to_640_pixels():
    for shape, size in [((240, 320), (320, 240)), ((900, 1600), (640, 360)), ((3000, 1), (1, 640))]:
        source = document(captioned(shape=shape))
        for kind, value in (("sat-photograph", 128), ("sat-grey", 64)):
            [picture] = pictures_in(source, kind)
            assert picture.size == size and abs(np.asarray(picture).astype(int) - value).max() <= 2


def test_the_place_of_the_attention_is_described():
    places = {(0, 0): "at the upper left", (13, 7): "at the bottom", (6, 6): "in the centre"}
    source = page.fragment(captioned(["a", "big", "dog"], one_hot(*places)))
    described = [attributes["data-where"] for attributes, _ in Elements(source).of("sat-word")]
    assert described == [f"most attention {place}, 100 %" for place in places.values()]
    even = np.full((1, SIDE * SIDE), 1 / SIDE**2)
    [(attributes, _)] = Elements(page.fragment(captioned(["dog"], even))).of("sat-word")
    assert attributes["data-where"] == "attention spread over the photograph"


def test_a_page_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "x.html"
    with pytest.raises(ValueError, match="attention of shape"):
        page.write_page(path, [captioned(), captioned(attention=np.zeros((1, 196)))], "dog")
    with pytest.raises(OSError):
        page.write_page(tmp_path / "missing" / "x.html", [captioned()], "dog")
    assert list(tmp_path.iterdir()) == []
    names = [f"photos/{name}.jpg" for name in ("0", "1", "\udcff\0")]
    page.write_page(str(path), (captioned(name=name) for name in names), "photos \udcff")
    elements = Elements(path.read_text(encoding="utf-8"))
    headings = [text for _, text in elements.of("h2")]
    assert headings == ["0.jpg", "1.jpg", "\\udcff\\x00.jpg"]
    assert [text for _, text in elements.of("h1")] == ["photos \\udcff"]
    assert len(elements.of("script")) == 1 and list(tmp_path.iterdir()) == [path]
    assert page.is_page("x.HTM") and not page.is_page("x.png")


def test_caption_without_words_is_a_page_too():
    source = document(captioned([], np.zeros((0, 196)), n_best=[("", -1.0)]))
    assert "The caption has no words." in source and Elements(source).of("sat-heat") == []


def test_fragment_styles_nothing_but_itself():
    elements = Elements(page.fragment(captioned()))
    assert not {tag for tag, _, _ in elements.all} & {"html", "head", "body", "meta", "h1", "h2"}
    assert not any("id" in attributes for _, attributes, _ in elements.all)
    rules = re.sub(r"/\*.*?\*/", "", elements.of("style")[0][1], flags=re.DOTALL)
    found = re.findall(r"([^{};]+)\{", rules)
    selectors = [part for one in found if "@" not in one for part in one.split(",")]
    assert len(selectors) > 20 and all(".sat" in selector for selector in selectors)
    words = [attributes for attributes, _ in elements.of("sat-word")]
    assert [word["tabindex"] for word in words] == ["0", *["-1"] * 11]  # arrow keys reach these


# In Chromium


class Browser:
    """Chromium with one page open."""

    def __init__(self, driver, folder):
        self.driver, self.path = driver, folder / "x.html"

    def cdp(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def open(self, source, width=1000, height=900, dark=False, calm=True, touch=False):
        """
        Open a page, or the page of one or several captioned photographs.

        width, height: of the window, in pixels; calm: nothing fades, so what is seen is final
        """
        if not isinstance(source, str):
            source = document(*source) if isinstance(source, list) else document(source)
        self.path.write_text(source, encoding="utf-8")
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=touch,
        )
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.cdp(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
                {"name": "prefers-reduced-motion", "value": "reduce" if calm else "no-preference"},
            ],
        )
        self.driver.get("about:blank")
        self.actions().move_by_offset(0, 0).perform()
        self.driver.get(self.path.as_uri())

    def actions(self, kind="mouse"):
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        chain = ActionChains(self.driver, duration=0)
        chain.w3c_actions = ActionBuilder(self.driver, PointerInput(kind, kind), duration=0)
        return chain

    def hover(self, element):
        self.actions().move_to_element(element).perform()

    def press(self, *keys):
        from selenium.webdriver.common.keys import Keys

        keys = [getattr(Keys, key.upper()) for key in keys]
        self.actions().send_keys(*keys).perform()

    def tap(self, element):
        self.actions("touch").move_to_element(element).click().perform()

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def shown(self):
        """The words that are shown: at most one per photograph."""
        return [element.text for element in self.all(".sat-word.sat-shown")]

    def picture(self, i=0):
        """What is seen of photograph i, float (h, w, 3) from 0 to 255"""
        element = self.all(".sat-picture")[i]
        self.run("arguments[0].style.borderRadius = 0", element)  # the page is seen behind corners
        png = element.screenshot_as_png
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(float)

    def complaints(self):
        """Lines on the console, and requested URLs other than that of the page."""
        lines = [entry["message"] for entry in self.driver.get_log("browser")]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                lines.append(message["params"]["request"]["url"])
        return [
            line
            for line in lines
            if line != self.path.as_uri() and not line.startswith(("data:", "about:"))
        ]


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


@pytest.mark.slow
def test_requests_and_script_errors_of_a_page_are_noticed(browser):
    browser.open("<script>nothing.here</script><img src='file:///missing.png'>")
    found = "\n".join(browser.complaints())
    assert "nothing is not defined" in found and "file:///missing.png" in found


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(300, 300), (120, 600), (900, 500)])
def test_pointing_at_a_word_shows_where_the_model_looked(browser, shape):
    cells = [(2, 11), (9, 4), (6, 7)]
    browser.open(captioned(["one", "two", "three"], one_hot(*cells), shape))
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_arrow_keys_move_visually_in_right_to_left_text(browser):
    browser.open(captioned(["כלב", "רץ"], one_hot((2, 2), (7, 7))))
    browser.press("tab", "arrow_left")
    assert browser.shown() == ["רץ"]
    browser.press("arrow_right")
    assert browser.shown() == ["כלב"]


@pytest.mark.slow
def test_a_tap_or_click_selects_a_word_and_a_second_one_shows_the_photograph(browser):
    browser.open(captioned(["one", "two"]), width=360, height=740, touch=True)
    plain = browser.picture()
    one, two = browser.all(".sat-word")
    for word, shown in [(one, ["one"]), (two, ["two"]), (two, [])]:
        browser.tap(word)
        assert browser.shown() == shown
    assert (browser.picture() == plain).all()
    browser.tap(two)
    browser.tap(browser.all(".sat-picture")[0])
    assert browser.shown() == []
    assert min(word.size["height"] for word in (one, two)) >= 32  # pixels, for a finger
    browser.open(captioned(["one", "two"]))
    browser.all(".sat-word")[1].click()
    browser.hover(browser.all("h1")[0])
    assert browser.shown() == ["two"]


@pytest.mark.slow
def test_nothing_overflows_sideways_on_a_phone(browser):
    long = ["w" * 90, *"a sentence that goes on and on for many more words than one line".split()]
    names = {"name": "n" * 200 + ".jpg", "references": ["r" * 200]}
    one = captioned(long, **names, n_best=[("c" * 200, -1234567.0), ("b", -2.0)])
    shapes = [captioned(shape=shape) for shape in ((60, 900), (900, 60))]
    browser.open([one, *shapes], width=360, height=740, touch=True)
    browser.run("document.querySelector('details').open = true")
    assert browser.run("return document.documentElement.scrollWidth") == 360
    edges = browser.run(
        "return [...document.body.querySelectorAll('*')].map("
        "(e) => [e.getBoundingClientRect().left, e.getBoundingClientRect().right])"
    )
    assert np.min(edges) >= 0 and np.max(edges) <= 360


COLOURS = """
    // The text's colour over the nearest background, as the screen shows both: red, green, blue.
    const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    let behind = arguments[0];
    while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") {
      behind = behind.parentElement;
    }
    return [[behind, "backgroundColor"], [arguments[0], "color"]].map(([element, property]) => {
      context.fillStyle = getComputedStyle(element)[property];
      context.fillRect(0, 0, 1, 1);
      return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    });
"""


def luminance(colour):
    """Relative luminance of WCAG, from 0 to 1"""
    shares = np.array(colour) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.slow
def test_text_is_readable_in_light_and_dark(browser):
    selectors = ["h1", "header p", "h2", ".sat-word", ".sat-shown", ".sat-where", "summary", "li"]
    backgrounds = []
    for dark in (False, True):
        one = captioned(references=["A dog."], n_best=[("a dog", -1.0), ("dogs", -2.0)])
        browser.open(one, dark=dark)
        browser.all(".sat-word")[2].click()
        for selector in selectors:
            behind, text = map(luminance, browser.run(COLOURS, browser.all(selector)[0]))
            low, high = sorted((behind, text))
            assert (high + 0.05) / (low + 0.05) >= 4.5, selector
            backgrounds += [behind] * (selector == "h1")
    assert backgrounds[0] > 0.9 and backgrounds[1] < 0.05


@pytest.mark.slow
def test_a_screen_reader_finds_the_photograph_and_the_words(browser):
    browser.open(captioned(), calm=False)
    browser.press("tab", "arrow_right")
    nodes = browser.cdp("Accessibility.getFullAXTree")["nodes"]
    found = [
        (node["role"]["value"], node.get("name", {}).get("value"))
        for node in nodes
        if not node["ignored"]
    ]
    assert ("image", SENTENCE) in found and ("article", "dog.jpg") in found
    assert ("toolbar", "Words of the caption") in found
    assert [name for role, name in found if role == "button"] == SENTENCE.split()
    assert [role for role, _ in found].count("image") == 1  # the layers are no images of their own
    focused = "return document.activeElement.textContent"
    assert browser.run(focused) == "brown"


@pytest.mark.slow
def test_words_are_never_run_as_script_and_no_script_but_ours_runs(browser):
    one = captioned(NASTY, name=NASTY[3], references=NASTY, n_best=[(NASTY[4], -2.0)] * 2)
    for source in ([one], page.fragment(one)):
        browser.open(source)
        assert [word.text for word in browser.all(".sat-word")] == NASTY
        for word in browser.all(".sat-word"):
            browser.hover(word)
            assert browser.shown() == [word.text]
        assert browser.run("return window.hacked === undefined && document.scripts.length === 1")
    browser.open(one)
    browser.run(
        "const script = document.createElement('script');"
        "script.textContent = 'window.hacked = 1'; document.body.append(script);"
        "fetch('https://example.invalid/').catch(() => {})"
    )
    assert browser.run("return window.hacked === undefined")
    complaints = browser.complaints()
    assert len(complaints) >= 2 and all("Content Security Policy" in line for line in complaints)


@pytest.mark.slow
def test_fragments_in_one_notebook_do_not_clash(browser):
    """Inserted as in JupyterLab: by innerHTML, then with each script created again."""
    one = captioned(["one", "two"], one_hot((2, 2), (11, 11)))
    cells = json.dumps([page.fragment(one)] * 3).replace("</", "<\\/")
    browser.open(
        f"""<!DOCTYPE html><p>A notebook</p><script>
        window.listeners = 0;
        const listen = EventTarget.prototype.addEventListener;
        EventTarget.prototype.addEventListener = function (kind, ...rest) {{
          listeners += kind === "click";
          listen.call(this, kind, ...rest);
        }};
        for (const cell of {cells}) {{
          const output = document.createElement("div");
          output.innerHTML = cell;
          for (const old of output.querySelectorAll("script")) {{
            const script = document.createElement("script");
            script.textContent = old.textContent;
            old.replaceWith(script);
          }}
          document.body.append(output);
        }}</script>""",
        height=1400,
    )
    assert browser.run("return listeners") == 1  # only the first script counts
    plain = browser.picture()
    browser.hover(browser.all(".sat-word")[3])  # the second word of the second cell
    assert browser.shown() == ["two"]
    assert (browser.picture(0) == plain).all() and (browser.picture(2) == plain).all()
    assert np.allclose(brightest(browser.picture(1)), 11.5, atol=0.3)
    browser.all(".sat-word")[5].click()
    browser.run("document.querySelectorAll('.sat')[1].remove()")
    assert browser.shown() == ["two"]
    browser.press("escape")
    assert browser.shown() == []
