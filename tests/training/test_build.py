"""What training begins with: data, model, features, criterion."""

import json

import factories
import pytest
import torch
from factories import NAME, load_checkpoint, log_rows, resume_args, same, train_args, write_scenes
from PIL import Image

import checkpoints
import train
from caption import Captioner
from datasets import CaptionDataset
from modeling.beam_search import Search
from modeling.devices import Distributed
from modeling.field_of_view import known_offset
from models import DECODERS, DecoderWithAttention
from preprocessing.images import read_image
from training import build
from training.losses import TeacherForcing
from utils import UserError


def test_each_option_reaches_its_criterion(data):
    """Numbers that all differ, so that none can take another's place."""
    images = CaptionDataset(data, NAME, "TRAIN")

    def criterion(options):
        return build.build_criterion(train.get_args(f"--alpha_c 0.5 {options}".split()), images)

    soft = criterion("--evidence_c 0.4")
    assert type(soft) is TeacherForcing and soft.hard_fraction == 0
    assert (soft.alpha_c, soft.evidence_c) == (0.5, 0.4)
    hard = criterion("--attention hard --lambda_r 0.2 --lambda_e 0.3")
    numbers = hard.alpha_c, hard.lambda_r, hard.lambda_e, hard.hard_fraction
    assert numbers == (0.5, 0.2, 0.3, 0.5)
    options = "--self_critical --checkpoint x --samples 3 --cross_entropy_share 0.1"
    critical = criterion(f"{options} --evidence_c 0.4")
    assert critical.alpha_c == 0.5 and critical.sampling == Search(n_best=3, sample=True)
    assert (critical.cross_entropy_share, critical.evidence_c) == (0.1, 0.4)


class Headed(DecoderWithAttention):
    def __init__(self, *args, heads=2, **kwargs):
        super().__init__(*args, **kwargs)
        self.args["heads"] = heads


def test_an_argument_of_ones_own_decoder_goes_to_it_alone(data, tmp_path, monkeypatch):
    monkeypatch.setitem(DECODERS, "headed", Headed)
    monkeypatch.setitem(build.MODEL_OPTIONS, "heads", ("decoder_args", "heads", 2))
    datasets = [CaptionDataset(data, NAME, "VAL")]

    def arguments(attention, heads):
        args = train.get_args(train_args(data, tmp_path, "--attention", attention))
        args.heads = heads
        return build.build_model(args, None, datasets, Distributed(torch.device("cpu")))[1].args

    assert arguments("headed", 5)["heads"] == 5 and "heads" not in arguments("soft", 2)
    pytest.raises(UserError, arguments, "soft", 5).match("--heads is not for --attention soft")


def test_loading_processes_change_nothing_and_cached_features_only_float16(data, tmp_path):
    options = "--cache_in disk --workers 0", "--cache_in disk --workers 2", "--no-cache_features"
    for name in options:
        train.main(train_args(data, tmp_path / name[-1], "--epochs 1", name))
    cached, again, fresh = (load_checkpoint(tmp_path / name)["decoder"] for name in "02s")
    assert same(cached, again) and not same(cached, fresh)
    a, b = (log_rows(tmp_path / name)[0] for name in "0s")
    for key in ("train_loss", "val_loss"):
        assert a[key] == pytest.approx(b[key], rel=1e-3)


def test_single_captions_train_too(data, tmp_path, finished):
    train.main(train_args(data, tmp_path, "--epochs 1 --single_captions --batch_size 30"))
    one, other = log_rows(tmp_path)[0], log_rows(finished)[0]
    assert one["train_loss"] != other["train_loss"]
    assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.2)


def test_pretrained_embeddings_are_used_and_can_stay_fixed(data, tmp_path):
    word_map = json.loads((data / f"WORDMAP_{NAME}.json").read_text())
    glove = tmp_path / "glove.txt"
    glove.write_text("red 1 2 3 4\nnowhere 5 5 5 5\ncircle -1 0 1 0.5\n")
    options = train_args(data, tmp_path, f"--epochs 1 --emb_dim 4 --embeddings {glove}")
    train.main([*options, "--no-fine_tune_embeddings"])
    fixed = load_checkpoint(tmp_path)["decoder"]["embedding.weight"]
    assert fixed.shape == (len(word_map), 4)
    assert fixed[word_map["red"]].tolist() == [1, 2, 3, 4]
    assert fixed[word_map["circle"]].tolist() == [-1, 0, 1, 0.5]
    train.main([*options, "--overwrite"])
    assert not torch.equal(fixed, load_checkpoint(tmp_path)["decoder"]["embedding.weight"])
    with pytest.raises(UserError, match="glove.txt has 4 numbers per word, .* leave --emb_dim"):
        train.main([*options, "--overwrite", "--emb_dim", "8"])


@pytest.fixture(scope="module")
def few_words(tmp_path_factory):
    """The pictures of `data`, of whose words only the frequent ones are kept."""
    folder = tmp_path_factory.mktemp("few_words")
    return write_scenes(folder, 22, 6, 6, image_size=64, min_word_freq=40)


def phase_args(data, folder, checkpoint, *options):
    """A phase, whose model's options come from the checkpoint"""
    phase = f"--data_folder {data} --checkpoint_folder {folder} --checkpoint {checkpoint}"
    return " ".join([phase, "--workers 0 --device cpu --epochs 1", *options]).split()


def test_a_model_of_fewer_words_learns_those_of_its_data(data, few_words, tmp_path, capsys):
    """A word it knew is as probable as before; the new words and <unk> share what <unk> had."""
    train.main(train_args(few_words, tmp_path / "1", "--epochs 3"))
    [before] = (tmp_path / "1").glob("BEST_*")
    train.main(phase_args(data, tmp_path / "2", before, "--decoder_lr 0"))
    (_, old, old_map, _), (_, new, new_map, _) = (
        checkpoints.load_captioner(path, "cpu")
        for path in (before, *(tmp_path / "2").glob("BEST_*"))
    )
    assert new_map == json.loads((data / f"WORDMAP_{NAME}.json").read_text())
    added = new_map.keys() - old_map.keys()
    assert len(added) > 5 and not old_map.keys() - new_map.keys()
    assert f"knows {len(old_map)} words and learns {len(added)} more" in capsys.readouterr().out
    h = torch.randn(9, 32)
    old_p, new_p = old.logits(h).softmax(-1), new.logits(h).softmax(-1)
    for word, i in new_map.items():
        j = old_map.get(word, old_map["<unk>"])
        shares = len(added) + 1 if word in added or word == "<unk>" else 1
        torch.testing.assert_close(new_p[:, i], old_p[:, j] / shares)
        assert torch.equal(new.embedding.weight[i], old.embedding.weight[j])


def test_a_model_of_more_words_keeps_them_also_resumed(data, few_words, tmp_path, best):
    train.main(phase_args(few_words, tmp_path, best))
    [last] = tmp_path.glob("checkpoint_*")
    few = json.loads(next(few_words.glob("WORDMAP_*")).read_text())
    word_map, known = (checkpoints.load(path)["word_map"] for path in (last, best))
    assert word_map.keys() == known.keys() and few.items() <= word_map.items()
    train.main(resume_args(tmp_path, "--epochs 2"))
    assert checkpoints.load(last)["word_map"] == word_map
    with pytest.raises(UserError, match="was trained on other data.* pass their --data_folder"):
        train.main(resume_args(tmp_path, f"--epochs 3 --data_folder {data} --data_name {NAME}"))


def test_image_size_goes_from_the_input_files_to_the_captions(tmp_path):
    folder, other = (
        write_scenes(tmp_path / f"data{size}", 8, 4, 4, image_size=size) for size in (96, 128)
    )
    picture = folder / "demo/demo_00000.png"
    assert (CaptionDataset(folder, NAME, "TRAIN")[[0]].images[0] == read_image(picture, 96)).all()
    train.main(train_args(folder, tmp_path, "--epochs 1 --encoder_stride 16", *factories.ENCODER))
    [best] = tmp_path.glob("BEST_*")
    captioner, seen = Captioner(best), []
    assert captioner.encoder.args["image_size"] == 96 and captioner.encoder.args["stride"] == 16
    captioner.encoder.resnet.register_forward_hook(
        lambda _, images, out: seen.append((images[0].shape, out.shape))
    )
    captioned = captioner(picture)
    assert seen == [((1, 3, 96, 96), (1, 1280, 6, 6))]  # 6 x 6 cells of 16 pixels
    assert captioned.words == captioner(Image.open(picture)).words
    train.main(phase_args(other, other, best))
    encoder = checkpoints.load_captioner(next(other.glob("BEST_*")), "cpu")[0]
    assert encoder.args["image_size"] == 128 and known_offset(encoder) is None
    with pytest.raises(UserError, match="has encoder_stride 16, not 32; leave --encoder_stride"):
        train.main(phase_args(folder, tmp_path / "x", best, "--encoder_stride 32"))


def test_the_offset_of_a_frozen_encoder_alone_is_kept(data, tmp_path, best):
    known = tmp_path / "known.pth.tar"
    checkpoints.main([str(best), str(known)])
    offset = checkpoints.load(known)["offset"]
    assert checkpoints.load(best)["offset"] is None and offset is not None
    for options, expected in (("", offset), ("--fine_tune_encoder --ema 0.5", None)):
        folder = tmp_path / f"run{options[-3:]}"
        train.main(phase_args(data, folder, known, options))
        assert load_checkpoint(folder)["offset"] == expected
        assert load_checkpoint(folder, "BEST_")["offset"] == expected
