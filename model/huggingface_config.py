"""The config.json of Hugging Face for our networks, and our config for one of theirs."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from config import BadInput, Model, all_errors

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def config_json(config: Model, vocab_size: int, end_of_text: int) -> dict[str, Any]:
    """The config.json from which transformers (5, and 4 since it knows the family) builds exactly our network.

    Raises BadInput for a shape that transformers refuses.
    """
    common = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": vocab_size,
        "bos_token_id": end_of_text,  # our documents begin with it, ...
        "eos_token_id": end_of_text,  # ... so the model also learns to end with it
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": "float32",
        "torch_dtype": "float32",  # its name before transformers 4.56
    }
    if config.family == "gpt2":
        return common | {
            "n_layer": config.n_layers,
            "n_embd": config.d_model,
            "n_head": config.n_heads,
            "n_inner": config.hidden_width,
            "n_positions": config.context_length,
            "n_ctx": config.context_length,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "summary_first_dropout": 0.0,
        }
    return common | {
        "num_hidden_layers": config.n_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.hidden_width,
        "max_position_embeddings": config.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # where it was before transformers 5
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({"mlp_bias": False} if config.family == "llama" else {"use_sliding_window": False, "sliding_window": None}),
    }


def model_from_config_json(content: dict[str, Any], place: str = "config.json") -> tuple[Model, int]:
    """Our config and the vocabulary size of the network that a config.json describes.

    What is left out has transformers' defaults. Raises BadInput for what our families cannot express.
    """
    family = content.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise BadInput(f"{place}: model_type is {family!r}; only {', '.join(ARCHITECTURES)} can be read")
    try:
        refuse_what_differs(content, family, place)
        if family == "gpt2":
            shape = {
                "n_layers": content["n_layer"],
                "d_model": content["n_embd"],
                "n_heads": content["n_head"],
                "d_ff": content.get("n_inner") or 4 * content["n_embd"],
                "context_length": content["n_positions"],
                "norm_eps": content.get("layer_norm_epsilon", 1e-5),
            }
        else:
            shape = {
                "n_layers": content["num_hidden_layers"],
                "d_model": content["hidden_size"],
                "n_heads": content["num_attention_heads"],
                "n_kv_heads": content.get("num_key_value_heads", 32 if family == "qwen3" else None),
                "head_dim": content.get("head_dim", 128 if family == "qwen3" else None),
                "d_ff": content["intermediate_size"],
                "context_length": content["max_position_embeddings"],
                "norm_eps": content.get("rms_norm_eps", 1e-6),
                "rope_theta": rope_of(content).get("rope_theta", content.get("rope_theta", 10000.0)),
            }
        if shape.get("head_dim") and shape["head_dim"] * shape["n_heads"] == shape["d_model"]:
            shape["head_dim"] = None  # what it would be anyway
        if shape.get("n_kv_heads") == shape["n_heads"]:
            shape["n_kv_heads"] = None
        tied = content.get("tie_word_embeddings", family == "gpt2")
        vocab_size = content["vocab_size"]
        if type(vocab_size) is not int or vocab_size < 1:
            raise BadInput(f"{place}: vocab_size is {vocab_size!r}; it must be a whole number above 0")
        return Model(family=family, tie_embeddings=tied, **shape), vocab_size
    except KeyError as problem:
        raise BadInput(f"{place} lacks {problem}, which transformers writes; get the file again") from None
    except ValidationError as problem:
        raise BadInput(f"{place} describes a network that cannot be built: {all_errors(problem)}") from None
    except TypeError as problem:
        raise BadInput(f"{place} describes a network that cannot be built: {problem}") from None


def refuse_what_differs(content: dict[str, Any], family: str, place: str) -> None:
    """Raise BadInput if config.json asks for something that would give other logits than our network's."""
    rope = rope_of(content)
    activations = ("gelu_new", "gelu_pytorch_tanh") if family == "gpt2" else ("silu",)
    activation = "activation_function" if family == "gpt2" else "hidden_act"
    refused = {
        "architectures": content.get("architectures") not in (None, [ARCHITECTURES[family]]),
        activation: content.get(activation, activations[0]) not in activations,
        "quantization_config": content.get("quantization_config") is not None,
        "auto_map": content.get("auto_map") is not None,  # code of its own
        "scale_attn_weights": content.get("scale_attn_weights", True) is not True,
        "scale_attn_by_inverse_layer_idx": bool(content.get("scale_attn_by_inverse_layer_idx")),
        "add_cross_attention": bool(content.get("add_cross_attention")),
        "attention_bias": bool(content.get("attention_bias")),
        "mlp_bias": bool(content.get("mlp_bias")),
        "rope_parameters": rope.get("rope_type", rope.get("type", "default")) != "default"
        or set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"} != set()
        or rope.get("partial_rotary_factor", 1.0) != 1.0,
        "partial_rotary_factor": content.get("partial_rotary_factor", 1.0) != 1.0,
        "use_sliding_window": bool(content.get("use_sliding_window")),
        "layer_types": not set(map(str, content.get("layer_types") or [])) <= {"full_attention"},
    }
    found = [name for name, differs in refused.items() if differs]
    if found:
        said = "; ".join(f"{name} = {rope if name == 'rope_parameters' else content.get(name)!r}" for name in found)
        raise BadInput(f"{place}: {said}: our {family} has no such thing; choose another model")


def rope_of(content: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary positions, under the name of transformers 5 or of 4."""
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    return rope if isinstance(rope, dict) else {"rope_type": rope}
