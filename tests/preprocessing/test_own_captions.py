"""Captions of one's own, in every format that is recognised."""

import gzip
import json
import unicodedata
from pathlib import Path

import pytest
from factories import karpathy_entry as entry
from factories import refused
from factories import write_karpathy as prepare
from hypothesis import given
from hypothesis import strategies as st

from create_input_files import find_captions, get_args, main
from preprocessing.own_captions import read_captions, read_sentences, split_words
from utils import read_json, write_json

CAPTIONS = [
    ("a.jpg", "A man's dog, running."), ("b.jpg", "Two dogs"),
    ("a.jpg", "A t-shirt | 3 \"dogs\""), ("b.jpg", "Dogs!"),
]  # fmt: skip
LISTS = {"a.jpg": [CAPTIONS[0][1], CAPTIONS[2][1]], "b.jpg": [CAPTIONS[1][1], CAPTIONS[3][1]]}

UNQUOTED = "".join(f"{image},{text}\n" for image, text in CAPTIONS)
FORMATS = {
    "csv": 'image,caption\na.jpg,"A man\'s dog, running."\nb.jpg,Two dogs\n'
    'a.jpg,"A t-shirt | 3 ""dogs"""\nb.jpg,Dogs!\n',
    "kaggle, commas unquoted": f"image,caption\n{UNQUOTED}",
    "columns turned round": '\ufeffText;File_Name\r\n"A man\'s dog, running.";a.jpg\r\n'
    'Two dogs;b.jpg\r\n"A t-shirt | 3 ""dogs""";a.jpg\r\nDogs!;b.jpg\r\n',
    "no header": UNQUOTED,
    "tsv": "file\tsentence\n" + "".join(f"{image}\t{text}\n" for image, text in CAPTIONS),
    "results.csv": "image_name| comment_number| comment\n"
    + "".join(f"{image}| 0| {text}\n" for image, text in CAPTIONS)
    + "b.jpg| 4   A dog runs .\n",
    "tokens": "".join(f"{image}#{i}\t{text}\n" for i, (image, text) in enumerate(CAPTIONS)),
    "json lines": "".join(json.dumps({"image": i, "caption": c}) + "\n" for i, c in CAPTIONS),
    "json lists": json.dumps([{"filename": i, "captions": texts} for i, texts in LISTS.items()]),
    "json mapping": json.dumps(LISTS),
    "coco": json.dumps({
        "images": [{"id": 5, "file_name": "b.jpg"}, {"id": 4, "file_name": "a.jpg"}],
        "annotations": [{"image_id": {"a": 4, "b": 5}[i[0]], "caption": c} for i, c in CAPTIONS],
    }),
}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    """A function: text -> the images that read_captions finds in it"""

    def read(text, **options):
        path = tmp_path / "captions.any"
        path.write_text(text, encoding="utf-8", newline="")
        return read_captions(path, **options)["images"]

    return read


def words(images):
    return {i["filename"]: [" ".join(s["tokens"]) for s in i["sentences"]] for i in images}


def test_every_format_gives_the_same_karpathy_form(read):
    for name, text in FORMATS.items():
        images = read(text, val_fraction=0, test_fraction=0)
        assert list(words(images).items()) == [
            ("a.jpg", ["a man s dog running", "a t shirt 3 dogs"]),
            ("b.jpg", ["two dogs", "dogs"]),
        ], name
        assert images[0]["split"] == "train" and images[1]["imgid"] > 0
        assert images[0].get("cocoid") == (4 if name == "coco" else None)
        assert images[1]["sentences"][1]["raw"] == "Dogs!"


def test_images_not_captions_are_assigned_to_splits_whatever_their_order(read):
    def splits(lines, **options):
        images = read("".join(lines), test_fraction=0.2, **options)
        return {image["filename"]: image["split"] for image in images}

    lines = [f"{i}.jpg,caption {k}\n" for i in range(50) for k in range(3)]
    by_name = splits(lines)
    counts = [list(by_name.values()).count(split) for split in ("train", "val", "test")]
    assert counts == [35, 5, 10]
    assert by_name == splits(lines[::-1]) != splits(lines, seed=1)


def test_unrecognised_captions_are_refused_with_the_line(tmp_path):
    for text, message in [
        ("", "empty"),
        ("some prose\nand more\n", "not recognised; expected"),
        ("picture,words\na.jpg,x\n", "not recognised; expected"),
        ("image,caption\n", "has no captions"),
        ('image,caption\na.jpg,"never closed\nb.jpg,x\n', "quotation mark"),
        ("image,split,caption\na.jpg,val,x\na.jpg,test,x\n", "a.jpg is in val and in test"),
        ("image,split,caption\na.jpg,val,x\nb.jpg,,x\n", "b.jpg has no split"),
        ("image,split,caption\na.jpg,dev,x\n", "a.jpg has split 'dev', not one of train, "),
        ("caption\timage\nx\ta.jpg\ty\n", "line 2 has 3 columns, not 2"),
        ('{"image": "a.jpg", "caption": "x"}\n{"image": }\n', "line 2: broken JSON"),
        ('{"image": "a.jpg"}\n{"image": "b.jpg"}\n', "entry 1 lacks"),
        ('{"image": "a.jpg", "caption": 5}', "entry 1 lacks"),
        ('{"a.jpg": ["x", 5]}', "must be text"),
        ('{"images": [\n{"id": 1,}], "annotations": []}', "line 2: broken JSON"),
        ('{"images": [], "annotations": [{"image_id": 3, "caption": "x"}]}', "COCO's format"),
        ('{"images": [{"filename": "a.jpg"}]}', "--karpathy_json"),
        ("a.jpg#0\tx\nb.jpg\ty\n", "line 2 is not name.jpg#0"),
        ('[{"filename": "a.jpg", "caption": "x", "score": -1, "references": []}]', "eval.py"),
        ("[" * 100_000, "nested too deeply"),
    ]:
        (tmp_path / "captions.any").write_text(text)
        refused(tmp_path / "captions.any", message, load=read_captions)


def test_marks_of_beginning_and_end_are_no_words_and_are_counted(read, tmp_path, capsys):
    marked = [
        "<start> A dog . <end>", "startseq a dog endseq", "<s>A dog.</s>", "<BOS> a dog <EOS> .",
        "[CLS] A dog [SEP]", "<|startoftext|>A dog<|endoftext|>", "'<sos> <sos> a dog <pad> <pad>'",
    ]  # fmt: skip
    plain = {
        "Start of a race to the end": "start of a race to the end",
        "End of a [pad]": "end of a pad",
        "a dog <end> of a line": "a dog end of a line",
        "startseqs": "startseqs",
        "<started>": "started",
    }
    expected = ["a dog"] * len(marked) + [*plain.values()]
    line = f": marks such as <start> and <end> removed from {len(marked)} captions\n"
    assert words(read(json.dumps({"a.jpg": [*marked, *plain]}))) == {"a.jpg": expected}
    assert capsys.readouterr().out == f"{tmp_path / 'captions.any'}{line}"
    (tmp_path / "text").write_text("\n".join([*marked, *plain]))
    assert [" ".join(text) for text in read_sentences([str(tmp_path / "text")])] == expected
    assert capsys.readouterr().out == f"{tmp_path / 'text'}{line}"


def test_words_of_other_scripts_are_not_split():
    assert split_words("“Ein Käse”—हिन्दी, at&t") == ["ein", "käse", "हिन्दी", "at", "t"]
    assert split_words("cafe\u0301") == split_words("caf\u00e9")


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_is_split_as_unicode_is(text):
    separated = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text.lower())
    assert split_words(text) == separated.split()
    assert split_words(text + " é") == [*separated.split(), "é"]


def test_a_cell_may_hold_a_list_of_captions_and_windows_path_and_a_split_is_kept(read):
    for key in ("image_path", "filepath", "path", "name"):
        entry = {key: "a.jpg", "text": "x", "split": "test"}
        assert read(json.dumps(entry))[0]["split"] == "test"
    for cell in ("['A dog runs.', \"A dog's ball\"]", '["A dog runs.", "A dog\'s ball"]'):
        quoted = '"' + cell.replace('"', '""') + '"'
        lines = f"img,split,description\na\\b.jpg,val,{quoted}\nb.jpg,train,[a] dog\n"
        images = read(f"{lines}a\\b.jpg,val,z\n")
        assert [image["split"] for image in images] == ["val", "train"]
        expected = {"a/b.jpg": ["a dog runs", "a dog s ball", "z"], "b.jpg": ["a dog"]}
        assert words(images) == expected


def test_a_text_file_beside_each_picture_is_read(tmp_path):
    refused(tmp_path, ".txt", load=read_captions)
    for name, text in {"a": "A dog.\n\nDogs\n", "b": "A cat", "c": "A cow"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "a.PNG").touch()
    (tmp_path / "b.webp").touch()
    found = {name: len(texts) for name, texts in words(read_captions(tmp_path)["images"]).items()}
    assert found == {"a.PNG": 2, "b.webp": 1, "c.jpg": 1}  # the last one will be reported missing


def test_cocos_two_files_keep_their_splits_when_given_together(tmp_path):
    files = [tmp_path / f"captions_{split}2017.json" for split in ("train", "val")]
    for path in files:
        images = [{"id": i, "file_name": f"{path.stem}{i}.jpg"} for i in range(3)]
        annotations = [{"image_id": i, "caption": "a dog"} for i in range(3)]
        write_json(path, {"images": images, "annotations": annotations})

    def splits(*options):
        sources, _ = find_captions(get_args(["--image_folder", "x", "--captions", *options]))
        return [{image["split"] for image in source["images"]} for source in sources]

    assert splits(*map(str, files)) == [{"train"}, {"val"}]
    assert splits(str(files[1]), "--val_fraction", "0.34") == [{"train", "val"}]


def test_script_makes_the_files_and_warns_of_a_split_without_images(tmp_path, monkeypatch, capsys):
    prepare(tmp_path, [entry(f"{i}.png") for i in range(10)])
    monkeypatch.chdir(tmp_path)

    def script(*options):
        fixed = "x.py --image_folder images --min_word_freq 0 --workers 1 --captions mine.csv"
        monkeypatch.setattr("sys.argv", [*fixed.split(), *options])
        main()

    Path("mine.csv").write_text("".join(f"{i}.png,A dog.\n" for i in range(10)))
    script("--dataset", "mine")
    references = read_json("data/TRAIN_REFERENCES_mine_5_cap_per_img_0_min_word_freq.json")
    assert len(references) == 8 and references[0]["references"] == [["a", "dog"]]
    assert "TRAIN: 8 images, 8 captions, filled up to 40" in capsys.readouterr().out
    Path("mine.csv").write_text("0.png,A dog.\n")
    script()
    warnings = capsys.readouterr().err.splitlines()[:2]
    assert all(line.startswith("warning: mine.csv has no") for line in warnings)
    halves = "--dataset x --val_fraction 0.5 --test_fraction 0.5".split()
    refused("--val_fraction 0.5", "--test_fraction 0.5", load=lambda _: script(*halves))


def test_sentences_are_the_captions_of_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("1\tA dog.\n2\tTwo cats\n1\tthe Dog\n\na line\twith a tab\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"1\tein Hund\nA line, alone\n"))
    sentences = read_sentences([str(tmp_path / "a.txt"), str(tmp_path / "b.txt.gz")])
    assert [" ".join(sentence) for sentence in sentences] == [
        "a dog", "two cats", "the dog", "with a tab", "ein hund", "a line alone"
    ]  # fmt: skip


def test_text_that_cannot_be_read_is_a_line(tmp_path):
    for name, content, message in [
        ("x.txt", None, "not found"),
        ("x.txt.gz", None, "No such file"),
        ("x.txt", b"\n \n", "no captions"),
        ("x.txt", b"a \xff", "is not UTF-8 text"),
        ("x.txt.gz", gzip.compress(b"a \xff", mtime=0), "utf-8"),
        ("x.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-9], "cannot be read"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, message, load=lambda path: read_sentences([str(path)]))
