"""What is in a page"""

import base64
import html
import io
import re

import numpy as np
import pytest
from pages import NASTY, SIDE, captioned, document, one_hot
from PIL import Image

from visualization import page
from visualization.overlay import attention_overlays


def texts(source, tag):
    """The texts in all elements of this tag"""
    found = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", source, re.DOTALL)
    return [html.unescape(re.sub("<.*?>", "", text)) for text in found]


def pictures(source, kind):
    """The PIL images of this class, or of this kind of heat map"""
    kind = f'heat" data-kind="{kind}' if kind in ("attention", "evidence") else kind
    pattern = rf'<img class="sat-{kind}" alt="[^"]*" src="data:image/\w+;base64,(.*?)">'
    found = re.findall(pattern, source)
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]


@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.0625, -0.03)])
def test_the_layers_of_the_page_are_those_of_the_figure(offset):
    y, x, phase = np.mgrid[:336, :448, :3]
    image = ((np.sin(x / 28 + y / 67 + phase) + 1) * 127).astype(np.uint8)
    one = captioned(image=image, offset=offset)
    one.evidence = np.random.default_rng(1).dirichlet(np.full(196, 0.3), len(one.words)) / 7
    source = document(one)
    [photograph], [grey] = pictures(source, "photograph"), pictures(source, "grey")
    assert abs(np.asarray(photograph).astype(int) - image).mean() < 3
    for kind in ("attention", "evidence"):
        heats = pictures(source, kind)
        expected = list(attention_overlays(image, one.words, getattr(one, kind), True, offset))
        assert len(heats) == len(expected) == 12
        for heat, picture in zip(heats, expected):
            ours = grey.convert("RGBA")
            ours.alpha_composite(heat.convert("RGBA").resize(ours.size, Image.Resampling.BILINEAR))
            assert abs(np.asarray(ours.convert("RGB")).astype(int) - picture).mean() < 3


def test_large_photographs_are_scaled_down_to_640_pixels_and_a_word_takes_few_bytes():
    for shape, size in [((240, 320), (320, 240)), ((900, 1600), (640, 360)), ((3000, 1), (1, 640))]:
        source = document(captioned(shape=shape))
        assert f"--ratio:{shape[1] / shape[0]:.5f}" in source
        for kind, value in (("photograph", 128), ("grey", 64)):
            [picture] = pictures(source, kind)
            assert picture.size == size and abs(np.asarray(picture).astype(int) - value).max() <= 2
    without = re.sub('data:image/jpeg;[^"]*', "", source)
    assert len(without.encode()) < 80_000


def test_words_names_and_references_are_shown_as_they_are():
    text, references = " ".join(NASTY), [*NASTY, "-->"]
    several = [(text, -1.0), (NASTY[4], -2.0)]
    one = captioned(NASTY, name=f"a/{NASTY[0]}", references=references, n_best=several)
    for source, heading in ((document(one), "h2"), (page.fragment(one), "p")):
        assert texts(source, "button") == NASTY and NASTY[0] in texts(source, heading)
        assert texts(source, "li") == [f"{text} -1.000", f"{NASTY[4]} -2.000", *references]
        assert f'alt="{page.escape(text)}"' in source and "<details>" in source
        assert len(texts(source, "script")) == len(texts(source, "style")) == 1
        assert re.findall(r'tabindex="(.*?)"', source) == ["0", *["-1"] * 8]  # for arrow keys
    assert texts(page.document(NASTY[4], NASTY[3], []), "h1") == [NASTY[4]]
    source = document(captioned())
    assert texts(source, "li") == [] and "log-probability -12.346 nats" in texts(source, "p")
    links = re.findall(r'(?:src|href)="(.*?)"', source)
    assert len(links) == 15 and all(link.startswith("data:") for link in links)
    source = document(captioned([], np.zeros((0, 196)), n_best=[("", -1.0)]))
    assert "The caption has no words." in source and pictures(source, "attention") == []


def test_the_place_of_the_attention_is_described():
    places = {(0, 0): "at the upper left", (13, 7): "at the bottom", (6, 6): "in the centre"}
    expected = [f"most attention {place}, 100 %" for place in places.values()]
    alphas = np.concatenate([one_hot(*places), np.full((1, SIDE * SIDE), 1 / SIDE**2)])
    expected.append("attention spread over the photograph")
    one = captioned(["a", "big", "dog", "runs"], alphas, evidence=None)
    source = page.fragment(one)
    assert re.findall(r' data-attention="(.*?)"', source) == expected
    assert "data-evidence" not in source and "checkbox" not in source
    one.evidence = np.zeros_like(alphas)  # nothing speaks for the words
    one.evidence[0, 195] = 1
    described = re.findall(r'data-evidence="(.*?)"', page.fragment(one))
    assert described == ["most evidence at the lower right, 100 %", *["no evidence"] * 3]


def test_a_page_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "x.html"
    with pytest.raises(ValueError, match="attention of shape"):
        page.write_page(path, [captioned(), captioned(attention=np.zeros((1, 196)))], "dog")
    with pytest.raises(OSError):
        page.write_page(tmp_path / "missing" / "x.html", [captioned()], "dog")
    assert list(tmp_path.iterdir()) == []
    names = [f"photos/{name}.jpg" for name in ("0", "1", "\udcff\0")]
    page.write_page(str(path), (captioned(name=name) for name in names), "photos \udcff")
    source = path.read_text(encoding="utf-8")
    assert texts(source, "h2") == ["0.jpg", "1.jpg", "\\udcff\\x00.jpg"]
    assert texts(source, "h1") == ["photos \\udcff"] and "3 photographs. " in source
    assert len(texts(source, "script")) == 1 and list(tmp_path.iterdir()) == [path]
    assert page.is_page("x.HTM") and not page.is_page("x.png")


def test_fragment_styles_nothing_but_itself():
    source = page.fragment(captioned())
    assert not re.search(r"<(html|head|body|meta|h1|h2)\b|\bid=", source)
    rules = re.sub(r"/\*.*?\*/", "", page.STYLE, flags=re.DOTALL)
    found = re.findall(r"([^{};]+)\{", rules)
    selectors = [part for one in found if "@" not in one for part in one.split(",")]
    assert len(selectors) > 20 and all(".sat" in selector for selector in selectors)
