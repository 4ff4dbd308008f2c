"""Every architecture of models/models.yaml as a random model of two layers, with the real classes and layer names.

    python tests/helpers/tiny_models.py FOLDER [NAME ...]     makes FOLDER/<name>/ for each, of NAMES (default) or KIN

Import it for the table; building happens in a process of its own, so that the importing one stays fork-safe.
"""

import sys
from pathlib import Path
from typing import NamedTuple


class Architecture(NamedTuple):
    template: str
    lora_target: str
    image_token: str | None = None  # with one, the model has a processor


# By the short names of models/models.yaml; those that share an architecture and a template stand here once.
NAMES = {
    "bert": Architecture("bert", "query,key,value,intermediate.dense,output.dense"),
    "gpt2": Architecture("gpt2", "c_attn,c_proj,c_fc"),
    "llama-7b": Architecture("llama2", "all"),
    "smollm2-135m": Architecture("smollm2", "all"),
    "mistral-7b": Architecture("mistral", "all"),
    "qwen2.5-0.5b": Architecture("qwen", "all"),
    "gemma-3-4b": Architecture("gemma3", "all", "<image_soft_token>"),
    "qwen2.5-vl-3b": Architecture("qwen2_vl", "all", "<|image_pad|>"),
}
# Text-only kin of models of the table, for tests that want no processor.
KIN = {"gemma-3-text": Architecture("gemma", "all")}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**TEXT, "num_key_value_heads": 1}
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(special: list[str], **named: str):
    """A byte-level BPE tokenizer without merges: the special tokens come first, then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def word_piece():
    """BERT's: WordPiece over single characters, cased, with [CLS], [SEP] and [PAD] and neither bos nor eos."""
    from transformers import BertTokenizer

    characters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *("##" + char for char in characters)]
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, do_lower_case=False)


def tokenizer_of(name: str):
    """The tokenizer of a tiny model, with the special tokens that the real one has for its template."""
    from transformers import GPT2Tokenizer

    if name == "bert":
        return word_piece()
    if name == "gpt2":
        return GPT2Tokenizer(vocab=byte_level(CHATML[:1]).get_vocab(), merges=[])
    if name in ("llama-7b", "mistral-7b"):
        marks = ["[INST]", "[/INST]"] if name == "mistral-7b" else []
        return byte_level(["<unk>", "<s>", "</s>", *marks], unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    if name in ("gemma-3-4b", "gemma-3-text"):
        pictures = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *pictures.values()]
        base = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
        return byte_level(special, **base, extra_special_tokens=pictures)
    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    special = [*CHATML, *(vision if name == "qwen2.5-vl-3b" else [])]
    return byte_level(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def make(name: str, folder: Path) -> None:
    """Write the tiny model of a short name with its tokenizer, and a processor where the real one has one."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    known = NAMES.get(name) or KIN[name]
    tokenizer = tokenizer_of(name)
    words = {"vocab_size": len(tokenizer)}
    if name == "bert":
        config = hf.BertConfig(**words, **TEXT, is_decoder=True, max_position_embeddings=128, pad_token_id=0)
    elif name == "gpt2":
        config = hf.GPT2Config(**words, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0)
    elif name == "llama-7b":
        config = hf.LlamaConfig(**words, **TEXT)
    elif name == "smollm2-135m":
        config = hf.LlamaConfig(**words, **GROUPED, tie_word_embeddings=True, pad_token_id=0, eos_token_id=2)
    elif name == "mistral-7b":
        config = hf.MistralConfig(**words, **GROUPED)
    elif name == "qwen2.5-0.5b":
        config = hf.Qwen2Config(**words, **GROUPED, tie_word_embeddings=True)
    elif name == "gemma-3-text":
        config = gemma3_config(tokenizer).text_config
    else:
        config = (gemma3_config if name == "gemma-3-4b" else qwen2_5_vl_config)(tokenizer)
    auto = hf.AutoModelForImageTextToText if known.image_token else hf.AutoModelForCausalLM
    model = auto.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)  # as drawn, they say the same whatever is read; what is tested must show
    model.save_pretrained(folder)
    (processor_of(name, tokenizer) if known.image_token else tokenizer).save_pretrained(folder)


def gemma3_config(tokenizer):
    """Gemma 3 as gemma-3-4b-it comes: text with local and global layers, SigLIP vision tower, projector."""
    from transformers import Gemma3Config

    ids = tokenizer.convert_tokens_to_ids
    layers = ["sliding_attention", "full_attention"]
    text = {**GROUPED, "vocab_size": len(tokenizer), "head_dim": 16, "sliding_window": 16, "layer_types": layers}
    return Gemma3Config(
        text_config={**text, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
        vision_config={**TEXT, "image_size": 56, "patch_size": 14},
        mm_tokens_per_image=4,
        boi_token_index=ids(tokenizer.boi_token),
        eoi_token_index=ids(tokenizer.eoi_token),
        image_token_index=ids(tokenizer.image_token),
    )


def qwen2_5_vl_config(tokenizer):
    """Qwen2.5-VL: text with three-part rotary positions, a vision tower with window and full attention, a merger."""
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    tokens = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    tokens |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return Qwen2_5_VLConfig(
        text_config={**GROUPED, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={**vision, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
        tie_word_embeddings=True,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in tokens.items()},
    )


def processor_of(name: str, tokenizer):
    """The processor of a tiny model that reads pictures."""
    import transformers as hf

    if name == "gemma-3-4b":
        pictures = hf.Gemma3ImageProcessor(size={"height": 56, "width": 56})
        return hf.Gemma3Processor(image_processor=pictures, tokenizer=tokenizer, image_seq_length=4)
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    pictures = hf.Qwen2VLImageProcessor(size=pixels)
    videos = hf.Qwen2VLVideoProcessor(size=pixels)
    return hf.Qwen2_5_VLProcessor(image_processor=pictures, tokenizer=tokenizer, video_processor=videos)


if __name__ == "__main__":
    for wanted in sys.argv[2:] or NAMES:
        make(wanted, Path(sys.argv[1], wanted))
