"""eval.py --report: the page shows what the table and the results say."""

import json
import re

import pytest
from factories import NAME
from PIL import Image

import eval as eval_script
from datasets import CaptionDataset
from evaluation import report, table
from utils import UserError
from visualization import page


def test_the_report_shows_metrics_with_intervals_and_the_best_worst_and_random_images(
    stub_options, tmp_path, capsys, data, no_java, monkeypatch
):
    monkeypatch.setattr(report, "IMAGES_PER_SECTION", 3)
    options = [*stub_options, "--beam_sizes", "1", "2", "--bootstrap", "50"]
    eval_script.main(
        [*options, "--report", str(tmp_path / "r.html"), "--results", str(tmp_path / "r.json")]
    )
    printed = capsys.readouterr().out
    html = (tmp_path / "r.html").read_text()
    _, heading, one, low, high, *_ = printed.splitlines()
    names = heading.replace("ROUGE-L", "ROUGE_L").split()[1:-1]  # the last is attention
    cells = re.findall(r"<td>(.*?)<br><span class=\"sat-quiet\">(.*?)</span>", html)
    assert len(cells) == 2 * len(names)
    for (value, spread), a, b, c in zip(cells, one.split()[1:], low.split()[1:], high.split()[1:]):
        assert value == a and (spread == f"{b}–{c}" or spread == "" and b == "–")
    accuracies = [line.split()[-4:] for line in printed.splitlines() if re.match("   [12] ", line)]
    shown = re.findall(r"<td>([0-9.% ]+)</td>\s*</tr>", html)
    assert [cell.split() for cell in shown] == accuracies
    assert len(accuracies) == 2 and 'scope="col">attention<' in html
    assert page.escape(table.ATTENTION) in html
    scores = {
        row["filename"]: row["scores"]["CIDEr-D"]
        for row in json.loads((tmp_path / "r.json").read_text())
    }
    shown = re.findall(r'<article[^>]* aria-label="(.*?) · CIDEr-D (.*?)"', html)
    assert len(shown) == 9 and all(
        float(x) == pytest.approx(scores[name], abs=0.0501) for name, x in shown
    )
    ranked = sorted(scores.values(), reverse=True)
    assert [scores[name] for name, _ in shown[:6]] == ranked[:3] + ranked[:-4:-1]
    assert len({name for name, _ in shown[6:]}) == 3
    assert html.count("5 references") == 9 and "captions, 5.5 on average" in html  # 2 to 9 words
    assert html.count("<title>") == 1 + 2 * max(
        10,
        1
        + max(
            len(words)
            for i in range(8)
            for words in CaptionDataset(data, NAME, "TEST").entry(i)["references"]
        ),
    )


def test_the_report_shows_the_photographs_themselves_with_image_folder(
    stub_options, tmp_path, data, no_java, monkeypatch
):
    path = str(tmp_path / "r.html")
    eval_script.main([*stub_options, "--report", path, "--bootstrap", "5"])
    assert set(re.findall("--ratio:([0-9.]+)", (tmp_path / "r.html").read_text())) == {"1.00000"}
    (tmp_path / "wide").mkdir()
    for picture in (data / "demo").glob("*.png"):
        Image.open(picture).resize((60, 30)).save(tmp_path / "wide" / picture.name)
    eval_script.main(
        [
            *stub_options,
            "--report",
            path,
            "--bootstrap",
            "5",
            "--image_folder",
            str(tmp_path / "wide"),
        ]
    )
    assert set(re.findall("--ratio:([0-9.]+)", (tmp_path / "r.html").read_text())) == {"2.00000"}
    monkeypatch.setattr(eval_script, "caption_split", None)  # the error comes before any work
    with pytest.raises(UserError, match="demo_.*not found; pass the --image_folder of create_inpu"):
        eval_script.main([*stub_options, "--report", path, "--image_folder", str(tmp_path)])
    with pytest.raises(UserError, match="--report r.txt: the report is a web page"):
        eval_script.main([*stub_options, "--report", "r.txt"])
    with pytest.raises(UserError, match="--report .* is a folder"):
        eval_script.main([*stub_options, "--report", str(tmp_path)])
