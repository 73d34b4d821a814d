"""Small random models of transformers in folders, as a user would download them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

VOCAB, TIME = 23, 12
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "mistral")
_LLAMA_LIKE = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": TIME,
}
# Families that models/decoder.py does not compute: class of the configuration, and what is not in `_OTHER_SIZES`.
_OTHER_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
OTHER_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # A window shorter than the texts, and caps that matter.
    "gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6,
                                "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}),
    "phi3": ("Phi3Config", {"partial_rotary_factor": 0.5, "sliding_window": 7}),
    # Positions begin at 2, and the embedding is narrower than the rest.
    "opt": ("OPTConfig", {"ffn_dim": 40, "word_embed_proj_dim": 24, "dropout": 0.0}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "stablelm": ("StableLmConfig", {}),
    "falcon": ("FalconConfig", {"alibi": True, "multi_query": True, "new_decoder_architecture": False}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **_EXPERTS}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 4, **_EXPERTS}),
    # One of our own families with positions that decoder.py does not compute.
    "llama-yarn": ("LlamaConfig", {"head_dim": 8, "rope_scaling": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 6.0, "original_max_position_embeddings": 16}}),
}  # fmt: skip


def trained_folder(name: str) -> Path:
    """A trained model of SMOLCLUSTER_DATA, or of ../shared/data beside the checkout."""
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("SMOLCLUSTER_DATA") or beside, name)
    if not folder.is_dir():
        pytest.skip(f"no {name} in SMOLCLUSTER_DATA or ../shared/data")
    return folder


def transformers() -> Any:
    return pytest.importorskip("transformers", reason="needs the extra hf")


def hf_config(family: str, **changes: Any) -> Any:
    """A configuration with two layers; all but Mistral's have a tied head."""
    library = transformers()
    ends = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        sizes = {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 20, "n_positions": TIME}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return library.GPT2Config(**{**ends, **sizes, **no_dropout, **changes})
    kind = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "mistral": "MistralConfig"}[family]
    # A window shorter than a sequence: whoever computes the mask has to know of it.
    own = {"sliding_window": 5, "tie_word_embeddings": False} if family == "mistral" else {"tie_word_embeddings": True}
    return getattr(library, kind)(**{**ends, **_LLAMA_LIKE, **own, **changes})


def make_hf_folder(folder: Path, family: str, **changes: Any) -> Path:
    """Write a random model, with no bias at 0 and no norm at 1, as after some training."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = transformers().AutoModelForCausalLM.from_config(hf_config(family, **changes))
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn_like(param) * 0.2)
        model.save_pretrained(folder)
    return folder


def make_other_folder(folder: Path, family: str, **changes: Any) -> Path:
    """A random model of OTHER_FAMILIES in float64, so that what is computed in less shows."""
    import torch

    kind, own = OTHER_FAMILIES[family]
    library = transformers()
    config = getattr(library, kind)(**{**_OTHER_SIZES, **own, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = library.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn_like(param) * 0.2)
        model.save_pretrained(folder)
    return folder


def whole_model(folder: Path, dtype: Any) -> Any:
    """transformers' own, with products of experts that exist in float64."""
    kinds = {"experts_implementation": "eager"} if "moe" in _family(folder) or "mixtral" in _family(folder) else {}
    return transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kinds).eval()


def _family(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
