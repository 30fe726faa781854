"""Tiny models of transformers with random weights, in their own words: ids, masks, attention."""

import copy
from typing import Any

import torch
import transformers as hf
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from tests.models import Problem, cast, normal

LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 4}
ENCODER = {**LAYERS, "intermediate_size": 5, "vocab_size": 9, "max_position_embeddings": 8}
DECODER = {**ENCODER, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
PADDED = {**DECODER, "pad_token_id": 0}
DISTILLED = {"dim": 4, "n_layers": 1, "n_heads": 2, "hidden_dim": 5, "vocab_size": 9}
GENERATIVE = {"vocab_size": 9, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 2}
BOTH = {"vocab_size": 9, "d_model": 4, "d_kv": 2, "d_ff": 5, "num_layers": 1, "num_heads": 2}
IMAGES = {**LAYERS, "intermediate_size": 5, "image_size": 4, "patch_size": 2}


def of(model: str, config: str, sizes: dict[str, int], **more: Any):
    """What builds a model, given how it should attend."""
    return lambda **attention: getattr(hf, model)(getattr(hf, config)(**sizes, **more, **attention))


MODELS: dict[str, Any] = {
    "BERT": of("BertForSequenceClassification", "BertConfig", ENCODER, num_labels=3),
    "RoBERTa": of("RobertaForSequenceClassification", "RobertaConfig", ENCODER, num_labels=3),
    "ALBERT": of(
        "AlbertForSequenceClassification", "AlbertConfig", ENCODER, num_labels=3, embedding_size=3
    ),
    "DistilBERT": of(
        "DistilBertForSequenceClassification", "DistilBertConfig", DISTILLED, num_labels=3
    ),
    "GPT-2": of("GPT2LMHeadModel", "GPT2Config", GENERATIVE, bos_token_id=1, eos_token_id=2),
    "Llama": of("LlamaForCausalLM", "LlamaConfig", PADDED),
    "Qwen2": of("Qwen2ForCausalLM", "Qwen2Config", PADDED),
    "Mistral": of("MistralForCausalLM", "MistralConfig", PADDED),
    "Gemma": of("GemmaForCausalLM", "GemmaConfig", PADDED, head_dim=4),
    "T5": of(
        "T5ForConditionalGeneration",
        "T5Config",
        BOTH,
        decoder_start_token_id=0,
        initializer_factor=0.1,
    ),
    "ViT": of("ViTForImageClassification", "ViTConfig", IMAGES, num_labels=3),
}


class Exact(TorchFunctionMode):
    """Casts to float32 become casts to float64: the function that a model rounds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Ids of sentences of two lengths, with their mask; or images."""
    if name == "ViT":
        return {"pixel_values": normal(3, 3, 4, 4)}
    ids, mask = torch.randint(3, 9, (3, 4)), torch.ones(3, 4, dtype=torch.long)
    ids[1, 2:], mask[1, 2:] = 1 if name == "RoBERTa" else 0, 0
    if name == "T5":
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :2]}
    return {"input_ids": ids, "attention_mask": mask}


def language_problem(net: nn.Module, name: str, dtype: torch.dtype) -> Problem:
    """A regression of the logits, those of the last word of a decoder."""
    net = copy.deepcopy(net).to(dtype).eval()
    params = {key: p.detach() for key, p in net.named_parameters() if p.requires_grad}

    def model_fn(p, x):
        logits = functional_call(net, p, (), x).logits
        return logits[:, -1] if logits.ndim == 3 else logits

    X = cast(inputs(name), dtype)
    with torch.no_grad():
        outputs = model_fn(params, X)
    shift = torch.arange(outputs.numel()).sin().reshape(outputs.shape)
    return Problem(model_fn, params, X, outputs + shift.to(dtype), nn.MSELoss())
