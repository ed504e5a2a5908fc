"""Tiny random models, made on the spot: the same code path as the real one, in milliseconds."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

CONTEXT = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """Write a random two-layer model of one architecture and a byte-level tokenizer into `folder`."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    text = ["From: someone Subject: the game tonight was a good game, baseball or hockey? ###"] * 4
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bare.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    if kind == "llama":  # the others get labkit's plain template
        tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(kind, len(tokenizer)), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shrink(model: Path, folder: Path) -> Path:
    """Write a random two-layer Llama with the tokenizer of the model in `model`, and its context, into `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    real = AutoConfig.from_pretrained(model)
    config = _config("llama", len(tokenizer))
    for name in ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(real, name))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(kind: str, vocabulary: int) -> PreTrainedConfig:
    # Larger random weights than usual: a model this narrow could hardly move its predictions otherwise.
    common = {"initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        return GPT2Config(vocab_size=vocabulary, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, **common)
    if kind == "gpt_neo":
        return GPTNeoConfig(
            vocab_size=vocabulary, max_position_embeddings=CONTEXT, hidden_size=32, num_layers=2, num_heads=4,
            attention_types=[[["global", "local"], 1]], window_size=24, **common,
        )
    return LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=CONTEXT, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **common,
    )
