"""A model that trains in milliseconds, and recipes for it. `python tests/helpers/tiny.py FOLDER` makes the model."""

import sys

RECIPE = """### model
model_name_or_path: ../../../models/{model}   # tiny
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
### dataset
dataset: Toy
dataset_dir: ../../../data
template: qwen
cutoff_len: 64
max_samples: 48
### output
output_dir: ../../../saves/common-sense-reasoning/Toy/{model}_lora-rank_4_{phase}
logging_steps: 5
plot_loss: true
### train
gradient_accumulation_steps: 2
learning_rate: 5e-3
lr_scheduler_type: cosine
bf16: true
"""
PRETRAIN = """per_device_train_batch_size: 2
max_steps: 8
save_steps: 4
"""
FINETUNE = """per_device_train_batch_size: 1
resume_from_checkpoint: ../../../saves/common-sense-reasoning/Toy/{model}_lora-rank_4_pretrain/checkpoint-4
max_steps: 12
save_steps: 1
save_total_limit: 6
save_only_model: true
"""


def make(folder: str, dtype: str = "float32") -> None:
    """Write a random two-layer Llama (hidden size 32) and a byte-level tokenizer with ChatML's tokens to `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["system user assistant"], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    wrapped.save_pretrained(folder)


if __name__ == "__main__":
    make(*sys.argv[1:])
