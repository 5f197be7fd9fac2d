"""The same model under the names of transformers' Llama, which has our architecture once its biases are turned on."""

from typing import Any

import torch

from src.params import ModelConfig


def llama_settings(config: ModelConfig) -> dict[str, Any]:
    """The fields of a transformers.LlamaConfig of this shape. Llama has no dropout where ours is."""
    return {
        "vocab_size": config.n_vocab,
        "hidden_size": config.n_embd,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_ctx,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    }


def llama_tensors(ours: dict[str, torch.Tensor], n_layer: int) -> dict[str, torch.Tensor]:
    """An LLM's state dict under the names of LlamaForCausalLM; the tensors are views of ours."""
    theirs = {"model.embed_tokens.weight": ours["embedding.weight"], "model.norm.weight": ours["norm.weight"]}
    theirs["lm_head.weight"] = ours["embedding.weight"]
    for layer in range(n_layer):
        here, there = f"blocks.{layer}.", f"model.layers.{layer}."
        theirs[there + "input_layernorm.weight"] = ours[here + "attn_norm.weight"]
        theirs[there + "post_attention_layernorm.weight"] = ours[here + "ffn_norm.weight"]
        for kind in ("weight", "bias"):
            qkv = ours[f"{here}attn.qkv_proj.{kind}"].chunk(3)
            for name, part in zip("qkv", qkv, strict=True):
                theirs[f"{there}self_attn.{name}_proj.{kind}"] = part
            value, gate = ours[f"{here}ffn.in_proj.{kind}"].chunk(2)
            theirs[f"{there}self_attn.o_proj.{kind}"] = ours[f"{here}attn.out_proj.{kind}"]
            theirs[f"{there}mlp.up_proj.{kind}"] = value
            theirs[f"{there}mlp.gate_proj.{kind}"] = gate
            theirs[f"{there}mlp.down_proj.{kind}"] = ours[f"{here}ffn.out_proj.{kind}"]
    return theirs
