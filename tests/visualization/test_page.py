import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from visualization import attention, page
from visualization.overlay import Drawing

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
    "-->",
    "{{x}}",
]


def one_hot(*cells):
    """(T, P): for each word all attention at one location (row, column)"""
    attention = np.zeros((len(cells), SIDE, SIDE), dtype=np.float32)
    for alpha, cell in zip(attention, cells):
        alpha[cell] = 1
    return attention.reshape(len(cells), -1)


def captioned(words=None, attention=None, shape=(240, 320), **fields):
    """A captioned photograph: mid-grey, random attention."""
    words = SENTENCE.split() if words is None else words
    if attention is None:
        attention = np.random.default_rng(0).dirichlet(np.full(SIDE * SIDE, 0.3), len(words))
    text = " ".join(words)
    usual = {
        "name": "photos/dog.jpg",
        "image": np.full((*shape, 3), 128, dtype=np.uint8),
        "words": words,
        "attention": attention,
        "score": -12.3456,
        "n_best": [(text, -12.3456)],
    }
    return SimpleNamespace(**usual | fields)


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


def photograph_in(source):
    [(attributes, _)] = Elements(source).of("img")
    kind, data = attributes["src"].split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


# Without a browser


def test_page_of_twelve_words_adds_less_than_60_kb_to_the_photograph():
    source = page.attention_page([captioned()], "dog")
    assert len(SENTENCE.split()) == 12
    without = re.sub(r"data:image/jpeg;base64,[^\"]*", "", source)
    assert len(without.encode()) < 60_000 and "jpeg" not in without


def test_attention_is_kept_to_one_255th_of_each_words_maximum():
    one = captioned()
    [(attributes, _)] = Elements(page.attention_page([one], "dog")).of("sat")
    cells = np.frombuffer(base64.b64decode(attributes["data-attention"]), np.uint8)
    assert attributes["data-side"] == str(SIDE)
    cells = cells.reshape(len(one.words), -1) / 255
    assert (cells.max(1) == 1).all()
    largest = one.attention.max(1, keepdims=True)
    assert abs(cells * largest - one.attention).max() <= (largest.max() / 255) / 2 + 1e-6


def test_words_names_and_references_are_shown_as_they_are():
    text = " ".join(NASTY)
    one = captioned(
        NASTY, name=f"a/{NASTY[3]}", references=NASTY, n_best=[(text, -1.0), (NASTY[4], -2.0)]
    )
    for source in (page.attention_page([one], NASTY[4]), page.fragment(one)):
        elements = Elements(source)
        assert [text for _, text in elements.of("sat-word")] == NASTY
        assert elements.of("sat-name")[0][1] == NASTY[3]
        assert [text for _, text in elements.of("li")] == [
            f"{text} −1.000",
            f"{NASTY[4]} −2.000",
            *NASTY,
        ]
        assert elements.of("img")[0][0]["alt"] == text
        assert len(elements.of("img")) == len(elements.of("script")) == 1
    assert Elements(page.attention_page([one], NASTY[4])).of("h1")[0][1] == NASTY[4]


def test_page_has_no_external_references():
    source = page.attention_page([captioned()], "dog")
    assert not re.search(r"https?:|@import|url\(|//\w+\.\w", re.sub(r"base64,[^\"]*", "", source))
    links = [
        attributes[key]
        for _, attributes, _ in Elements(source).all
        for key in ("src", "href")
        if key in attributes
    ]
    assert len(links) == 2 and all(link.startswith("data:") for link in links)


@pytest.mark.parametrize(
    "shape, size",
    [((240, 320), (320, 240)), ((900, 1600), (640, 360)), ((3000, 1), (1, 640)), ((1, 1), (1, 1))],
)
def test_large_photographs_are_scaled_down_to_640_pixels(shape, size):
    photograph = photograph_in(page.attention_page([captioned(shape=shape)], "dog"))
    assert photograph.size == size
    assert abs(np.asarray(photograph).astype(int) - 128).max() <= 2


def test_candidates_are_listed_only_if_there_are_several():
    elements = Elements(page.attention_page([captioned()], "dog"))
    assert elements.of("ol") == [] and elements.of("details") == []
    assert "log-probability −12.346 nats" in [text for _, text in elements.of("p")]
    several = captioned(n_best=[("a dog", -3.25), ("two dogs", -4.5)], references=["Dogs."])
    elements = Elements(page.attention_page([several], "dog"))
    assert [text for _, text in elements.of("sat-row")] == ["a dog −3.250", "two dogs −4.500"]
    [(attributes, text)] = elements.of("details")
    assert "open" not in attributes and "Dogs." in text


def test_page_of_a_folder_has_a_view_per_image_and_one_script():
    folder = [captioned(name=f"photos/{i}.jpg") for i in range(3)]
    elements = Elements(page.attention_page(iter(folder), "photos"))
    assert [text for _, text in elements.of("h2")] == ["0.jpg", "1.jpg", "2.jpg"]
    assert len(elements.of("script")) == len(elements.of("style")) == 1


@pytest.mark.parametrize(
    "cell, place",
    [
        ((0, 0), "at the upper left, 100 %"),
        ((13, 7), "at the bottom, 100 %"),
        ((6, 6), "in the centre, 100 %"),
    ],
)
def test_position_of_the_attention_is_described(cell, place):
    [(attributes, _)] = Elements(page.fragment(captioned(["dog"], one_hot(cell)))).of("sat-word")
    assert attributes["data-where"] == f"most attention {place}"


def test_the_tab_key_reaches_only_the_first_word():
    words = Elements(page.attention_page([captioned()], "dog")).of("sat-word")
    assert [attributes["tabindex"] for attributes, _ in words] == ["0", *["-1"] * 11]


def test_even_attention_is_described_as_spread():
    even = np.full((1, SIDE * SIDE), 1 / SIDE**2)
    [(attributes, _)] = Elements(page.fragment(captioned(["dog"], even))).of("sat-word")
    assert attributes["data-where"] == "attention spread over the photograph"


@pytest.mark.parametrize("shape", [(11, 196), (13, 196), (12, 195), (12,)])
def test_attention_that_does_not_match_the_words_is_an_error(shape):
    with pytest.raises(ValueError, match=re.escape(f"12 words, but attention of shape {shape}")):
        page.attention_page([captioned(attention=np.zeros(shape))], "dog")


def test_caption_without_words_is_a_page_too():
    source = page.attention_page([captioned([], np.zeros((0, 196)), n_best=[("", -1.0)])], "dog")
    assert "The caption has no words." in source
    Elements(source)


def test_page_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "x.html"
    with pytest.raises(ValueError):
        page.write_page(path, [captioned(), captioned(attention=np.zeros((1, 196)))], "dog")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError):
        page.write_page(tmp_path / "missing" / "x.html", [captioned()], "dog")
    page.write_page(str(path), [captioned()], "dog")
    assert path.read_bytes().decode() == page.attention_page([captioned()], "dog")
    assert list(tmp_path.iterdir()) == [path]


def test_names_with_invalid_unicode_are_escaped(tmp_path):
    page.write_page(tmp_path / "x.html", [captioned(name="photos/\udcff\0.jpg")], "\udcff")
    [(_, text)] = Elements((tmp_path / "x.html").read_text(encoding="utf-8")).of("h2")
    assert text == "\\udcff\N{REPLACEMENT CHARACTER}.jpg"


def test_fragment_styles_nothing_but_itself():
    elements = Elements(page.fragment(captioned()))
    assert not {tag for tag, _, _ in elements.all} & {"html", "head", "body", "meta", "h1", "h2"}
    assert not any("id" in attributes for _, attributes, _ in elements.all)
    rules = re.sub(r"/\*.*?\*/", "", elements.of("style")[0][1], flags=re.DOTALL)
    selectors = [
        part
        for found in re.findall(r"([^{};]+)\{", rules)
        for part in found.split(",")
        if not found.strip().startswith("@")
    ]
    assert len(selectors) > 20 and all(".sat" in selector for selector in selectors)


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
            source = page.attention_page(source if isinstance(source, list) else [source], "dogs")
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
        return [element.text for element in self.all(".sat-shown")]

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
    """Row and column of the brightest point, as fractions of height and width."""
    light = picture.sum(2)
    rows, columns = np.nonzero(light >= light.max() - 1)
    return (rows.mean() + 0.5) / light.shape[0], (columns.mean() + 0.5) / light.shape[1]


def test_requests_and_script_errors_of_a_page_are_noticed(browser):
    browser.open("<script>nothing.here</script><img src='file:///missing.png'>")
    found = "\n".join(browser.complaints())
    assert "nothing is not defined" in found and "file:///missing.png" in found


def test_hover_over_a_word_changes_the_picture(browser):
    browser.open(captioned(["dog", "snow"], one_hot((2, 3), (11, 12))))
    plain = browser.picture()
    assert abs(plain - 128).max() < 4 and browser.shown() == []
    dog, snow = browser.all(".sat-word")
    browser.hover(dog)
    on_dog = browser.picture()
    assert browser.shown() == ["dog"] and abs(on_dog - plain).mean() > 50
    browser.hover(snow)
    assert browser.shown() == ["snow"] and abs(browser.picture() - on_dog).max() > 50
    browser.hover(browser.all("h1")[0])
    assert browser.shown() == [] and (browser.picture() == plain).all()


@pytest.mark.parametrize("shape", [(300, 300), (120, 600), (600, 120), (900, 1300)])
def test_the_brightest_point_is_where_the_model_looked_for_any_shape(browser, shape):
    cells = [(2, 11), (9, 4), (0, 0)]
    browser.open(captioned(["one", "two", "three"], one_hot(*cells), shape))
    for word, cell in zip(browser.all(".sat-word"), cells):
        browser.hover(word)
        picture = browser.picture()
        # The photograph keeps its shape.
        assert abs(picture.shape[1] / picture.shape[0] / (shape[1] / shape[0]) - 1) < 0.03
        place = np.array(brightest(picture)) * SIDE - cell  # in cells, within the right one
        assert (abs(place - 0.5) < 0.5).all()
        # 0.72 of 255 is the mean brightness there, 0.18 far away
        assert picture.max() > 0.72 * 255 and abs(np.median(picture) - 0.18 * 255) < 3


@pytest.mark.parametrize("overlay", ["light", "heat"])
@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.0625, -0.03)])
def test_the_overlay_of_the_page_equals_that_of_the_figure(browser, overlay, offset):
    side = 336  # pixels; at this size the figure shows a square photograph as it is
    y, x = np.mgrid[:side, :side] / side
    waves = [(np.sin(12 * x + 5 * y + phase) + 1) * 127 for phase in (0, 1, 4)]
    image = np.stack(waves, axis=-1).astype(np.uint8)
    one = captioned(["dog"], image=image, offset=offset)
    browser.open(page.attention_page([one], "dog", overlay))
    browser.hover(browser.all(".sat-word")[0])
    png = browser.run("return document.querySelector('canvas').toDataURL()").split(",")[1]
    ours = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")) / 255
    figure = attention.attention_grid(
        image, one.words, one.attention, Drawing(True, overlay, offset)
    )
    theirs = np.asarray(figure.axes[1].images[0].get_array())
    assert ours.shape == theirs.shape
    assert abs(ours - theirs).mean() < 0.01 and abs(ours - theirs).max() < 0.06


def test_arrow_keys_move_from_word_to_word(browser):
    words = ["one", "two", "three"]
    browser.open(captioned(words, one_hot((2, 2), (7, 7), (12, 12))))
    browser.press("tab")
    seen = [browser.shown()]
    for key in ("arrow_right", "arrow_right", "arrow_right", "arrow_left", "home", "end"):
        browser.press(key)
        seen.append(browser.shown())
    assert sum(seen, []) == ["one", "two", "three", "three", "two", "one", "three"]
    assert np.allclose(brightest(browser.picture()), 12.5 / SIDE, atol=0.03)
    selected = [word.get_attribute("aria-selected") for word in browser.all(".sat-word")]
    assert selected == ["false", "false", "true"]
    assert "three: most attention at the lower right" in browser.all(".sat-where")[0].text


def test_keys_do_not_scroll_the_page_away(browser):
    browser.open([captioned(["one", "two"])] * 3, height=400)
    browser.press("tab", "end")
    assert browser.shown() == ["two"] and browser.run("return scrollY") == 0


def test_arrow_keys_move_visually_in_right_to_left_text(browser):
    browser.open(captioned(["כלב", "רץ"], one_hot((2, 2), (7, 7))))
    browser.press("tab", "arrow_left")
    assert browser.shown() == ["רץ"]
    browser.press("arrow_right")
    assert browser.shown() == ["כלב"]


def test_tab_visits_each_photograph_once(browser):
    browser.open([captioned(["one", "two"]), captioned(["three", "four"])])
    browser.press("tab", "arrow_right", "tab")
    assert browser.shown() == ["two", "three"]


def test_keys_take_precedence_over_a_resting_mouse(browser):
    browser.open(captioned(["one", "two", "three"]))
    browser.press("tab")
    browser.hover(browser.all(".sat-word")[2])
    assert browser.shown() == ["three"]
    browser.press("arrow_right")
    assert browser.shown() == ["two"]


def test_escape_shows_the_plain_photograph(browser):
    browser.open(captioned(["one", "two"]))
    plain = browser.picture()
    for show in (lambda: browser.hover(browser.all(".sat-word")[1]), lambda: browser.press("tab")):
        show()
        assert len(browser.shown()) == 1 and (browser.picture() != plain).any()
        browser.press("escape")
        assert browser.shown() == [] and (browser.picture() == plain).all()


def test_a_tap_shows_a_word_and_a_second_one_the_photograph(browser):
    browser.open(captioned(["one", "two"]), width=360, height=740, touch=True)
    plain = browser.picture()
    one, two = browser.all(".sat-word")
    browser.tap(one)
    assert browser.shown() == ["one"] and abs(browser.picture() - plain).mean() > 20
    browser.tap(two)
    assert browser.shown() == ["two"]
    browser.tap(two)
    assert browser.shown() == [] and (browser.picture() == plain).all()
    browser.tap(two)
    browser.tap(browser.all(".sat-picture")[0])
    assert browser.shown() == []
    assert min(word.size["height"] for word in (one, two)) >= 32  # pixels, for a finger


def test_scrolling_by_touch_shows_nothing(browser):
    browser.open(captioned(["one", "two"]), width=360, height=740, touch=True)
    finger = browser.actions("touch").move_to_element(browser.all(".sat-word")[0])
    finger.click_and_hold().perform()
    assert browser.shown() == []
    browser.actions("touch").release().perform()


def test_a_clicked_word_stays_selected_when_the_mouse_leaves(browser):
    browser.open(captioned(["one", "two"]))
    browser.all(".sat-word")[1].click()
    browser.hover(browser.all("h1")[0])
    assert browser.shown() == ["two"]


def test_nothing_overflows_sideways_on_a_phone(browser):
    long = ["w" * 90, *"a sentence that goes on and on for many more words than one line".split()]
    one = captioned(
        long,
        name="n" * 200 + ".jpg",
        references=["r" * 200],
        n_best=[("c" * 200, -1234567.0), ("b", -2.0)],
    )
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


def test_text_is_readable_in_light_and_dark(browser):
    backgrounds = []
    for dark in (False, True):
        one = captioned(references=["A dog."], n_best=[("a dog", -1.0), ("dogs", -2.0)])
        browser.open(one, dark=dark)
        browser.all(".sat-word")[2].click()
        for selector in (
            "h1",
            "header p",
            "h2",
            ".sat-word",
            ".sat-shown",
            ".sat-where",
            "summary",
            ".sat-label",
            ".sat-row span",
            ".sat-nats",
        ):
            behind, text = map(luminance, browser.run(COLOURS, browser.all(selector)[0]))
            low, high = sorted((behind, text))
            assert (high + 0.05) / (low + 0.05) >= 4.5, selector
            if selector == "h1":
                backgrounds.append(behind)
    assert backgrounds[0] > 0.9 and backgrounds[1] < 0.05


def test_the_picture_fades_unless_reduced_motion_is_preferred(browser):
    for calm, seconds in ((False, "0.15s"), (True, "0s")):
        browser.open(captioned(), calm=calm)
        assert seconds == browser.run(
            "return getComputedStyle(document.querySelector('canvas')).transitionDuration"
        )


def test_a_screen_reader_finds_the_photograph_and_the_words(browser):
    browser.open(captioned())
    browser.press("tab", "arrow_right")
    nodes = browser.cdp("Accessibility.getFullAXTree")["nodes"]
    found = [
        (node["role"]["value"], node.get("name", {}).get("value"))
        for node in nodes
        if not node["ignored"]
    ]
    assert ("image", SENTENCE) in found and ("article", "dog.jpg") in found
    assert ("listbox", "Words of the caption") in found
    assert [name for role, name in found if role == "option"] == SENTENCE.split()
    assert [
        node["name"]["value"]
        for node in nodes
        if any(p["name"] == "focused" and p["value"]["value"] for p in node.get("properties", ()))
        and node["role"]["value"] == "option"
    ] == ["brown"]


def test_words_and_names_are_never_run_as_script(browser):
    one = captioned(
        NASTY, name=NASTY[3], references=NASTY, n_best=[(" ".join(NASTY), -1.0), (NASTY[4], -2.0)]
    )
    for source in ([one], page.fragment(one)):
        browser.open(source)
        assert [word.text for word in browser.all(".sat-word")] == NASTY
        for word in browser.all(".sat-word"):
            browser.hover(word)
            assert browser.shown() == [word.text]
        assert browser.run("return window.hacked === undefined && document.scripts.length === 1")


def test_only_the_script_of_the_page_may_run(browser):
    browser.open(captioned())
    browser.run(
        "const script = document.createElement('script');"
        "script.textContent = 'window.hacked = 1'; document.body.append(script);"
        "fetch('https://example.invalid/').catch(() => {})"
    )
    assert browser.run("return window.hacked === undefined")
    complaints = browser.complaints()
    assert len(complaints) >= 2 and all("Content Security Policy" in line for line in complaints)


def test_a_caption_without_words_is_shown_with_its_photograph(browser):
    browser.open(captioned([], np.zeros((0, SIDE * SIDE)), n_best=[("", -1.0)]))
    assert abs(browser.picture() - 128).max() < 4 and browser.all(".sat-word") == []


def test_a_word_selected_before_the_photograph_has_loaded_is_shown_later(browser):
    source = page.fragment(captioned(["dog"], one_hot((2, 11))))
    browser.open(
        source.replace('src="data:', 'data-later="data:')
        + "<script>document.querySelector('.sat-word').click()</script>"
    )
    browser.run(
        "const img = document.querySelector('img'); img.src = img.dataset.later;return img.decode()"
    )
    assert browser.shown() == ["dog"]
    assert np.allclose(brightest(browser.picture()), (2.5 / SIDE, 11.5 / SIDE), atol=0.04)


def test_fragments_in_one_notebook_do_not_clash(browser):
    """Inserted as in JupyterLab: by innerHTML, then with each script created again."""
    one = captioned(["one", "two"], one_hot((2, 2), (11, 11)))
    cells = json.dumps([page.fragment(one)] * 3).replace("</", "<\\/")
    browser.open(
        f"""<!DOCTYPE html><p>A notebook</p><script>
        window.listeners = 0;
        const listen = EventTarget.prototype.addEventListener;
        EventTarget.prototype.addEventListener = function (kind, ...rest) {{
          listeners += kind === "pointerover";
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
    assert browser.run("return listeners") == 3  # each script has set up only its own view
    plain = browser.picture()
    browser.hover(browser.all(".sat-word")[3])  # the second word of the second cell
    assert browser.shown() == ["two"]
    assert (browser.picture(0) == plain).all() and (browser.picture(2) == plain).all()
    assert np.allclose(brightest(browser.picture(1)), 11.5 / SIDE, atol=0.04)
    browser.run("document.querySelectorAll('.sat')[2].remove()")
    browser.press("escape")
    assert browser.shown() == []


def test_style_and_script_are_beside_the_module():
    folder = Path(page.__file__).parent
    assert (folder / "page.css").read_text(encoding="utf-8") == page.STYLE
    assert (folder / "page.js").read_text(encoding="utf-8") == page.SCRIPT
