"""benchmark.py: what it counts, and that it runs; nothing here is timed."""

import copy
import json
import statistics
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from benchmarks import encoder as encoder_stages
from benchmarks import end_to_end, measuring, model, scale
from datasets import CaptionDataset
from modeling.beam_search import beam_search
from models import DecoderWithAttention, Encoder
from training.losses import doubly_stochastic_loss

ROOT = Path(__file__).resolve().parent.parent


def test_flops_of_a_step_equal_the_count_of_torch():
    """
    With one caption per image, where nothing is padded; in float64, since torch does not count
    oneDNN's products.
    """
    captions, lengths = model.random_captions(8, 1)
    decoder = DecoderWithAttention(model.SIZE, model.SIZE, model.SIZE, model.VOCAB).double()
    features = torch.rand(8, model.CELLS, model.ENCODER_DIM).double()
    with FlopCounterMode(display=False) as counter:
        doubly_stochastic_loss(decoder(features, captions, lengths), lengths).backward()
    # torch does not count products with a vector, such as attention's energies.
    energies = 3 * 2 * model.PIXELS * model.SIZE * int((lengths - 1).sum())
    assert model.step_flops(8, lengths) - energies == pytest.approx(
        counter.get_total_flops(), rel=0.03
    )


def test_random_captions_are_as_long_as_cocos():
    captions, lengths = model.random_captions(2000, 5)
    assert lengths.double().mean() == pytest.approx(12.5, abs=0.1)
    assert lengths.double().std() == pytest.approx(2.4, abs=0.1)
    assert torch.equal((captions > 0).sum(2), lengths)


@pytest.mark.parametrize("beam_size", [1, 3, 5])
def test_captions_of_the_benchmark_decoder_are_as_long_as_real_ones(beam_size):
    decoder = model.decoder_with_realistic_lengths(torch.device("cpu"))
    captions = beam_search(
        decoder, torch.rand(60, model.CELLS, model.ENCODER_DIM), model.WORD_MAP, beam_size
    )
    lengths = [len(caption.tokens) for caption in captions]
    assert 9 < statistics.mean(lengths) < 12.5 and statistics.stdev(lengths) > 2
    assert all(caption.finished for caption in captions)


def test_peak_memory_is_that_of_tensors_alive_at_the_same_time():
    def work():
        for _ in range(3):
            a = torch.empty(1000, dtype=torch.float64)
            b = a + 1
            del a
            b.sum()

    # The second round's a and b exist together with the first round's b.
    assert 24000 <= measuring.peak_memory(work, torch.device("cpu")) < 25000


def test_exponent_of_a_square_is_two():
    assert measuring.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


@pytest.fixture
def small(monkeypatch):
    for name, size in (("SIZE", 8), ("ENCODER_DIM", 16), ("VOCAB", 50)):
        monkeypatch.setattr(model, name, size)
    monkeypatch.setattr(model, "WORD_MAP", {"<pad>": 0, "<unk>": 47, "<start>": 48, "<end>": 49})


def test_table_and_json_hold_the_same_rows(small, tmp_path, capsys):
    path = tmp_path / "figures.json"
    benchmark.main(
        ["--stages", "training", "search", "--device", "cpu", "--repeats", "1", "--json", str(path)]
    )
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert len(written["rows"]) == 6 and written["machine"] in printed
    for row in written["rows"]:
        assert row["stage"] in printed and row["ours"] > 0 and row["textbook"] > 0
        assert f"{row['textbook'] / row['ours']:.1f}x" in printed


def test_textbook_and_ours_compute_the_same(small):
    """Otherwise their times could not be compared."""
    torch.manual_seed(0)
    decoder = DecoderWithAttention(8, 8, 8, 50, 16, dropout=0)
    args = benchmark.get_args([])
    args.device = torch.device("cpu")
    textbook, ours, _ = model.training_step(decoder, 4, 5, args)
    textbook()
    expected = [p.grad.clone() for p in decoder.parameters()]
    ours()
    torch.testing.assert_close([p.grad for p in decoder.parameters()], expected)


@pytest.mark.parametrize("fine_tune, cached", [(False, False), (True, False), (False, True)])
def test_epochs_train_the_same_parameters_as_train_py(fine_tune, cached, tmp_path):
    """They train the decoder, and the encoder only if asked to, on every batch."""
    end_to_end.write_data_set(tmp_path, TRAIN=20)
    args = benchmark.get_args([])
    args.device = torch.device("cpu")
    encoder = Encoder(name="resnet18", weights="none")
    encoder.fine_tune(fine_tune)
    data = CaptionDataset(tmp_path, "x", "TRAIN")
    if cached:
        data.use_features(torch.rand(20, model.CELLS, encoder.encoder_dim).half())
    runner = end_to_end.EpochRunner(encoder, data, args, fine_tune, preload=cached)
    before = [copy.deepcopy(model.state_dict()) for model in (encoder, runner.state.decoder)]
    runner.run()
    for model_before, model_after, trained in zip(
        before, (encoder, runner.state.decoder), (fine_tune, True)
    ):
        changed = [
            not torch.equal(model_before[name], weight)
            for name, weight in model_after.state_dict().items()
        ]
        assert any(changed) == trained
    assert {int(state["step"]) for state in runner.state.optimizer.state.values()} == {2}


def test_the_gpu_stage_runs_everything_in_tiny_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "figures.json"
    benchmark.main(["--stages", "gpu", "--device", "cpu", "--repeats", "1", "--json", str(path)])
    rows = {row["stage"]: row for row in json.loads(path.read_text())["rows"]}
    assert [stage for stage in rows if stage.startswith("frozen epoch")] == [
        "frozen epoch of COCO from the cache, batch 10",
        "frozen epoch of COCO from the cache, batch 20",
    ]
    timed = [row for row in rows.values() if "ours" in row]
    assert len(timed) == 5 and all(row["ours"] > 0 for row in timed)
    exact = rows["float32 against float64"]
    assert exact["loss_error"] < 1e-5 and exact["gradient_error"] < 1e-2 and exact["identical"] > 4
    assert rows["bf16 against float64"]["loss_error"] > exact["loss_error"]


def test_the_scale_stage_counts_the_files_of_each_script(tmp_path):
    args = benchmark.get_args(["--device", "cpu"])
    runs = scale.run_scripts(tmp_path, 200, args)
    pixels, features = 200 * 3 * 32 * 32, 200 * 512 * 2  # one cell of ResNet-18 in float16
    created, cached, trained = (size for _, _, size in runs.values())
    assert pixels < created < pixels + 300_000 and features < cached < features + 100_000
    assert trained == 0
    assert all(seconds > 0.1 and memory > 100e6 for seconds, memory, _ in runs.values())


def test_cache_and_captions_of_a_folder_are_rows_of_the_table(monkeypatch, capsys):
    monkeypatch.setitem(benchmark.STAGES, "folder", lambda args: encoder_stages.folder(args, n=30))
    benchmark.main(["--stages", "folder", "--device", "cpu", "--repeats", "1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "30 images" in line]
    assert len(rows) == 2 and all("of the encoder's" in row for row in rows)
