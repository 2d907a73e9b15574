"""Our families against transformers' own models of the same name: the same weights give the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import BadInput, Model
from data.tokenizers import byte_tokenizer, train_bpe
from model import huggingface
from model.gpt import GPT
from model.huggingface import (
    compare_logits,
    config_json,
    from_huggingface,
    model_from_config_json,
    read_directory,
    to_huggingface,
    write_directory,
)

transformers.utils.logging.disable_progress_bar()

TALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 44,
    "max_position_embeddings": 40,
    "vocab_size": 300,
}
# transformers' own words for small networks. The matrices of the "square" ones fit transposed, too.
NETWORKS: dict[str, Any] = {
    "gpt2": lambda **tie: transformers.GPT2Config(
        n_layer=2, n_embd=24, n_head=3, n_positions=40, vocab_size=300, **tie
    ),
    "gpt2 square": lambda **tie: transformers.GPT2Config(
        n_layer=2, n_embd=24, n_head=2, n_inner=24, n_positions=40, vocab_size=300, layer_norm_epsilon=1e-3, **tie
    ),
    "llama": lambda **tie: transformers.LlamaConfig(
        **TALL, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-3, **tie
    ),
    "llama with its own head_dim": lambda **tie: transformers.LlamaConfig(
        **TALL,
        num_attention_heads=2,
        head_dim=20,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        **tie,
    ),
    "llama square": lambda **tie: transformers.LlamaConfig(
        **{**TALL, "intermediate_size": 24}, num_attention_heads=2, **tie
    ),
    "qwen3": lambda **tie: transformers.Qwen3Config(
        **TALL, num_attention_heads=6, num_key_value_heads=2, head_dim=10, **tie
    ),
    "qwen3 with many keys": lambda **tie: transformers.Qwen3Config(
        **TALL, num_attention_heads=5, num_key_value_heads=5, head_dim=6, **tie
    ),
}
all_networks = pytest.mark.parametrize("network", NETWORKS)
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def reference(network: str, tied: bool = True) -> Any:
    """A transformers model whose every parameter, norms and biases too, is random."""
    torch.manual_seed(len(network) + tied)
    model = transformers.AutoModelForCausalLM.from_config(NETWORKS[network](tie_word_embeddings=tied))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def saved(directory: Path, network: str, tied: bool = True, **options: Any) -> Path:
    """A directory that transformers itself has written."""
    reference(network, tied).save_pretrained(directory, **options)
    return directory


def ours(directory: Path) -> GPT:
    """Our model of a Hugging Face directory."""
    config, vocab_size, state = read_directory(directory)
    model = GPT(config, vocab_size)
    model.load_state_dict(state)
    return model.eval()


def tensors_of(model: Any) -> dict[str, Tensor]:
    """What transformers stores of a model: tied weights once."""
    tied = model.config.tie_word_embeddings
    return {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def difference(model: GPT, theirs: Any) -> float:
    """Largest difference of logits over a whole context, over the larger of 1 and the largest logit."""
    tokens = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = model.logits(model(tokens))
    return float((found - expected).abs().max() / max(1.0, float(expected.abs().max())))


@all_networks
@tied_or_not
def test_what_transformers_saved_computes_the_same_here(network: str, tied: bool, tmp_path: Path) -> None:
    assert difference(ours(saved(tmp_path, network, tied)), reference(network, tied)) <= 1e-5


@all_networks
@tied_or_not
def test_there_and_back_is_exact(network: str, tied: bool, tmp_path: Path) -> None:
    theirs = tensors_of(reference(network, tied))
    back = to_huggingface(ours(saved(tmp_path, network, tied)))
    assert set(back) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(back[name], tensor) and back[name].is_contiguous(), name


@all_networks
@tied_or_not
def test_what_we_write_computes_the_same_in_transformers(network: str, tied: bool, tmp_path: Path) -> None:
    model = ours(saved(tmp_path / "theirs", network, tied)).train()
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    write_directory(model, tmp_path / "tokenizer.json", tmp_path / "ours", 256)
    assert compare_logits(model, tmp_path / "ours") <= 1e-5
    assert model.training, "the mode is put back"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert loaded.dtype == torch.float32 and type(loaded) is type(reference(network))
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == 256
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert difference(model.eval(), loaded) <= 1e-5
    # In training mode too: transformers' own defaults have dropout.
    assert difference(model, loaded.train()) <= 1e-5


@all_networks
def test_a_written_config_reads_back(network: str, tmp_path: Path) -> None:
    model = ours(saved(tmp_path, network))
    content = json.loads(json.dumps(config_json(model.config, 300, 299)))
    assert model_from_config_json(content) == (model.config, 300)


@pytest.mark.parametrize("forgotten", ["output.weight", "input.weight"])
def test_a_missed_transpose_of_a_square_matrix_is_caught(
    forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ours(saved(tmp_path / "theirs", "gpt2 square"))
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(huggingface, "CONV1D", tuple(name for name in huggingface.CONV1D if name != forgotten))
    write_directory(model, tmp_path / "tokenizer.json", tmp_path / "ours", 256)  # loads without complaint
    assert compare_logits(model, tmp_path / "ours") > 1e-2


def test_compare_logits_fails_on_a_missing_and_on_an_unexpected_weight(tmp_path: Path) -> None:
    model = ours(saved(tmp_path, "llama"))
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "model.stray": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"unexpected_keys.*model\.stray"):
        compare_logits(model, tmp_path)
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"missing_keys.*model\.norm\.weight"):
        compare_logits(model, tmp_path)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("network", ["gpt2", "llama", "qwen3"])
def test_the_tokenizer_loads_and_is_the_same(kind: str, network: str, tmp_path: Path) -> None:
    text = "def  f(x):\n\treturn 'naïve' , x ** 2 # 日本語 \r\n\n don't , stop .\n"
    tokenizer = byte_tokenizer() if kind == "byte" else train_bpe([text * 3], 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    end = int(tokenizer.token_to_id("<|endoftext|>") or 0)
    model = ours(saved(tmp_path / "theirs", network))
    write_directory(model, tmp_path / "tokenizer.json", tmp_path / "ours", end)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert isinstance(loaded, transformers.PreTrainedTokenizerFast)
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.eos_token_id, loaded.bos_token_id) == ("<|endoftext|>", end, end)
    assert loaded.model_max_length == 40


# ---------------------------------------------------------------------------------------------- other layouts


def test_a_sharded_directory_reads_like_a_whole_one(tmp_path: Path) -> None:
    whole = ours(saved(tmp_path / "whole", "qwen3", tied=False)).state_dict()
    sharded = saved(tmp_path / "sharded", "qwen3", tied=False, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2 and not (sharded / "model.safetensors").exists()
    for name, tensor in ours(sharded).state_dict().items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    reference("gpt2").to(dtype).save_pretrained(tmp_path)
    back = to_huggingface(ours(tmp_path))
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert tensor.dtype == dtype and back[name].dtype == torch.float32
        assert torch.equal(back[name], tensor.float()), name


def test_old_layouts_of_the_same_weights(tmp_path: Path) -> None:
    """OpenAI's GPT-2 has no prefix and carries its masks; old Llamas carry rotary frequencies and rope_theta."""
    saved(tmp_path, "gpt2")
    expected = ours(tmp_path).state_dict()
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
    weights["lm_head.weight"] = weights["wte.weight"].clone()
    config, _, _ = read_directory(tmp_path)
    for name, tensor in from_huggingface(weights, config).items():
        assert torch.equal(tensor, expected[name]), name
    with pytest.raises(BadInput, match=r"lm_head.weight differs from the embedding"):
        from_huggingface({**weights, "lm_head.weight": weights["wte.weight"] + 1}, config)

    llama = saved(tmp_path / "llama", "llama with its own head_dim")
    file = llama / "model.safetensors"
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(10)}
    save_file(load_file(file) | frequencies, file, metadata={"format": "pt"})
    content = json.loads((llama / "config.json").read_text())
    content["rope_theta"] = content.pop("rope_parameters")["rope_theta"]
    (llama / "config.json").write_text(json.dumps(content | {"rope_scaling": None}))
    assert difference(ours(llama), reference("llama with its own head_dim")) <= 1e-5


def test_openai_gpt2_as_published() -> None:
    """The config.json of openai-community/gpt2, word for word where it matters."""
    content = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "vocab_size": 50257,
    }
    config, vocab_size = model_from_config_json(content)
    assert vocab_size == 50257 and config.tie_embeddings and config.context_length == 1024
    with torch.device("meta"):
        assert GPT(config, vocab_size).count_parameters() == 124_439_808


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("network", "change", "named"),
    [
        ("gpt2", {"model_type": "mamba"}, "model_type is 'mamba'"),
        ("gpt2", {"model_type": ["gpt2"]}, "model_type"),
        ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "architectures"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function = 'gelu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"n_layer": None}, "n_layers"),
        ("gpt2", {"n_embd": "wide"}, "cannot be built"),
        ("gpt2", {"n_head": 5}, "not divisible"),
        ("gpt2", {"vocab_size": -1}, "vocab_size is -1"),
        ("gpt2", {"vocab_size": 301}, "300 rows"),
        ("gpt2", {"n_embd": 48}, r"c_attn\.weight has the shape \(24, 72\) instead of \(48, 144\)"),
        ("llama", {"model_type": "mistral"}, "model_type is 'mistral'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2}}, "yarn"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map"),
        ("llama", {"num_hidden_layers": 1}, r"model\.layers\.1\.input_layernorm\.weight .* is not a tensor of Llama"),
        ("llama", {"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight is missing"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": 3}, "cannot be built"),
    ],
)
def test_a_config_that_means_another_network_is_refused(
    network: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    saved(tmp_path, network)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(BadInput, match=named) as refusal:
        read_directory(tmp_path)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("lacking", ["hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings"])
def test_a_config_that_lacks_a_size_is_refused(lacking: str, tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    content = json.loads((tmp_path / "config.json").read_text())
    del content[lacking]
    with pytest.raises(BadInput, match=f"lacks '{lacking}'"):
        model_from_config_json(content)


def test_each_wrong_tensor_is_named(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(24, 44)
    weights["model.layers.1.self_attn.v_proj.weight"] = weights["model.layers.1.self_attn.v_proj.weight"].double()
    del weights["model.layers.0.mlp.gate_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(BadInput) as refusal:
        read_directory(tmp_path)
    message = str(refusal.value)
    assert "model.layers.0.self_attn.q_proj.bias (24,) is not a tensor" in message
    assert "model.layers.1.mlp.up_proj.weight has the shape (24, 44) instead of (44, 24)" in message
    assert "model.layers.1.self_attn.v_proj.weight is torch.float64" in message
    assert "model.layers.0.mlp.gate_proj.weight is missing" in message


def test_a_checkpoint_without_an_embedding_is_refused(tmp_path: Path) -> None:
    config, _, _ = read_directory(saved(tmp_path, "gpt2"))
    with pytest.raises(BadInput, match=r"transformer\.wte\.weight is missing"):
        from_huggingface({}, config)
    with pytest.raises(BadInput, match=r"transformer\.wte\.weight has the shape \(\)"):
        from_huggingface({"transformer.wte.weight": torch.tensor(1.0)}, config)


@pytest.mark.fault(18)
def test_a_directory_of_pickles_is_refused_with_a_way_out(tmp_path: Path) -> None:
    saved(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        read_directory(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(BadInput, match=r"neither model\.safetensors nor"):
        read_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config\.json cannot be read as JSON"):
        read_directory(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(BadInput, match=r"there is no .*config\.json"):
        read_directory(tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "gpt2")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"model\.safetensors cannot be read as safetensors"):
        read_directory(tmp_path)


@pytest.mark.fault(19)
@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd"])
def test_an_index_that_leads_elsewhere_is_not_followed(name: str, tmp_path: Path) -> None:
    directory = saved(tmp_path / "inside", "gpt2")
    (directory / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"transformer.wte.weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=r"has neither model\.safetensors nor its parts"):
        read_directory(directory)


@pytest.mark.parametrize("change", ["missing", "twice"])
def test_parts_that_are_not_a_whole_are_refused(change: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, "qwen3", tied=False, max_shard_size="20KB")
    first, *_ = sorted(directory.glob("model-*.safetensors"))
    if change == "missing":
        first.unlink()
    else:
        (directory / "model-extra.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(BadInput, match="is missing" if change == "missing" else "which another file holds too"):
        read_directory(directory)


def test_a_llama_that_transformers_cannot_build_is_refused_before_it_trains() -> None:
    with pytest.raises(ValueError, match="or take model"):
        Model(family="llama", d_model=30, n_heads=4, head_dim=8)
    config = Model(family="qwen3", d_model=30, n_heads=4, head_dim=8)
    assert config_json(config, 300, 0)["hidden_size"] == 30


def test_no_two_exported_tensors_share_memory_with_each_other_or_the_model() -> None:
    model = GPT(Model(n_layers=1, d_model=16, n_heads=2), 300).initialize(0)
    exported = to_huggingface(model)
    storages = [tensor.untyped_storage().data_ptr() for tensor in [*exported.values(), *model.parameters()]]
    assert len(set(storages)) == len(storages)


def test_a_parameter_that_the_tables_do_not_know_is_an_error() -> None:
    model = GPT(Model(n_layers=1, d_model=16, n_heads=2), 300)
    model.stray = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="stray"):
        to_huggingface(model)
