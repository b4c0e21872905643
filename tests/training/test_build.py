"""What training begins with: data, model, features, criterion."""

import json

import h5py
import pytest
import torch
from factories import NAME, load_checkpoint, log_rows, same, train_args
from PIL import Image

import checkpoints
import eval
import train
from caption import Captioner
from datasets import CaptionDataset
from modeling.beam_search import Search
from modeling.devices import Distributed
from modeling.field_of_view import find_offset, known_offset
from models import DECODERS, DecoderWithAttention
from preprocessing.demo import make_demo
from preprocessing.images import read_image
from preprocessing.input_files import create_input_files
from training import build
from training.build import build_criterion
from training.losses import TeacherForcing
from utils import UserError


def test_each_option_reaches_its_criterion(data):
    """Numbers that all differ, so that none can take another's place."""
    images = CaptionDataset(data, NAME, "TRAIN")

    def criterion(*options):
        return build_criterion(train.get_args(["--alpha_c", "0.5", *options]), images)

    soft = criterion()
    assert type(soft) is TeacherForcing and soft.alpha_c == 0.5
    hard = criterion("--attention", "hard", "--lambda_r", "0.2", "--lambda_e", "0.3")
    assert {"alpha_c": 0.5, "lambda_r": 0.2, "lambda_e": 0.3, "hard_fraction": 0.5}.items() <= vars(
        hard
    ).items()
    critical = criterion("--self_critical", "--checkpoint", "x", "--samples", "3")
    assert critical.alpha_c == 0.5 and critical.sampling == Search(n_best=3, sample=True)


class Headed(DecoderWithAttention):
    def __init__(self, *args, heads=2, **kwargs):
        super().__init__(*args, **kwargs)
        self.args["heads"] = heads


def test_an_argument_of_ones_own_decoder_goes_to_it_alone(data, tmp_path, monkeypatch):
    monkeypatch.setitem(DECODERS, "headed", Headed)
    monkeypatch.setitem(build.MODEL_OPTIONS, "heads", ("decoder_args", "heads", 2))

    def arguments(attention, heads):
        args = train.get_args(train_args(data, tmp_path, "--attention", attention))
        args.heads = heads
        datasets = [CaptionDataset(data, NAME, split) for split in ("TRAIN", "VAL")]
        return build.build_model(args, None, datasets, Distributed(torch.device("cpu")))[1].args

    assert arguments("headed", 5)["heads"] == 5
    assert "heads" not in arguments("soft", 2)
    with pytest.raises(UserError, match="--heads is not for --attention soft"):
        arguments("soft", 5)


def test_the_number_of_loading_processes_changes_nothing(data, tmp_path):
    for workers in "02":
        train.main(
            train_args(
                data,
                tmp_path / workers,
                "--epochs",
                "1",
                "--workers",
                workers,
                "--cache_in",
                "disk",
            )
        )
    assert same(*(load_checkpoint(tmp_path / workers)["decoder"] for workers in "02"))


def test_cached_features_train_like_fresh_ones_up_to_float16(data, tmp_path):
    for name in ("--cache_features", "--no-cache_features"):
        train.main(train_args(data, tmp_path / name, "--epochs", "1", name))
    a, b = (log_rows(tmp_path / name)[0] for name in ("--cache_features", "--no-cache_features"))
    for key in ("train_loss", "val_loss"):
        assert a[key] == pytest.approx(b[key], rel=1e-3)
    assert not same(
        load_checkpoint(tmp_path / "--cache_features")["decoder"],
        load_checkpoint(tmp_path / "--no-cache_features")["decoder"],
    )


def test_single_captions_train_too(data, tmp_path):
    train.main(
        train_args(data, tmp_path, "--epochs", "1", "--single_captions", "--batch_size", "16")
    )
    train.main(train_args(data, tmp_path / "by_image", "--epochs", "1", "--batch_size", "16"))
    one, other = log_rows(tmp_path)[0], log_rows(tmp_path / "by_image")[0]
    assert one["train_loss"] != other["train_loss"]
    assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.2)


def test_pretrained_embeddings_are_used_and_can_stay_fixed(data, tmp_path):
    word_map = json.loads((data / f"WORDMAP_{NAME}.json").read_text())
    glove = tmp_path / "glove.txt"
    glove.write_text("red 1 2 3 4\nnowhere 5 5 5 5\ncircle -1 0 1 0.5\n")
    common = train_args(data, tmp_path, "--epochs", "1", "--embeddings", str(glove))
    common.remove("--emb_dim")
    common.remove("8")
    train.main([*common, "--no-fine_tune_embeddings"])
    fixed = load_checkpoint(tmp_path)["decoder"]["embedding.weight"]
    assert fixed.shape == (len(word_map), 4)
    assert fixed[word_map["red"]].tolist() == [1, 2, 3, 4]
    assert fixed[word_map["circle"]].tolist() == [-1, 0, 1, 0.5]
    train.main([*common, "--overwrite"])
    tuned = load_checkpoint(tmp_path)["decoder"]["embedding.weight"]
    assert not torch.equal(fixed, tuned)


@pytest.fixture(scope="module")
def few_words(tmp_path_factory):
    """The pictures of `data`, of whose words only the frequent ones are kept."""
    folder = tmp_path_factory.mktemp("few_words")
    create_input_files(
        "few",
        make_demo(folder / "demo", 22, 6, 6),
        folder / "demo",
        min_word_freq=40,
        output_folder=folder,
        workers=1,
    )
    return folder


def test_a_model_of_fewer_words_learns_those_of_its_data(data, few_words, tmp_path, capsys):
    """
    With a learning rate of 0: each word that it knew is as probable as before, and the new words
    and <unk> share what <unk> had.
    """
    first, second = tmp_path / "first", tmp_path / "second"
    train.main(train_args(few_words, first, "--epochs", "3"))
    [before] = first.glob("BEST_*")
    train.main(
        [
            "--data_folder",
            str(data),
            "--checkpoint_folder",
            str(second),
            "--checkpoint",
            str(before),
            "--epochs",
            "1",
            "--decoder_lr",
            "0",
            "--workers",
            "0",
        ]
    )
    (_, old, old_map, _), (_, new, new_map, _) = (
        checkpoints.load_captioner(path, "cpu") for path in (before, *second.glob("BEST_*"))
    )
    assert new_map == json.loads((data / f"WORDMAP_{NAME}.json").read_text())
    added = new_map.keys() - old_map.keys()
    assert len(added) > 5 and not old_map.keys() - new_map.keys()
    assert f"knows {len(old_map)} words and learns {len(added)} more" in capsys.readouterr().out
    h = torch.randn(9, 32)
    old_p, new_p = old.logits(h).softmax(-1), new.logits(h).softmax(-1)
    for word, i in new_map.items():
        expected = old_p[:, old_map.get(word, old_map["<unk>"])]
        if word in added or word == "<unk>":
            expected = expected / (len(added) + 1)
        torch.testing.assert_close(new_p[:, i], expected)
        assert torch.equal(
            new.embedding.weight[i], old.embedding.weight[old_map.get(word, old_map["<unk>"])]
        )


def test_a_model_of_more_words_keeps_them_and_its_run_can_be_resumed(data, few_words, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train.main(train_args(data, first, "--epochs", "1"))
    train.main(
        [
            "--data_folder",
            str(few_words),
            "--checkpoint_folder",
            str(second),
            "--checkpoint",
            str(first / f"BEST_checkpoint_{NAME}.pth.tar"),
            "--epochs",
            "1",
            "--workers",
            "0",
        ]
    )
    [last] = second.glob("checkpoint_*")
    few = json.loads(next(few_words.glob("WORDMAP_*")).read_text())
    every = json.loads((data / f"WORDMAP_{NAME}.json").read_text())
    word_map = checkpoints.load(last)["word_map"]
    assert word_map.keys() == every.keys() and few.items() <= word_map.items()
    train.main(["--checkpoint_folder", str(second), "--resume", "--epochs", "2"])
    assert checkpoints.load(last)["word_map"] == word_map
    with pytest.raises(UserError, match="was trained on other data: .* pass their --data_folder"):
        train.main(
            [
                "--checkpoint_folder",
                str(second),
                "--resume",
                "--epochs",
                "3",
                "--data_folder",
                str(data),
                "--data_name",
                NAME,
            ]
        )


def test_image_size_goes_from_the_input_files_to_the_captions(tmp_path, capsys):
    folder = tmp_path / "small"
    create_input_files(
        "small",
        make_demo(folder / "demo", 8, 4, 4),
        folder / "demo",
        min_word_freq=0,
        output_folder=folder,
        workers=1,
        image_size=96,
    )
    picture = folder / "demo/demo_00000.png"
    with h5py.File(next(folder.glob("TRAIN_IMAGES_*"))) as file:
        assert file["images"].shape == (8, 3, 96, 96)
        assert (file["images"][0] == read_image(picture, 96)).all()
    train.main(train_args(folder, tmp_path, "--epochs", "1", "--encoder_stride", "16"))
    [best] = tmp_path.glob("BEST_*")
    captioner = Captioner(best)
    assert captioner.encoder.args["image_size"] == 96 and captioner.encoder.args["stride"] == 16
    seen = []
    captioner.encoder.resnet.register_forward_hook(
        lambda _, images, out: seen.append((images[0].shape, out.shape))
    )
    captioned = captioner(picture)
    assert seen == [((1, 3, 96, 96), (1, 1280, 6, 6))]  # 6 x 6 cells of 16 pixels
    assert captioned.words == captioner(Image.open(picture)).words
    eval.main(
        ["--data_folder", str(folder), "--model", str(best), "--beam_sizes", "1", "--workers", "0"]
    )
    assert "4 test images" in capsys.readouterr().out
    other = tmp_path / "other_size"
    create_input_files(
        "other",
        make_demo(other / "demo", 8, 4, 4),
        other / "demo",
        min_word_freq=0,
        output_folder=other,
        workers=1,
        image_size=128,
    )
    train.main(
        [
            "--data_folder",
            str(other),
            "--checkpoint",
            str(best),
            "--epochs",
            "1",
            "--workers",
            "0",
            "--device",
            "cpu",
            "--checkpoint_folder",
            str(other),
        ]
    )
    encoder = checkpoints.load_captioner(next(other.glob("BEST_*")), "cpu")[0]
    assert encoder.args["image_size"] == 128 and known_offset(encoder) is None
    assert find_offset(encoder) != find_offset(captioner.encoder)
    with pytest.raises(UserError, match="has encoder_stride 16, not 32; leave --encoder_stride"):
        train.main(
            [
                "--data_folder",
                str(folder),
                "--checkpoint",
                str(best),
                "--encoder_stride",
                "32",
                "--checkpoint_folder",
                str(tmp_path / "other"),
            ]
        )


def test_training_keeps_the_offset_of_a_frozen_encoder_and_stores_none_of_a_trained_one(
    data, tmp_path
):
    pytest.importorskip("torch.utils.tensorboard")  # its pictures need the offset of each epoch
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    last, known = tmp_path / f"checkpoint_{NAME}.pth.tar", str(tmp_path / "known.pth.tar")
    checkpoints.main([str(last), known])
    offset = checkpoints.load(known)["offset"]

    def offsets(folder, *options):
        paths = ["--data_folder", str(data), "--checkpoint_folder", str(tmp_path / folder)]
        train.main([*paths, "--checkpoint", known, "--epochs", "2", "--workers", "0", *options])
        return [load_checkpoint(tmp_path / folder, prefix)["offset"] for prefix in ("", "BEST_")]

    assert load_checkpoint(tmp_path)["offset"] is None and offset is not None
    assert offsets("frozen") == [offset, offset]
    assert offsets("trained", "--fine_tune_encoder", "--ema", "0.5", "--tensorboard") == [
        None,
        None,
    ]
