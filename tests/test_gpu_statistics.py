"""Statistics on an NVIDIA GPU are those that the CPU gives, to the rounding of float32. `make test-gpu` runs it."""

import pytest
import torch
from helpers import factor_walks, handmade
from test_analysis_measures import CLOSE, synthetic

from paragen.analysis import measures, stats_files
from paragen.collection import index

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("rank, change, decay", [(2, 1e-3, 0), (8, 1e-6, 0), (64, 1e-3, 3), (64, 1.0, 6)])
def test_a_layer_on_the_gpu_gives_what_float64_on_the_cpu_gives(rank, change, decay):
    a, b = factor_walks.walk(rank, 1536, 576, 30, change, decay)
    found = factor_walks.measured(a, b, "cuda")
    for name, expected in factor_walks.exact(a, b).items():
        apart = (found[name] - expected).abs().max() / expected.abs().max()
        assert apart < CLOSE, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_collection_on_the_gpu_has_the_statistics_it_has_on_the_cpu(tmp_path, dtype):
    entries = synthetic(tmp_path / "x", 20, shape=(8, 320, 192, 8), dtype=dtype, zero=[1])
    config = {"r": 8, "lora_alpha": 16}
    on_cpu = measures.measure(tmp_path / "x", entries, config, "base")
    for chunk in (1, 6 * entries[0].bytes, measures.CHUNK):
        on_gpu = measures.measure(tmp_path / "x", entries, config, "base", torch.device("cuda"), chunk=chunk)
        for name in on_cpu._fields[2:]:
            expected = getattr(on_cpu, name)
            assert (getattr(on_gpu, name) - expected).abs().max() <= 2 * CLOSE * expected.abs().max(), name


def test_without_memory_on_the_gpu_a_collection_is_measured_on_the_cpu(tmp_path, capsys):
    handmade.collect(tmp_path / "saves", None, handmade.CATEGORY, "A")
    ((one,), _) = index.chosen(saves=tmp_path / "saves")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        assert [fault for _, fault in stats_files.make([one], tmp_path / "stats")] == [None]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "is measured on the CPU" in capsys.readouterr().out
