"""Which images the arguments stand for, and where their overlays are written."""

import os

import numpy as np
import pytest
from matplotlib.figure import Figure
from pages import captioned

from utils import UserError
from visualization.captioned import Captioned
from visualization.files import find_images, overlay_paths, writing


def test_no_two_overlays_share_a_file_and_none_is_an_image():
    paths = ["a/x.jpg", "b/x.jpg", "b/x.png", "https://example.org/y.jpg?z"]
    expected = [f"{stem}_attention.png" for stem in ("a/x", "b/x", "b/x_2", "y")]
    assert overlay_paths(paths, None, False) == expected
    expected = [f"out/{stem}_attention.png" for stem in ("x", "x_2", "x_3")]
    assert overlay_paths(paths[:3], "out", False) == expected
    both = ["x.jpg", "x_attention.png"]
    assert not set(both) & set(overlay_paths(both, None, False))


def test_a_single_image_may_have_any_file_of_a_known_format(tmp_path):
    for name in ("x.html", "x.GIF", "x.mp4", "x.png", "x.svg"):
        assert overlay_paths(["photo.jpg"], name, True) == [name]
    for folder in ("x", "x.gif/", "a.b/.x", str(tmp_path)):  # also one that does not exist yet
        path = os.path.join(folder, "photo_attention.png")
        assert overlay_paths(["photo.jpg"], folder, True) == [path]
    for paths, out, single, match in [
        (["photo.jpg"], "x.abc", True, "x.abc cannot be written"),
        (["photo.jpg"], "./photo.jpg", True, "photo.jpg is the image itself"),
        (["a.jpg", "b.jpg"], "x.gif", False, "x.gif is one file, but there are 2 images"),
        (["a.jpg", "b.jpg"], __file__, False, "is one file"),
    ]:
        with pytest.raises(UserError, match=match):
            overlay_paths(paths, out, single)


def test_folders_and_globs_stand_for_their_images_in_order_each_once(tmp_path, capsys):
    for name in ("b.png", "a.JPG", "notes.txt", "a_attention.png", "c[1].gif"):
        (tmp_path / name).touch()
    (tmp_path / "d.png").mkdir()
    images = [str(tmp_path / name) for name in ("a.JPG", "b.png", "c[1].gif")]
    assert find_images([str(tmp_path)]) == images
    assert "1 files are not images" in capsys.readouterr().err
    assert find_images([str(tmp_path / "*.png")]) == images[1:2]
    assert find_images([str(tmp_path / "**" / "*.gif")]) == images[2:]
    given = [images[2], str(tmp_path), "missing.jpg", "https://x.org/[1]*.jpg"]
    assert find_images(given) == [images[2], *images[:2], *given[2:]]
    overlay = str(tmp_path / "a_attention.png")
    assert find_images([images[0], overlay]) == images[:1]
    assert find_images([overlay]) == [overlay]  # asked for by name, and nothing else
    for pattern in ("d.png", "*.txt", "*.bmp"):
        with pytest.raises(UserError, match=f"no images in .*{pattern[-4:]}"):
            find_images([str(tmp_path / pattern)])


def test_attention_is_saved_in_the_format_of_the_suffix(tmp_path):
    fields = {"text": "a", "shown": np.eye(4)[:1], "offset": (0.1, 0.0)}
    one = captioned(["a"], np.eye(4)[:1], **fields, figure=lambda smooth: Figure())
    starts = {"x.html": b"<!DOCTYPE", "x.gif": b"GIF89a", "x.JPG": b"\xff\xd8", "x": b"\x89PNG"}
    for name, start in starts.items():
        Captioned.save(one, str(tmp_path / name))
        assert (tmp_path / name).read_bytes().startswith(start)
    one.offset = (0.0, 0.0)
    Captioned.save(one, tmp_path / "centred.gif")
    assert (tmp_path / "centred.gif").read_bytes() != (tmp_path / "x.gif").read_bytes()
    with pytest.raises(ValueError, match="abc"):
        Captioned.save(one, tmp_path / "x.abc")


def test_an_error_of_writing_is_a_user_error_that_names_the_file(tmp_path):
    with writing(str(tmp_path / "new" / "x")):
        (tmp_path / "new" / "x").touch()
    with pytest.raises(UserError, match="new/x/y cannot be written: .*"):
        with writing(str(tmp_path / "new" / "x" / "y")):
            pass
