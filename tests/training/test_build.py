"""What training begins with: data, model, features, criterion."""

import json

import pytest
import torch
from factories import NAME, load_checkpoint, log_rows, same, train_args

import train
from datasets import CaptionDataset
from training.build import build_criterion
from training.losses import TeacherForcing


def test_each_option_reaches_its_criterion(data):
    """Numbers that all differ, so that none can take another's place."""
    images = CaptionDataset(data, NAME, "TRAIN")

    def criterion(*options):
        return build_criterion(train.get_args(["--alpha_c", "0.5", *options]), images)

    soft = criterion()
    assert type(soft) is TeacherForcing and soft.alpha_c == 0.5
    hard = criterion("--attention", "hard", "--lambda_r", "0.2", "--lambda_e", "0.3")
    assert {"alpha_c": 0.5, "lambda_r": 0.2, "lambda_e": 0.3,
            "hard_fraction": 0.5}.items() <= vars(hard).items()
    critical = criterion("--self_critical", "--checkpoint", "x", "--samples", "3")
    assert {"alpha_c": 0.5, "samples": 3, "max_len": 50}.items() <= vars(critical).items()


def test_the_number_of_loading_processes_changes_nothing(data, tmp_path):
    for workers in "02":
        train.main(train_args(data, tmp_path / workers, "--epochs", "1", "--workers", workers,
                              "--cache_in", "disk"))
    assert same(*(load_checkpoint(tmp_path / workers)["decoder"] for workers in "02"))


def test_cached_features_train_like_fresh_ones_up_to_float16(data, tmp_path):
    for name in ("--cache_features", "--no-cache_features"):
        train.main(train_args(data, tmp_path / name, "--epochs", "1", name))
    a, b = (log_rows(tmp_path / name)[0] for name in ("--cache_features", "--no-cache_features"))
    for key in ("train_loss", "val_loss"):
        assert a[key] == pytest.approx(b[key], rel=1e-3)
    assert not same(load_checkpoint(tmp_path / "--cache_features")["decoder"],
                    load_checkpoint(tmp_path / "--no-cache_features")["decoder"])


def test_single_captions_train_too(data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "1", "--single_captions",
                          "--batch_size", "16"))
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
