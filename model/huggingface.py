"""Our models as Hugging Face's architectures of the same name, and back.

The weights are the same values in another order; they are moved, never computed, so both directions are exact:

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
from files import give_usual_mode, write_json
from model.gpt import AUXILIARY, GPT
from model.huggingface_config import ARCHITECTURES, config_json, model_from_config_json
from randomness import torch_generator

OUTPUT = "lm_head.weight"
PREFIXES = {"gpt2": "transformer.", "llama": "model.", "qwen3": "model."}  # of all their names but OUTPUT
BLOCKS = {"gpt2": "h", "llama": "layers", "qwen3": "layers"}

# Our modules and theirs. Where they have several, a tensor of ours holds the rows of theirs one below the other.
MODULES = {
    "gpt2": {
        "embedding": ["wte"],
        "positions": ["wpe"],
        "norm": ["ln_f"],
        "attention_norm": ["ln_1"],
        "attention.qkv": ["attn.c_attn"],
        "attention.output": ["attn.c_proj"],
        "mlp_norm": ["ln_2"],
        "mlp.input": ["mlp.c_fc"],
        "mlp.output": ["mlp.c_proj"],
    },
    "llama": {
        "embedding": ["embed_tokens"],
        "norm": ["norm"],
        "attention_norm": ["input_layernorm"],
        "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attention.query_norm": ["self_attn.q_norm"],  # qwen3 alone has these two
        "attention.key_norm": ["self_attn.k_norm"],
        "attention.output": ["self_attn.o_proj"],
        "mlp_norm": ["post_attention_layernorm"],
        "mlp.input": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.output": ["mlp.down_proj"],
    },
}
MODULES["qwen3"] = MODULES["llama"]
CONV1D = ("qkv.weight", "output.weight", "input.weight")  # of gpt2's blocks: every matrix there is
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that old checkpoints carry


# ---------------------------------------------------------------------------------------------- weights


def their_names(name: str, family: str) -> list[str]:
    """The name or names that Hugging Face has for a tensor of ours. Raises ValueError for one that MODULES lacks."""
    if name == "output.weight":
        return [OUTPUT]
    prefix, (module, _, kind) = PREFIXES[family], name.rpartition(".")
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        prefix += f"{BLOCKS[family]}.{layer}."
    if module not in MODULES[family]:
        raise ValueError(f"the table of model/huggingface.py lacks the model's {name}")
    return [f"{prefix}{theirs}.{kind}" for theirs in MODULES[family][module]]


def to_huggingface(model: GPT) -> dict[str, Tensor]:
    """The network under Hugging Face's names, as copies on the model's device; no two share memory."""
    config, theirs = model.config, {}
    network = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(AUXILIARY)}
    for name, tensor in network.items():
        names = their_names(name, config.family)
        heads = [config.n_heads, config.kv_heads, config.kv_heads]
        rows = {1: [len(tensor)], 2: [config.hidden_width] * 2, 3: [n * config.head_width for n in heads]}[len(names)]
        for their_name, part in zip(names, tensor.split(rows), strict=True):
            part = part.T if is_conv1d(config, name) else part
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
    embedding = tensors.get(their_names("embedding.weight", config.family)[0], torch.empty(1, 1))
    if config.tie_embeddings and OUTPUT in tensors and not torch.equal(tensors.pop(OUTPUT), embedding):
        raise BadInput(
            f"{place}: {OUTPUT} differs from the embedding though tie_word_embeddings is true (or left out); "
            "set it to false in config.json"
        )
    with torch.device("meta"):  # shapes without memory
        model = GPT(config, len(embedding) if embedding.ndim else 1)
    check_tensors(tensors, to_huggingface(model), config, place)
    ours = {}
    for name in model.state_dict():
        joined = torch.cat([tensors[their_name].float() for their_name in their_names(name, config.family)])
        ours[name] = joined.T.contiguous() if is_conv1d(config, name) else joined
    return ours


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], config: Model, place: str) -> None:
    """Raise BadInput unless ``tensors`` have the names and shapes of those ``expected``, in a precision we can read."""
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
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), token),
        "model_max_length": model.config.context_length,
        "clean_up_tokenization_spaces": False,  # decoding gives the text back as it was
    }
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config_json(model.config, model.vocab_size, end_of_text))
    write_json(directory / "tokenizer_config.json", tokenizer_config)
    write_json(directory / "generation_config.json", ends)
    shutil.copyfile(tokenizer_file, directory / "tokenizer.json")
    tensors = {name: tensor.cpu() for name, tensor in to_huggingface(model).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    give_usual_mode(directory / "model.safetensors")


def read_directory(path: str | Path) -> tuple[Model, int, dict[str, Tensor]]:
    """Config, vocabulary size and our state dict (fp32) of a Hugging Face directory, its weights whole or sharded.

    Raises BadInput for what is missing, damaged, or not a network of our families.
    """
    directory, file = Path(path), Path(path) / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"there is no {file}; a Hugging Face directory has config.json and model.safetensors") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise BadInput(f"{file} cannot be read as JSON: {problem}") from None
    config, vocab_size = model_from_config_json(content, str(file))
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory):
        try:
            loaded = load_file(file)
        except (OSError, SafetensorError) as problem:
            raise BadInput(f"{file} cannot be read as safetensors: {problem}; get the file again") from None
        if twice := sorted(set(loaded) & set(tensors)):
            raise BadInput(f"{file} holds {twice[0]}, which another file holds too; get the files again")
        tensors |= loaded
    state = from_huggingface(tensors, config, place=str(directory))
    rows = state["embedding.weight"].shape[0]
    if rows != vocab_size:
        raise BadInput(f"{directory}: the embedding has {rows} rows, but vocab_size in config.json is {vocab_size}")
    return config, vocab_size, state


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: model.safetensors, or its parts, model-00001-of-00002.safetensors ...

    The index of the parts is not read: that all tensors are there, and once, is checked anyway.
    """
    whole = directory / "model.safetensors"
    if files := [whole] if whole.is_file() else sorted(directory.glob("model-*.safetensors")):
        return files
    if pickled := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern)):
        raise BadInput(
            f"{directory} has its weights only as {pickled[0]}, a pickle, which can run code when it is read; "
            "get the safetensors files, or convert it: load it in transformers and call save_pretrained"
        )
    raise BadInput(f"{directory} has neither {whole.name} nor its parts, model-*.safetensors; get the weights too")


# ---------------------------------------------------------------------------------------------- comparison


@torch.no_grad()
def compare_logits(model: GPT, directory: Path) -> float:
    """Largest difference of logits between ``model`` and ``directory`` as transformers loads it.

    Both read the same random tokens, in fp32 and evaluation mode, as long as the context (256 at most). The
    difference is a share of the largest logit, or absolute if none exceeds 1; nan if a logit is nan.
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
