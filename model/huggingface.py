"""Our models as Hugging Face's architectures of the same name, and back.

The weights are the same numbers in another order; they are moved, never computed, so both directions are exact:

    gpt2          Conv1D keeps its matrices as (in, out), the transpose of ours
    llama, qwen3  queries, keys and values are three matrices, ours is one with rows q, k, v; gate and up likewise
    tied          the output matrix is left out, and tie_word_embeddings says why

Only safetensors and JSON are read, and no code that comes with a model is ever run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from config import BadInput, Model
from files import write_json
from model.gpt import GPT
from model.huggingface_config import ARCHITECTURES, config_json, model_from_config_json
from randomness import torch_generator

PREFIXES = {"gpt2": "transformer.", "llama": "model.", "qwen3": "model."}
OUTPUT = "lm_head.weight"

# Our names and theirs outside the blocks, ...
OUTSIDE = {
    "gpt2": {
        "embedding.weight": "transformer.wte.weight",
        "positions.weight": "transformer.wpe.weight",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
    },
    "llama": {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
    },
}
OUTSIDE["qwen3"] = OUTSIDE["llama"]

# ... and inside each of them. Where they have several tensors, ours holds their rows one below the other.
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "qwen3": "model.layers"}
INSIDE = {
    "gpt2": {
        "attention_norm.weight": ["ln_1.weight"],
        "attention_norm.bias": ["ln_1.bias"],
        "attention.qkv.weight": ["attn.c_attn.weight"],
        "attention.qkv.bias": ["attn.c_attn.bias"],
        "attention.output.weight": ["attn.c_proj.weight"],
        "attention.output.bias": ["attn.c_proj.bias"],
        "mlp_norm.weight": ["ln_2.weight"],
        "mlp_norm.bias": ["ln_2.bias"],
        "mlp.input.weight": ["mlp.c_fc.weight"],
        "mlp.input.bias": ["mlp.c_fc.bias"],
        "mlp.output.weight": ["mlp.c_proj.weight"],
        "mlp.output.bias": ["mlp.c_proj.bias"],
    },
    "llama": {
        "attention_norm.weight": ["input_layernorm.weight"],
        "attention.qkv.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        "attention.output.weight": ["self_attn.o_proj.weight"],
        "mlp_norm.weight": ["post_attention_layernorm.weight"],
        "mlp.input.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        "mlp.output.weight": ["mlp.down_proj.weight"],
    },
}
INSIDE["qwen3"] = INSIDE["llama"] | {
    "attention.query_norm.weight": ["self_attn.q_norm.weight"],
    "attention.key_norm.weight": ["self_attn.k_norm.weight"],
}
CONV1D = ("qkv.weight", "output.weight", "input.weight")  # of gpt2's blocks: every matrix there is
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that old checkpoints carry


# ---------------------------------------------------------------------------------------------- weights


def names_of(config: Model) -> dict[str, list[str]]:
    """Our name of every tensor, and the name or names that Hugging Face has for it."""
    names = {ours: [theirs] for ours, theirs in OUTSIDE[config.family].items()}
    for layer in range(config.n_layers):
        for ours, theirs in INSIDE[config.family].items():
            names[f"blocks.{layer}.{ours}"] = [f"{BLOCKS[config.family]}.{layer}.{name}" for name in theirs]
    return names if config.tie_embeddings else names | {"output.weight": [OUTPUT]}


def to_huggingface(model: GPT) -> dict[str, Tensor]:
    """All weights under Hugging Face's names, as copies on the model's device; no two share memory."""
    config, ours = model.config, model.state_dict()
    names = names_of(config)
    if set(names) != set(ours):
        raise ValueError(f"the tables of model/huggingface.py and the model differ in {sorted(set(names) ^ set(ours))}")
    theirs = {}
    for name, their_names in names.items():
        tensor = ours[name].T if is_conv1d(config, name) else ours[name]
        parts = tensor.split(rows_of(config, their_names)) if len(their_names) > 1 else [tensor]
        for their_name, part in zip(their_names, parts, strict=True):
            theirs[their_name] = part.detach().clone(memory_format=torch.contiguous_format)
    return theirs


def from_huggingface(tensors: dict[str, Tensor], config: Model, place: str = "the checkpoint") -> dict[str, Tensor]:
    """Our state dict, in fp32 (bf16 and fp16 are widened); the exact inverse of ``to_huggingface``.

    Raises BadInput that names each tensor that is missing, unexpected, or of another shape or kind.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    prefix = PREFIXES[config.family]
    if not any(name.startswith(prefix) for name in tensors):  # saved from the bare network, as OpenAI's GPT-2 is
        tensors = {name if name == OUTPUT else prefix + name: tensor for name, tensor in tensors.items()}
    embedding = tensors.get(OUTSIDE[config.family]["embedding.weight"], torch.empty(1, 1))
    if config.tie_embeddings and OUTPUT in tensors and not torch.equal(tensors.pop(OUTPUT), embedding):
        raise BadInput(
            f"{place}: {OUTPUT} differs from the embedding though tie_word_embeddings is true (or left out); "
            "set it to false in config.json"
        )
    check_tensors(tensors, config, len(embedding) if embedding.ndim else 1, place)
    ours = {}
    for name, their_names in names_of(config).items():
        joined = torch.cat([tensors[their_name].float() for their_name in their_names])
        ours[name] = joined.T.contiguous() if is_conv1d(config, name) else joined
    return ours


def check_tensors(tensors: dict[str, Tensor], config: Model, vocab_size: int, place: str) -> None:
    """Raise BadInput unless ``tensors`` are exactly those of Hugging Face's model of this config."""
    with torch.device("meta"):  # shapes without memory
        expected = to_huggingface(GPT(config, vocab_size))
    problems = []
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name not in expected:
            problems.append(f"{name} {shape} is not a tensor of {ARCHITECTURES[config.family]}")
        elif shape != tuple(expected[name].shape):
            problems.append(f"{name} has the shape {shape} instead of {tuple(expected[name].shape)}")
        elif tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            problems.append(f"{name} is {tensor.dtype}; only float32, bfloat16 and float16 can be read")
    problems += [f"{name} is missing" for name in expected if name not in tensors]
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        what = f"{place} does not fit its config.json, which describes {config.family} with {config.n_layers} layers:"
        way_out = "correct config.json, or get the files again"
        raise BadInput("\n  ".join([what, *problems[:8], *more, way_out]))


def is_conv1d(config: Model, name: str) -> bool:
    """Whether Hugging Face keeps this matrix of ours transposed."""
    return config.family == "gpt2" and name.startswith("blocks.") and name.endswith(CONV1D)


def rows_of(config: Model, their_names: list[str]) -> list[int]:
    """How many rows of ours belong to each of several tensors of theirs."""
    if len(their_names) == 2:
        return [config.hidden_width, config.hidden_width]
    return [heads * config.head_width for heads in (config.n_heads, config.kv_heads, config.kv_heads)]


# ---------------------------------------------------------------------------------------------- directories


def write_directory(model: GPT, tokenizer_file: Path, directory: Path, end_of_text: int) -> None:
    """Write what AutoModelForCausalLM and AutoTokenizer load into ``directory``, which is made if need be.

    Args:
        model: its weights are written in the precision they have, fp32.
        tokenizer_file: the tokenizer.json that the model was trained with.
        end_of_text: the id of the token that separates documents.
    """
    token = Tokenizer.from_file(str(tokenizer_file)).id_to_token(end_of_text)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token,
        "eos_token": token,
        "pad_token": token,
        "model_max_length": model.config.context_length,
        "clean_up_tokenization_spaces": False,  # decoding gives the text back as it was
    }
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config_json(model.config, model.vocab_size, end_of_text))
    write_json(directory / "tokenizer_config.json", tokenizer_config)
    write_json(directory / "generation_config.json", ends)
    shutil.copyfile(tokenizer_file, directory / "tokenizer.json")
    tensors = {name: tensor.cpu() for name, tensor in to_huggingface(model).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def read_directory(path: str | Path) -> tuple[Model, int, dict[str, Tensor]]:
    """Config, vocabulary size and our state dict (fp32) of a Hugging Face directory, its weights whole or sharded.

    Raises BadInput for what is missing, damaged, or not a network of our families.
    """
    directory = Path(path)
    config, vocab_size = model_from_config_json(read_json(directory / "config.json"), str(directory / "config.json"))
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory):
        try:
            loaded = load_file(file)
        except (OSError, SafetensorError) as problem:
            raise BadInput(f"{file} cannot be read as safetensors: {problem}; get the file again") from None
        if twice := sorted(set(loaded) & set(tensors)):
            raise BadInput(f"{file} holds {twice[0]}, which another file of the index holds too; get the files again")
        tensors |= loaded
    state = from_huggingface(tensors, config, place=str(directory))
    rows = state["embedding.weight"].shape[0]
    if rows != vocab_size:
        raise BadInput(f"{directory}: the embedding has {rows} rows, but vocab_size in config.json is {vocab_size}")
    return config, vocab_size, state


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: model.safetensors, or those that the index names."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        if pickled := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern)):
            raise BadInput(
                f"{directory} has its weights only as {pickled[0]}, a pickle, which can run code when it is read; "
                "get the safetensors files, or convert it: load it in transformers and call save_pretrained"
            )
        raise BadInput(f"{directory} has neither {whole.name} nor {index.name}; get the model's weights too")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BadInput(f"{index} has no weight_map; get the file again")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"{index} names {name!r}, which is not a safetensors file of the directory")
    return [directory / name for name in sorted(set(names.values()))]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises BadInput."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"there is no {path}; a Hugging Face directory has config.json and model.safetensors") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise BadInput(f"{path} cannot be read as JSON: {problem}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


# ---------------------------------------------------------------------------------------------- comparison


@torch.no_grad()
def compare_logits(model: GPT, directory: Path) -> float:
    """Largest difference of logits between ``model`` and ``directory`` as transformers loads it.

    Both read the same random tokens, in fp32 and evaluation mode, as long as the context (256 at most). The
    difference is a share of the largest logit, or absolute if none exceeds 1; nan if a logit is no number.
    Raises BadInput when transformers finds a weight missing, unexpected or misshapen.
    """
    import transformers

    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    theirs, info = loaded
    for kind, names in info.items():
        if names:
            raise BadInput(f"{directory} does not load in transformers {transformers.__version__}: {kind} {names}")
    shape = (2, min(model.config.context_length, 256))
    tokens_BT = torch.randint(model.vocab_size, shape, generator=torch_generator(0, "compare logits"))
    training = model.training
    model.eval()
    try:
        ours_BTV = model.logits(model(tokens_BT.to(model.embedding.weight.device))).float().cpu()
    finally:
        model.train(training)
    theirs_BTV = theirs.eval()(tokens_BT).logits
    return float((ours_BTV - theirs_BTV).abs().max() / theirs_BTV.abs().max().clamp(min=1))
