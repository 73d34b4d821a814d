"""Small random models of transformers in folders, as a user would download them."""

from __future__ import annotations

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
