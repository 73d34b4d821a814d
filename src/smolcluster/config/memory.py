"""How much memory a rank will need: from the sizes in the configuration, without building the model.

Counted are weights, gradients, the optimizer's state and the activations that the backward pass keeps. The first three
are exact up to padding; the activations are an estimate (Korthikanti et al. 2022, Reducing Activation Recomputation,
section 4; the attention scores only with dropout, as fused attention does not keep them). Not counted: Python and torch
themselves (about 0.3 GiB), the data, and the network's buffers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from smolcluster.config.hosts import host_names, rank_count
from smolcluster.config.schema import Config, ModelConfig, resolved_batch_size, resolved_staleness_bound

GIB = 2**30

# Published models by id: their config.json is not here, but who trains them must know before the download.
_GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
_LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
_PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "gpt2": _GPT2,
    "openai-community/gpt2": _GPT2,
    "meta-llama/Llama-3.2-1B": _LLAMA_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_1B,
}
# Families whose blocks have the shape of Llama's.
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What the estimate needs of a model.

    Attributes:
        parameters: all of them, tied ones once.
        experts: those of them that belong to experts, which `ep` spreads over the ranks.
        kept: values that the backward pass needs, of one sample.
        checkpointed: values that backward has at once with activation checkpointing, of one sample.
        block: parameters of a layer, all at once; 0 where the model is no list of layers.
        tables: of each embedding and head.
    """

    parameters: int
    experts: int
    kept: int
    checkpointed: int
    block: int = 0
    tables: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that one rank holds at once."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_warning(config: Config) -> str | None:
    """One line if a rank's share will not fit into its machine; None if it will, or if the sizes are not known.

    A machine that `cluster.memory` does not list, or that is not named, counts as large as this one.
    """
    world_size = rank_count(config)
    names = host_names(config) or (None,) * world_size
    for rank, name in enumerate(names):
        is_server = config.algorithm in ("syncps", "edp") and rank == 0
        estimate = estimate_memory(config, world_size, is_server=is_server)
        if estimate is None:
            return None
        available = _memory_of(config, name)
        if estimate.total > available:
            return _warning(config, world_size, estimate, name, available)
    return None


def local_memory_warning(config: Config, world_size: int) -> str | None:
    """The same for `--local N`: all ranks share this machine."""
    estimate = estimate_memory(config, world_size)
    available = _memory_of(config, None)
    if estimate is None or estimate.total * world_size <= available or estimate.total > available:
        return None  # one alone does not fit: `memory_warning` has said so
    return (
        f"{world_size} ranks of about {estimate.total / GIB:.1f} GiB need {estimate.total * world_size / GIB:.1f} GiB, "
        f"but this machine has {available / GIB:.1f} GiB; {_remedy(config, estimate, available)}, or start fewer ranks"
    )


def estimate_memory(config: Config, world_size: int, *, is_server: bool = False) -> MemoryEstimate | None:
    """What the largest rank of a run needs; None where the model's sizes are not known.

    Args:
        config: the run.
        world_size: its ranks.
        is_server: of a parameter server (rank 0 of syncps and edp), which computes nothing.
    """
    sizes = model_sizes(config)
    if sizes is None:
        return None
    algorithm, stage = config.algorithm, config.cluster.fsdp_stage
    element = 8 if config.training.precision == "fp64" else 4
    is_half = config.training.precision in ("bf16", "fp16")
    whole = sizes.parameters * element
    staleness_bound = resolved_staleness_bound(config) or 0
    state = 2 * whole if config.training.optimizer == "adamw" else 0
    if is_server:
        return MemoryEstimate(whole, whole, state, 0)
    weights, gradients, optimizer = whole, whole * (1 + staleness_bound), state
    if algorithm == "fsdp":
        weights, gradients, optimizer = _sharded(config, sizes, world_size, stage, element)
    elif algorithm in ("mp", "mp_pipeline"):
        # Layers by cost, and the weights of each batch in flight.
        weights, gradients, optimizer = (part // world_size for part in (whole * (1 + staleness_bound), whole, state))
    elif algorithm == "ep":
        held = sizes.parameters - sizes.experts + sizes.experts // world_size
        weights, gradients, optimizer = (part * held // sizes.parameters for part in (weights, gradients, optimizer))
    elif algorithm in ("syncps", "edp"):
        optimizer = 0
    if is_half and (algorithm != "fsdp" or stage == 0):
        weights += weights // 2  # autocast's 16-bit copies
    return MemoryEstimate(weights, gradients, optimizer, _activation_bytes(config, sizes, world_size))


def _sharded(config: Config, sizes: ModelSizes, world_size: int, stage: int, element: int) -> tuple[int, int, int]:
    """Weights, gradients and optimizer state of a rank of fsdp, with what is gathered or on its way at the peak."""
    whole, bucket = sizes.parameters * element, config.cluster.bucket_bytes
    part = -(-whole // world_size)
    # In half precision the matrices of the blocks are gathered in 16 bits; what a rank steps stays as it is.
    gathered = 2 if config.training.precision in ("bf16", "fp16") else element
    sets = 1 + (resolved_staleness_bound(config) or 0)
    state = (whole if stage == 0 else part) * (2 if config.training.optimizer == "adamw" else 0)
    gradients = whole * sets if stage < 2 else sets * (part + min(whole, 2 * max(bucket, sizes.block * element // 3)))
    weights = whole
    if stage == 3:
        large = max(sizes.block * element, bucket)  # an embedding above that is gathered in pieces
        blocks = sizes.parameters if sizes.block == 0 else 2 * sizes.block
        rest = sum(table * element for table in sizes.tables if table * element <= large)
        weights = part + min(sizes.parameters * gathered, blocks * gathered + rest)
    elif stage > 0 and gathered != element:
        weights = part + sizes.parameters * gathered
    return weights, gradients, state


def stages_note(config: Config, world_size: int) -> str | None:
    """One line on what a rank of fsdp needs in each stage; None for other algorithms and where sizes are not known."""
    if config.algorithm != "fsdp":
        return None
    needs = []
    for stage in (0, 1, 2, 3):
        cluster = config.cluster.model_copy(update={"fsdp_stage": stage})
        estimate = estimate_memory(config.model_copy(update={"cluster": cluster}), world_size)
        if estimate is None:
            return None
        is_chosen = stage == config.cluster.fsdp_stage
        needs.append(f"{stage}: {_size(estimate.total)}{' (chosen)' if is_chosen else ''}")
        activations = estimate.activations
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    return (
        f"memory of each of {ranks} by cluster.fsdp_stage: {', '.join(needs)}; {_size(activations)} of it activations, "
        "and Python with torch comes on top"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB // 10 else f"{nbytes / 2**20:.1f} MiB"


def model_sizes(config: Config) -> ModelSizes | None:
    """The sizes of the configured model; None for the user's own, and for what is neither here nor known."""
    model = config.model
    if model.type == "simple_nn":
        parameters = (model.input_dim + 1) * model.hidden + (model.hidden + 1) * model.out
        return ModelSizes(parameters, 0, model.input_dim + 2 * model.hidden + model.out, model.input_dim)
    if model.hf_model_name is not None and (model.type == "hf" or model.init == "pretrained"):
        found = _published(model.hf_model_name)
        dropout = model.dropout if model.type == "gpt" else None
        return None if found is None else _hf_sizes(found, model.max_seq_len, dropout)
    if model.type in ("gpt", "moe"):
        vocab_size = _vocab_size(config)
        return None if vocab_size is None else _gpt_sizes(model, vocab_size)
    return None


def machine_memory_bytes() -> int:
    """Memory of this machine."""
    return int(psutil.virtual_memory().total)


# --- sizes


def _gpt_sizes(model: ModelConfig, vocab_size: int) -> ModelSizes:
    width, ff, layers = model.model_dim, model.ff_dim, model.num_layers
    feed_forward = 2 * width * ff + ff + width
    experts = model.num_experts * 3 * width * ff if model.type == "moe" else 0  # SwiGLU, without biases
    router = model.num_experts * width if model.type == "moe" else 0
    attention = 4 * width * width + 4 * width
    block = attention + 4 * width + (experts + router or feed_forward)
    parameters = (vocab_size + model.max_seq_len) * width + layers * block + 2 * width
    tokens, heads = model.max_seq_len, model.num_heads if model.dropout > 0 else 0
    values = model.top_k * (4 * ff + 2 * width) if model.type == "moe" else 2 * ff
    kept, of_one = (_kept(tokens, n, width, values, vocab_size, heads) for n in (layers, 1))
    checkpointed = _checkpointed(tokens, layers, width, of_one)
    return ModelSizes(parameters, layers * experts, kept, checkpointed, block, (vocab_size * width,))


def _kept(tokens: int, layers: int, width: int, feed_forward: int, vocab_size: int, heads: int = 0) -> int:
    """Values of one sample that the backward pass needs; heads: of attention where there is dropout, else 0.

    Of each block: its input and two norms' outputs, queries, keys, values, and the results of attention, projection and
    feed-forward; then the logits and their log-probabilities.
    """
    kept = tokens * (layers * (9 * width + feed_forward) + width + 2 * vocab_size)
    return kept + _dropped(tokens, layers, width, heads) if heads else kept


def _checkpointed(tokens: int, layers: int, width: int, of_one: int) -> int:
    """The same with activation checkpointing; of_one: values of a model with one block.

    That block is computed again, and of the others there is the input. The logits are gone by then; they count for
    their gradient, which lay beside them before.
    """
    return of_one + tokens * (layers - 1) * width


def _dropped(tokens: int, layers: int, width: int, heads: int) -> int:
    """Values of one sample that are kept for dropout alone.

    The masks behind the embedding, attention and feed-forward; and the attention scores with their mask and their
    product: with dropout they are computed one after the other on the CPU. (Less on CUDA, whose masks are small.)
    """
    return tokens * (layers * (2 * width + 3 * heads * tokens) + width)


def _hf_sizes(found: Mapping[str, Any], tokens: int, dropout: float | None) -> ModelSizes | None:
    """From a config.json of transformers; dropout None: as it says there."""
    family = found.get("model_type")
    try:
        if family == "gpt2":
            return _gpt2_sizes(found, tokens, dropout)
        if family in _LIKE_LLAMA:
            return _llama_sizes(found, tokens)
    except (KeyError, TypeError, ValueError):
        return None  # a file that transformers will refuse, or that has a shape of its own
    return None


def _gpt2_sizes(found: Mapping[str, Any], tokens: int, dropout: float | None) -> ModelSizes:
    width, layers, vocab_size = int(found["n_embd"]), int(found["n_layer"]), int(found["vocab_size"])
    ff = int(found.get("n_inner") or 4 * width)
    block = 4 * width * width + 8 * width + 2 * width * ff + ff + width
    head = 0 if found.get("tie_word_embeddings", True) else vocab_size * width
    parameters = (vocab_size + int(found["n_positions"])) * width + layers * block + 2 * width + head
    drops = float(found.get("attn_pdrop", 0.1)) if dropout is None else dropout
    heads = int(found.get("n_head", 12)) if drops > 0 else 0
    kept, of_one = (_kept(tokens, n, width, 2 * ff, vocab_size, heads) for n in (layers, 1))
    tables = (vocab_size * width,) * (2 if head else 1)
    return ModelSizes(parameters, 0, kept, _checkpointed(tokens, layers, width, of_one), block, tables)


def _llama_sizes(found: Mapping[str, Any], tokens: int) -> ModelSizes:
    family, width = found["model_type"], int(found["hidden_size"])
    layers, vocab_size, ff = int(found["num_hidden_layers"]), int(found["vocab_size"]), int(found["intermediate_size"])
    heads = int(found["num_attention_heads"])
    kv_heads = int(found.get("num_key_value_heads") or heads)
    head_dim = int(found.get("head_dim") or width // heads)
    queries, keys = heads * head_dim, kv_heads * head_dim
    block = 2 * width * (queries + keys) + 3 * width * ff + 2 * width
    if family == "qwen2":
        block += queries + 2 * keys
    elif found.get("attention_bias", False):
        block += queries + 2 * keys + width
    if family == "qwen3":
        block += 2 * head_dim
    if found.get("mlp_bias", False):
        block += 2 * ff + width
    head = 0 if found.get("tie_word_embeddings", False) else vocab_size * width
    parameters = vocab_size * width + layers * block + width + head
    kept, of_one = (_kept(tokens, n, width, 4 * ff, vocab_size) for n in (layers, 1))
    tables = (vocab_size * width,) * (2 if head else 1)
    return ModelSizes(parameters, 0, kept, _checkpointed(tokens, layers, width, of_one), block, tables)


def _published(name: str) -> Mapping[str, Any] | None:
    """The config.json of a local folder, or of an id that is known here."""
    if name in _PUBLISHED and not Path(name).is_dir():
        return _PUBLISHED[name]
    return _json(Path(name).expanduser() / "config.json")


def _vocab_size(config: Config) -> int | None:
    """Token ids: as given, or the tokenizer's where it is a local one or known here."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    name = config.data.tokenizer
    if name == "bytes":
        return 256
    if name in _PUBLISHED and not Path(name).exists():
        return int(_PUBLISHED[name]["vocab_size"])
    path = Path(name).expanduser()
    if path.is_dir():
        path /= "tokenizer.json" if (path / "tokenizer.json").is_file() else "vocab.json"
    found = _json(path)
    if found is None:
        return None
    try:
        vocab = found if path.name == "vocab.json" else found["model"]["vocab"]
        return 1 + max(map(int, [*vocab.values(), *(token["id"] for token in found.get("added_tokens", ()))]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever loads the model or the tokenizer says what is wrong with it
    return found if isinstance(found, dict) else None


def _activation_bytes(config: Config, sizes: ModelSizes, world_size: int) -> int:
    training = config.training
    samples = -(-resolved_batch_size(config) // training.micro_batches)
    kept = sizes.checkpointed if training.activation_checkpointing else sizes.kept
    if config.algorithm in ("mp", "mp_pipeline"):
        # A stage keeps its part of each micro-batch in flight: as many as there are stages.
        in_flight = min(training.micro_batches, world_size) if config.algorithm == "mp_pipeline" else 1
        kept = kept * in_flight // world_size
    element = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}[training.precision]
    return samples * kept * element


# --- judging


def _memory_of(config: Config, name: str | None) -> int:
    memory = config.cluster.memory
    given = memory.get(name) if isinstance(memory, dict) and name is not None else None
    if isinstance(memory, int | float):
        given = memory
    return machine_memory_bytes() if given is None else round(given * GIB)


def _warning(config: Config, world_size: int, estimate: MemoryEstimate, name: str | None, available: int) -> str:
    parts = ", ".join(
        f"{label} {getattr(estimate, label) / GIB:.1f}"
        for label in ("weights", "gradients", "optimizer", "activations")
    )
    where = f"{config.algorithm} over {world_size} ranks" if world_size > 1 else config.algorithm
    machine = name or ("this machine" if config.cluster.memory is None else "a machine")
    return (
        f"model {config.model.type} needs about {estimate.total / GIB:.1f} GiB per rank ({parts}; {where}), but "
        f"{machine} has {available / GIB:.1f} GiB; {_remedy(config, estimate, available)}"
    )


def _remedy(config: Config, estimate: MemoryEstimate, available: int) -> str:
    """What helps most; where not even the weights fit, nothing but dividing the model."""
    smaller = "take a smaller model, or divide it with algorithm fsdp (cluster.fsdp_stage 3) or mp_pipeline"
    if estimate.weights > available:
        return smaller
    largest = max(("weights", "gradients", "optimizer", "activations"), key=lambda label: int(getattr(estimate, label)))
    if largest == "activations":
        return "lower training.batch_size or model.max_seq_len, or raise training.micro_batches"
    if largest == "gradients" and (config.cluster.staleness_bound or 0) > 0:
        return "lower cluster.staleness_bound: each step of it keeps another set of gradients"
    if largest == "optimizer":
        return "divide its state with algorithm fsdp, or take training.optimizer sgd, which has none"
    return smaller
