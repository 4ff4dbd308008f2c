"""What the process that others are forked from imports first, and has in memory for all of them.

Beside LLaMA-Factory these are modules that libraries import only when they are first used: without this, each forked
process would import them anew. What was imported is then frozen: a forked process's garbage collector would visit all
of it several times in a training, which takes a second and copies the memory.
"""

import gc
import importlib
import os

os.environ.pop("PYTHONPATH")  # see fork_server.ready

for name in (
    "llamafactory.train.tuner", "llamafactory.train.sft.workflow", "matplotlib.backends.backend_agg",
    "matplotlib.pyplot", "peft", "safetensors.torch", "torchdata.stateful_dataloader", "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PpmImagePlugin", "PIL.PngImagePlugin",
    "torch.utils.serialization.config", "transformers.models.llama.modeling_llama", "fsspec.implementations.cached",
):  # fmt: skip
    importlib.import_module(name)

from transformers import AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForTextToWaveform  # noqa: E402

# LLaMA-Factory looks a model up in these, which imports a module for each of their architectures.
for kind in (AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForTextToWaveform):
    list(kind._model_mapping.keys())

gc.collect()
gc.freeze()
