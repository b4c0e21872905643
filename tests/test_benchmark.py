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
    monkeypatch.setitem(benchmark.STAGES, "search", lambda args: model.search(args, 12, 6))
    rows, printed = run_stages(tmp_path, "training", "search"), capsys.readouterr().out
    assert len(rows) == 6
    for row in rows:
        assert row["stage"] in printed and row["ours"] > 0 and row["textbook"] > 0
        assert f"{row['textbook'] / row['ours']:.1f}x" in printed
        assert row["ours_bytes"] > 0 and row["textbook_bytes"] > 0
    assert all(row["identical"] == 6 for row in rows[3:])


def test_textbook_and_ours_compute_the_same_and_an_update_trains(small):
    """Otherwise their times could not be compared."""
    torch.manual_seed(0)
    decoder = DecoderWithAttention(8, 8, 8, 50, 16, dropout=0)
    batch, found = model.random_batch(4, 5, CPU), []
    for version in (model.plain(decoder), decoder):
        model.make_step(version, batch)()
        found.append([p.grad.clone() for p in decoder.parameters()])
    torch.testing.assert_close(*found)
    before = decoder.fc.weight.clone()
    model.make_step(decoder, batch, lr=1e-3)()
    assert not torch.equal(decoder.fc.weight, before)


def test_the_gpu_stage_runs_everything_in_tiny_on_a_cpu(small, monkeypatch, tmp_path):
    monkeypatch.setattr(model, "ENCODER_DIM", 2048)
    rows = {row["stage"]: row for row in run_stages(tmp_path, "gpu")}
    for name in ("TF32", "bf16"):
        for stage in (
            *(f"step of {n} captions" for n in (5, 10, 20)),
            "self-critical step of 5 samples",
            "fine-tuning step of 5 captions",
            *(f"beam search, {name}, beam {k}, 4 images" for k in (1, 3, 5)),
        ):
            row = rows[stage if name in stage else f"{stage}, {name}"]
            assert min(row["ours"], row["textbook"], row["ours_bytes"]) > 0
    step = rows["step of 10 captions, TF32"]
    assert step["epoch"] == pytest.approx(step["ours"] * 113_287 / 2)
    exact = rows["float32 against float64 on the CPU"]
    assert 0 < exact["error"] < 1e-4 and exact["identical"] > 4
    assert rows["bf16 against float64 on the CPU"]["error"] > 10 * exact["error"]


def test_stages_of_files_and_scripts_are_rows_of_the_table(monkeypatch, tmp_path, small):
    monkeypatch.setitem(benchmark.STAGES, "folder", lambda args: scripts.folder(args, n=2))
    monkeypatch.setitem(benchmark.STAGES, "files", lambda args: scripts.files(args, 5, 20))
    rows = run_stages(tmp_path, "folder", "files")
    assert [row["stage"].partition(",")[0].partition(";")[0] for row in rows] == [
        "captions of a folder",
        "its cache",
        "preprocessing 5 photographs",
        "opening 100 captions",
    ]
    assert all(row["ours"] > 0 for row in rows) and "images/s" in rows[2]["note"]
