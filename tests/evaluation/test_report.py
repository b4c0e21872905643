"""eval.py --report: the page shows what the table and the results say."""

import json
import re

import pytest
from PIL import Image

from evaluation import report, table
from utils import UserError
from visualization import page


def test_the_report_shows_metrics_with_intervals_and_the_best_worst_and_random_images(
    evaluate, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(report, "IMAGES_PER_SECTION", 3)
    outputs = ["--report", tmp_path / "r.html", "--results", tmp_path / "r.json"]
    evaluate("--beam_sizes", "1", "2", "--bootstrap", "50", *outputs)
    printed = capsys.readouterr().out
    html = (tmp_path / "r.html").read_text()
    _, heading, one, low, high, *_ = printed.splitlines()
    cells = re.findall(r"<td>(.*?)<br><span class=\"sat-quiet\">(.*?)</span>", html)
    columns = len(table.COLUMNS)
    assert len(cells) == 2 * len(heading.split()[1:-columns])  # two beam sizes
    for (value, spread), a, b, c in zip(cells, one.split()[1:], low.split()[1:], high.split()[1:]):
        assert value == a and (spread == f"{b}–{c}" or spread == "" and b == "–")
    assert re.findall(r"<td>([0-9.]+)</td>", html) == one.split()[-columns:] * 2
    assert 'scope="col">CHAIRi<' in html and page.escape(table.OBJECTS[0]) in html
    results = json.loads((tmp_path / "r.json").read_text())
    scores = {row["filename"]: row["scores"]["CIDEr-D"] for row in results}
    shown = re.findall(r'<article[^>]* aria-label="(.*?) · CIDEr-D (.*?)"', html)
    assert len(shown) == 9
    assert all(float(x) == pytest.approx(scores[name], abs=0.0501) for name, x in shown)
    ranked = sorted(scores.values(), reverse=True)
    assert [scores[name] for name, _ in shown[:6]] == ranked[:3] + ranked[:-4:-1]
    assert len({name for name, _ in shown[6:]}) == 3
    # The histogram: 2 to 9 words a caption, and so many a reference
    assert html.count("5 references") == 9 and "captions, 5.5 on average" in html
    lengths = [len(text.split()) for row in results for text in row["references"]]
    assert re.search(rf"references,? {sum(lengths) / len(lengths):.1f}", html)
    shares = [float(x) for x in re.findall(r"<title>\d+ words: (.*?) %</title>", html)]
    for n in range(max(*lengths, 9) + 1):
        expected = [12.5 * (2 <= n <= 9), 100 * lengths.count(n) / len(lengths)]
        assert shares[2 * n : 2 * n + 2] == pytest.approx(expected, abs=0.051)


def test_the_report_shows_the_photographs_themselves_with_image_folder(
    evaluate, tmp_path, data, monkeypatch
):
    path, wide = tmp_path / "r.html", tmp_path / "wide"
    wide.mkdir()
    for picture in (data / "demo").glob("*.png"):
        Image.open(picture).resize((60, 30)).save(wide / picture.name)
    for options, ratio in (([], "1.00000"), (["--image_folder", wide], "2.00000")):
        evaluate("--report", path, "--bootstrap", "5", *options)
        assert set(re.findall("--ratio:([0-9.]+)", path.read_text())) == {ratio}
    with pytest.raises(UserError, match="demo_.*not found; pass the --image_folder"):
        evaluate("--report", path, "--image_folder", tmp_path, by_beam=[None])  # before any work
