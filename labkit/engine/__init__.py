"""The engine: tensors only. It knows nothing of HTTP, jobs, files of users or keys.

    machine.py    the number format this machine is quick in, and the form of weights
    int8.py       products with weights and inputs rounded to bytes, for prompts
    packed.py     linear maps with weights in the order in which they are multiplied
    attention.py  of fresh tokens over a past that is constant, or that several prompts share
    model.py      the base model and its tokenizer
    lora.py       an adapter's work over packed weights, in one step forward and one back
    adapter.py    LoRA and activated LoRA through PEFT: make, switch, save, load
    encode.py     examples and prompts -> token ids, and where the adapter starts
    layout.py     prompts in named blocks, and which of them are read or attended over together
    cache.py      keys and values of prompts, computed once, kept on disk
    entries.py    what enters an adapter's first layer, worked out once for each example
    train.py      the training loop, as a generator of metrics
    generate.py   batched inference with log-probabilities
    embed.py      the base model's hidden states as embeddings
"""
