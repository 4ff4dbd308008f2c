"""What the process that others are forked from imports first, and has in memory for all of them.

Beside LLaMA-Factory these are modules that libraries import only when they are first used: without this, each forked
process would import them anew. What was imported is then made cheap to fork, in three ways:

- It is frozen: a forked process's garbage collector would visit all of it several times in a training, which takes a
  second and copies the memory.
- It is moved to huge pages, where the system has them: a fork copies a table of all pages, and its end deletes it.
- What libraries do at the end of a process is dropped where they have only been imported: it takes 60 ms.
"""

import atexit
import ctypes
import gc
import importlib
import io
import os
import re
import sys
import weakref
from pathlib import Path

HUGE_PAGE, MADV_COLLAPSE = 2 << 20, 25  # of Linux on x86-64; since Linux 6.1


def move_to_huge_pages() -> None:
    """Have the kernel gather this process's own memory in huge pages; where it cannot, all stays as it is."""
    if not sys.platform.startswith("linux"):
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        if own := re.fullmatch(r"(\w+)-(\w+) rw\S+ \w+ \S+ 0\s*(?:\[heap\])?", line):
            first, end = -(-int(own[1], 16) // HUGE_PAGE), int(own[2], 16) // HUGE_PAGE
            for number in range(first, end):
                advise(number * HUGE_PAGE, HUGE_PAGE, MADV_COLLAPSE)


def forget_what_is_done_at_the_end() -> None:
    """Take back what torch and Ray registered for the end of a process when they were imported.

    Ray is still shut down by a process that started it.
    """
    import ray
    from ray._private.worker import shutdown
    from torch._dynamo.utils import dump_compile_times

    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False
    for function in (dump_compile_times, shutdown):
        atexit.unregister(function)
    atexit.register(lambda: ray.is_initialized() and shutdown(True))


os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].partition(os.pathsep)[2]  # see fork_server.ready
sys.dont_write_bytecode = True  # see conftest

IS_GPU = bool(os.environ.get("TEST_GPU"))  # LLaMA-Factory asks a GPU when imported; who has asked cannot be forked

for name in () if IS_GPU else (
    "llamafactory.train.tuner", "llamafactory.train.sft.workflow", "matplotlib.backends.backend_agg",
    "matplotlib.pyplot", "peft", "safetensors.torch", "torchdata.stateful_dataloader", "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PpmImagePlugin", "PIL.PngImagePlugin",
    "torch.utils.serialization.config", "transformers.models.llama.modeling_llama", "fsspec.implementations.cached",
):  # fmt: skip
    importlib.import_module(name)


def use_once() -> None:
    """Do what takes longer the first time: a picture reads the fonts, a model's weights the list of renamed ones.

    LLaMA-Factory looks a model up in lists of classes, which imports a module for each of their architectures.
    """
    from matplotlib import pyplot
    from transformers import AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForTextToWaveform
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for kind in (AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForTextToWaveform):
        list(kind._model_mapping.keys())
    get_checkpoint_conversion_mapping("llama")
    pyplot.title("loss")
    pyplot.savefig(io.BytesIO(), format="png")
    pyplot.close("all")


if not IS_GPU:
    use_once()
forget_what_is_done_at_the_end()
gc.collect()
gc.freeze()
move_to_huge_pages()
