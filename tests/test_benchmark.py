"""benchmark.py: what it counts, and that it runs; nothing here is timed."""

import json
import statistics

import pytest
import torch

import benchmark
from benchmarks import measuring, model, scripts
from modeling.beam_search import beam_search
from models import DecoderWithAttention

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    for name, size in (("SIZE", 8), ("ENCODER_DIM", 16), ("VOCAB", 50)):
        monkeypatch.setattr(model, name, size)
    monkeypatch.setattr(model, "WORD_MAP", {"<pad>": 0, "<unk>": 47, "<start>": 48, "<end>": 49})


def run_stages(tmp_path, *stages):
    """The rows that a run writes; they are those that it prints, which the caller can read."""
    path = tmp_path / "figures.json"
    options = ["--device", "cpu", "--repeats", "1", "--json", str(path)]
    benchmark.main(["--stages", *stages, *options])
    return json.loads(path.read_text())["rows"]


def test_random_captions_are_as_long_as_cocos():
    captions, lengths = model.random_captions(2000, 5)
    assert lengths.double().mean() == pytest.approx(12.5, abs=0.1)
    assert lengths.double().std() == pytest.approx(2.4, abs=0.1)
    assert torch.equal((captions > 0).sum(2), lengths)


def test_captions_of_the_benchmark_decoder_are_as_long_as_real_ones():
    decoder = model.decoder_with_realistic_lengths(CPU)
    features = torch.rand(30, model.CELLS, model.ENCODER_DIM)
    for beam_size in (1, 5):
        captions = beam_search(decoder, features, model.WORD_MAP, beam_size)
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
    assert 24000 <= measuring.peak_memory(work, CPU) < 25000


def test_table_and_json_hold_the_same_rows(small, monkeypatch, tmp_path, capsys):
    for name, stage in (
        ("search", lambda args: model.search(args, 12, 6)),
        ("folder", lambda args: scripts.folder(args, n=2)),
        ("files", lambda args: scripts.files(args, 5, 20)),
        ("fine_tuning", lambda args: scripts.fine_tuning(args, 64, 2)),
    ):
        monkeypatch.setitem(benchmark.STAGES, name, stage)
    rows = run_stages(tmp_path, "training", "search", "fine_tuning", "folder", "files")
    printed = capsys.readouterr().out
    assert len(rows) == 12
    for i, row in enumerate(rows):
        assert row["stage"] in printed and row["ours"] > 0
        if i < 8:
            assert f"{row['textbook'] / row['ours']:.1f}x" in printed
            assert min(row["textbook"], row["ours_bytes"], row["textbook_bytes"]) > 0
    assert all(row["identical"] == 6 for row in rows[3:6])
    starts = "captions of a folder", "its cache", "preprocessing 5 photo", "opening 100 captions"
    assert all(row["stage"].startswith(start) for row, start in zip(rows[8:], starts))
    assert "images/s" in rows[10]["note"]


def test_steps_of_textbook_and_ours_train_alike(small):
    """Otherwise their times could not be compared."""
    torch.manual_seed(0)
    decoder = DecoderWithAttention(8, 8, 8, 50, 16, dropout=0)
    batch, found = model.random_batch(4, 5, CPU), []
    for version in (model.plain(decoder), decoder):
        before = decoder.fc.weight.clone()
        model.make_step(version, batch, lr=1e-9)()
        found.append([p.grad.clone() for p in decoder.parameters()])
        assert not torch.equal(decoder.fc.weight, before)
    torch.testing.assert_close(*found)


def test_the_gpu_stage_runs_everything_in_tiny_on_a_cpu(small, monkeypatch, tmp_path):
    monkeypatch.setattr(model, "ENCODER_DIM", 2048)
    rows = {row["stage"]: row for row in run_stages(tmp_path, "gpu")}
    assert len(rows) == 21 and "fine-tuning step of 5 captions, bf16" in rows
    for stage, row in rows.items():
        if "float64" not in stage:
            assert min(row["ours"], row.get("textbook", 1), row.get("ours_bytes", 1)) > 0
    step = rows["step of 10 captions, TF32"]
    assert step["epoch"] == pytest.approx(step["ours"] * 113_287 / 2)
    exact = rows["float32 against float64 on the CPU"]
    assert 0 < exact["error"] < 1e-4 and exact["identical"] > 4
    assert rows["bf16 against float64 on the CPU"]["error"] > 10 * exact["error"]
