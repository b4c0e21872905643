"""hubconf.py: the model in one line, from any folder, beside foreign modules of our names."""

import shutil
import subprocess
import sys

import pytest
from factories import ROOT

from checkpoints import PRETRAINED

ONE_LINE = f"""if True:
    import torch
    captioner = torch.hub.load({str(ROOT)!r}, "show_attend_tell", source="local")
    captioned = captioner({str(ROOT / "docs" / "photo.jpg")!r})
    captioned.save("photo.html"), captioned.save("photo.png"), captioned.save("photo.gif")
    print(captioned.text)
"""


def run(code, folder):
    """What this code prints in a new Python in the folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("foreign", [(), ("datasets", "utils", "models", "evaluation", "caption")])
def test_the_model_loads_in_one_line_beside_foreign_modules_of_our_names(tmp_path, foreign):
    before = after = ""
    for name in foreign:
        (tmp_path / f"{name}.py").write_text("THEIRS = True\n")
        before += f"import {name}\n"
        after += f"assert {name}.THEIRS and sys.modules[{name!r}].THEIRS\n"
    code = f"import sys\n{before}exec({ONE_LINE!r})\n{after}print('foreign modules are theirs')"
    text, last = run(code, tmp_path)[-2:]
    assert len(text.split()) > 3 and last == "foreign modules are theirs"
    assert {"photo.html", "photo.png", "photo.gif"} <= {p.name for p in tmp_path.iterdir()}


def test_foreign_modules_that_are_imported_later_are_theirs_and_a_second_load_works(tmp_path):
    for name in ("utils", "datasets", "models"):
        (tmp_path / f"{name}.py").write_text("THEIRS = True\n")
    load = f"exec({ONE_LINE!r})\n"
    *_, first, theirs, second = run(
        f"{load}import utils, datasets, models\n"
        f"print(utils.THEIRS and datasets.THEIRS and models.THEIRS)\n{load}",
        tmp_path,
    )
    assert theirs == "True" and first == second


def test_a_checkpoint_of_ones_own_loads_by_its_path(tmp_path):
    code = f"""if True:
        import torch
        captioner = torch.hub.load({str(ROOT)!r}, "show_attend_tell", "own.pth.tar",
                                   source="local", device="cpu")
        print(captioner({str(ROOT / "docs" / "photo.jpg")!r}).text)
    """
    shutil.copy(PRETRAINED, tmp_path / "own.pth.tar")
    *_, own = run(code, tmp_path)
    assert own == run(ONE_LINE, tmp_path)[-1]
    with pytest.raises(AssertionError, match="gone.pth.tar not found"):
        run(code.replace("own.pth", "gone.pth"), tmp_path)


def test_the_parts_load_alone_trained_or_new(tmp_path):
    code = f"""if True:
        import torch
        def load(entry, **options):
            return torch.hub.load({str(ROOT)!r}, entry, source="local", **options)
        encoder, decoder, word_map = map(load, ("encoder", "decoder", "word_map"))
        features = encoder(torch.zeros(1, 3, 320, 320, dtype=torch.uint8))
        print(tuple(features.shape), decoder.fc.out_features, len(word_map))
        new = load("encoder", pretrained=False, name="squeezenet1_1")
        small = load("decoder", pretrained=False, decoder_dim=8, encoder_dim=new.encoder_dim)
        print(new.encoder_dim, small.fc.weight.shape)
    """
    first, second = run(code, tmp_path)[-2:]
    assert first == "(1, 196, 1280) 3530 3530" and second == "512 torch.Size([3530, 8])"
