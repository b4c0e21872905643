"""Which images the arguments stand for, and where their overlays are written."""

import pytest

from utils import UserError
from visualization import files
from visualization.files import find_images, overlay_paths


def test_no_two_overlays_share_a_file_and_none_is_an_image():
    paths = ["a/x.jpg", "b/x.jpg", "b/x.png"]
    assert overlay_paths(paths, None, False) == [
        "a/x_attention.png",
        "b/x_attention.png",
        "b/x_2_attention.png",
    ]
    assert overlay_paths(paths, "out", False) == [
        "out/x_attention.png",
        "out/x_2_attention.png",
        "out/x_3_attention.png",
    ]
    both = ["x.jpg", "x_attention.png"]
    assert not set(both) & set(overlay_paths(both, None, False))


def test_folders_and_globs_stand_for_their_images_in_order_each_once(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "a_attention.png", "c[1].gif"):
        (tmp_path / name).touch()
    (tmp_path / "d.png").mkdir()
    images = [str(tmp_path / name) for name in ("a.JPG", "b.png", "c[1].gif")]
    assert find_images([str(tmp_path)]) == images
    assert find_images([str(tmp_path / "*.png")]) == images[1:2]
    assert find_images([images[2], str(tmp_path), "missing.jpg"]) == [
        images[2],
        *images[:2],
        "missing.jpg",
    ]
    overlay = str(tmp_path / "a_attention.png")
    assert find_images([images[0], overlay]) == images[:1]
    assert find_images([overlay]) == [overlay]  # asked for by name, and nothing else


def test_unsupported_suffixes_are_refused_before_the_work():
    for name in ("x.html", "x.GIF", "x.mp4", "x.png", "x.svg", "x"):
        files.check_suffix(name)
    with pytest.raises(ValueError, match="Format 'abc' is not supported"):
        files.check_suffix("x.abc")


def test_an_error_of_writing_is_a_user_error_that_names_the_file(tmp_path):
    with pytest.raises(UserError, match="none/x cannot be written: .*No such file"):
        with files.writing("none/x"):
            open(tmp_path / "none" / "x", "w")
    with files.writing(str(tmp_path / "new" / "x"), make_folder=True):
        (tmp_path / "new" / "x").touch()
