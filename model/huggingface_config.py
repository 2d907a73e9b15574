"""The config.json of Hugging Face for our networks, and our config for one of theirs."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from config import BadInput, Model, all_errors

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Our name of every size, and theirs.
SIZES = {
    "gpt2": {
        "n_layers": "n_layer",
        "d_model": "n_embd",
        "n_heads": "n_head",
        "d_ff": "n_inner",
        "context_length": "n_positions",
        "norm_eps": "layer_norm_epsilon",
    },
    "llama": {
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "d_ff": "intermediate_size",
        "context_length": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
    },
}
SIZES["qwen3"] = SIZES["llama"]

# What transformers takes for what a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "llama": {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
}
DEFAULTS["qwen3"] = DEFAULTS["llama"] | {"num_key_value_heads": 32, "head_dim": 128}

# What could be another network than ours: the values that are not, of which the first is written.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "add_cross_attention": (False, None),
    },
    "llama": {"hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None)},
    "qwen3": {"hidden_act": ("silu",), "attention_bias": (False, None), "use_sliding_window": (False, None)},
}


def config_json(config: Model, vocab_size: int, end_of_text: int) -> dict[str, Any]:
    """The config.json from which transformers (5, and 4 since it knows the family) builds exactly our network."""
    sizes = vars(config) | {"n_kv_heads": config.kv_heads, "head_dim": config.head_width, "d_ff": config.hidden_width}
    content = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": vocab_size,
        "bos_token_id": end_of_text,  # our documents begin with it, ...
        "eos_token_id": end_of_text,  # ... so the model also learns to end with it
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": "float32",
        "torch_dtype": "float32",  # its name before transformers 4.56
        **{theirs: sizes[ours] for ours, theirs in SIZES[config.family].items()},
        **{name: allowed[0] for name, allowed in FIXED[config.family].items()},
    }
    if config.family == "gpt2":
        dropouts = ("embd_pdrop", "attn_pdrop", "resid_pdrop", "summary_first_dropout")
        return content | {"n_ctx": config.context_length, **dict.fromkeys(dropouts, 0.0)}
    # Before transformers 5 only the rope_theta beside the sizes was there.
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return content | {"rope_parameters": rope, "attention_dropout": 0.0}


def model_from_config_json(content: Any, place: str = "config.json") -> tuple[Model, int]:
    """Our config and the vocabulary size of the network that a config.json describes.

    What is left out has transformers' defaults. Raises BadInput for what our families cannot express.
    """
    family = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise BadInput(f"{place}: model_type is {family!r}; only {', '.join(ARCHITECTURES)} can be read")
    try:
        refuse_what_differs(content, family, place)
        theirs = {"tie_word_embeddings": False, **DEFAULTS[family], **content, **rope_of(content)}
        shape = {ours: theirs[name] for ours, name in SIZES[family].items()}
        shape["d_ff"] = shape["d_ff"] or 4 * shape["d_model"]
        if shape.get("head_dim") and shape["head_dim"] * shape["n_heads"] == shape["d_model"]:
            shape["head_dim"] = None  # what it would be anyway
        if shape.get("n_kv_heads") == shape["n_heads"]:
            shape["n_kv_heads"] = None
        vocab_size = theirs["vocab_size"]
        if type(vocab_size) is not int or vocab_size < 1:
            raise BadInput(f"{place}: vocab_size is {vocab_size!r}; it must be a whole number above 0")
        return Model(family=family, tie_embeddings=theirs["tie_word_embeddings"], **shape), vocab_size
    except KeyError as problem:
        raise BadInput(f"{place} lacks {problem}, which transformers writes; get the file again") from None
    except (TypeError, ValidationError) as problem:
        wrong = all_errors(problem) if isinstance(problem, ValidationError) else problem
        raise BadInput(f"{place} describes a network that cannot be built: {wrong}") from None


def refuse_what_differs(content: dict[str, Any], family: str, place: str) -> None:
    """Raise BadInput if config.json asks for something that would give other logits than our network's."""
    allowed = FIXED[family] | {
        "architectures": ([ARCHITECTURES[family]], None),
        "quantization_config": (None,),
        "auto_map": (None,),  # code of its own
        "partial_rotary_factor": (1.0,),
    }
    found = [name for name, values in allowed.items() if content.get(name, values[0]) not in values]
    if not set(map(str, content.get("layer_types") or [])) <= {"full_attention"}:
        found.append("layer_types")
    said = [f"{name} = {content[name]!r}" for name in found]
    rope = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
    if any(value != rope.get(name) for name, value in rope_of(content).items() if name != "rope_theta"):
        said.append(f"rope_parameters = {rope_of(content)!r}")
    if said:
        raise BadInput(f"{place}: {'; '.join(said)}: our {family} has no such thing; choose another model")


def rope_of(content: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary positions, under the name of transformers 5 or of 4."""
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    return rope if isinstance(rope, dict) else {"rope_type": rope}
