"""The FLOPs by which utilisation is counted are those that torch counts in a model's forward and backward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ernie_dist.spec.shape import ModelShape

LENGTH = 64
CONFIG = {
    "model_type": "ernie4_5",
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,  # heads x head_dim is twice the hidden size, as in the 0.3B
}


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token_are_those_that_torch_counts(tied: bool):
    values = {**CONFIG, "tie_word_embeddings": tied}
    # Eager attention multiplies whole [T, T] matrices, the masked half among them: the full-attention convention.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), attn_implementation="eager")
    tokens = torch.randint(0, CONFIG["vocab_size"], (2, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False).logits.sum().backward()
    by_operation = counter.get_flop_counts()["Global"]
    counted = sum(by_operation.values()) / tokens.numel()
    shape = ModelShape.from_config(values)
    assert counted == shape.flops_per_token(LENGTH)
    # Of its batched products, all of them attention's, the causal convention leaves out half: what the mask hides.
    attention = by_operation[torch.ops.aten.bmm] / tokens.numel()
    skipped = shape.flops_per_token(LENGTH) - shape.flops_per_token(LENGTH, causal=True)
    assert skipped == attention / 2
