"""Statistics on an NVIDIA GPU are those that the CPU gives, to the rounding of float32. `make test-gpu` runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import factor_walks, handmade
from test_analysis_measures import CLOSE, synthetic

from paragen.analysis import measures

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

ROOT = Path(__file__).resolve().parent.parent


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


WITHOUT_MEMORY = """
import sys
from pathlib import Path
import torch
from paragen.analysis import stats_files
from paragen.collection import index
torch.cuda.set_per_process_memory_fraction(1e-6)
saves, stats = map(Path, sys.argv[1:])
assert [fault for _, fault in stats_files.make(index.chosen(saves=saves)[0], stats)] == [None]
"""


def test_without_memory_on_the_gpu_a_collection_is_measured_on_the_cpu(tmp_path):
    """In a process of its own: what other tests left in PyTorch's cache of memory would be enough."""
    handmade.collect(tmp_path / "saves", None, handmade.CATEGORY, "A")
    command = [sys.executable, "-c", WITHOUT_MEMORY, tmp_path / "saves", tmp_path / "stats"]
    path = os.pathsep.join(filter(None, (str(ROOT / "utils"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0 and "is measured on the CPU" in done.stdout, done.stdout + done.stderr
