"""The layers of a model that this process has read; another split reads only those that are new to it."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch

from smolcluster.device import give_memory_back
from smolcluster.errors import ConfigError
from smolcluster.models.decoder_config import read_decoder_config
from smolcluster.models.decoder_files import DecoderLoader
from smolcluster.models.hf_decoder_files import HfLoader, read_hf_config
from smolcluster.models.linear import WeightKind, make_linear
from smolcluster.models.split import LayerCost
from smolcluster.models.tensor_files import TensorFiles
from smolcluster.serving.executor import LayerDecoder

# --dtype: of weights and activations, and what matrices are kept as.
DTYPES: dict[str, tuple[torch.dtype, WeightKind]] = {
    "fp64": (torch.float64, "plain"),
    "fp32": (torch.float32, "plain"),
    "bf16": (torch.bfloat16, "plain"),
    "fp16": (torch.float16, "plain"),
    "int8": (torch.float32, "int8"),
    "int8-dynamic": (torch.float32, "int8-dynamic"),
}


# Those that "auto" chooses between: integers are chosen by who accepts what they cost in precision.
_TIMED = ("fp32", "bf16", "fp16")
# More than the caches of most machines at home hold; and no more than a node has besides a small model.
_TIMED_BYTES = 64 << 20
_TIMED_ROUNDS = 5
# Of tiny matrices: there Python takes the time, not memory.
_TIMED_MOST = 256
# While layers are read, freed blocks of this size and more go back to the system.
_PIECE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Of keys and values: `slots` sequences of `length` positions."""

    slots: int
    length: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What the host of a stage can do.

    Attributes:
        bytes_per_s: how fast it reads weights while it multiplies with them, which is how fast it writes tokens.
        free_bytes: of memory, for weights, keys and values.
    """

    bytes_per_s: float = 1.0
    free_bytes: float = math.inf


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What a layer costs.

    Attributes:
        read: bytes of weights that a token reads.
        held: bytes of weights, keys and values.
    """

    read: float
    held: float


class ModelSizes(Protocol):
    """What serving asks of a model's configuration."""

    @property
    def vocab_size(self) -> int:
        """Token ids."""
        ...

    @property
    def model_dim(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def ff_dim(self) -> int:
        """Width of the feed-forward layer."""
        ...

    @property
    def max_positions(self) -> int:
        """Longest sequence in tokens."""
        ...


def fastest_dtype(config: ModelSizes, device: str) -> str:
    """The floating-point dtype in which this machine computes a token's products fastest; blocks for a second or two.

    Half the bytes are not always half the time: many processors convert bfloat16 and float16 number by number.
    """
    seconds = {name: _time_products(config, name, torch.device(device))[0] for name in _TIMED}
    return min(seconds, key=lambda name: seconds[name])


def measure_machine(config: ModelSizes, dtype: str, device: str) -> Machine:
    """What this machine can do with weights of this dtype; blocks for a second.

    Raises:
        ConfigError: it has no products of this dtype.
    """
    seconds, read = _time_products(config, dtype, torch.device(device))
    if math.isinf(seconds):
        raise ConfigError(f"--dtype {dtype} cannot be computed on {device} here. Choose another one, such as fp32")
    own = psutil.Process().memory_info().rss  # layers of an earlier session among it, which will be used again
    free = psutil.virtual_memory().available + own
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    return Machine(read / seconds, float(free))


def _time_products(config: ModelSizes, dtype: str, device: torch.device) -> tuple[float, int]:
    """Of one row with a matrix of the model's feed-forward layers: seconds, and bytes that are read for it.

    Seconds are inf where this device has no such products.
    """
    activations, kind = DTYPES[dtype]
    give_memory_back(_PIECE_BYTES)
    matrix = torch.randn(config.ff_dim, config.model_dim, dtype=torch.float32)
    read = matrix.numel() * _weight_bytes(dtype)
    copies = max(1, min(_TIMED_MOST, _TIMED_BYTES // read))
    x = torch.randn(1, config.model_dim).to(device, activations)
    try:
        products = [make_linear(matrix.to(device, activations, copy=True), None, kind) for _ in range(copies)]
        rounds = []
        for _ in range(_TIMED_ROUNDS):
            began = time.perf_counter()
            for product in products:
                out = product(x)
            out.sum().item()  # waits for a GPU
            rounds.append(time.perf_counter() - began)
    except RuntimeError:
        return math.inf, 0
    finally:
        give_memory_back()
    return statistics.median(rounds) / copies, read


def _weight_bytes(dtype: str) -> int:
    """Of one number of a matrix."""
    activations, kind = DTYPES[dtype]
    return activations.itemsize if kind == "plain" else 1


class LayerLoader(Protocol):
    """Reads layers of a model, and knows what they cost: decoder_files.py and hf_decoder_files.py."""

    @property
    def layers(self) -> int:
        """How many there are, entry and exit included."""
        ...

    def costs(self) -> list[LayerCost]:
        """Of each layer: what a token takes, and what has to be held.

        Raises:
            ConfigError: the model cannot be cut into stages.
        """
        ...

    def bytes_per_position(self) -> int:
        """Of keys and values, of one position of a sequence, in all blocks."""
        ...

    def load(self, files: TensorFiles, layers: range, *, slots: int, length: int) -> LayerDecoder:
        """Some layers, with an empty cache; blocks while it reads what is not there yet."""
        ...


class LayerStore:
    """A model's folder, and what has been read of it.

    Attributes:
        folder: the model's.
        config: its sizes.
        dtype: a key of DTYPES.
        is_deterministic: see `__init__`.
    """

    def __init__(
        self, folder: Path, dtype: str = "fp32", device: str = "cpu", *, is_deterministic: bool = False
    ) -> None:
        """Read the configuration, and no weights.

        Args:
            folder: the model's.
            dtype: a key of DTYPES, or "auto": see fastest_dtype.
            device: where to compute.
            is_deterministic: a stream's tokens do not depend on what is computed with them; see Decoder.

        Raises:
            ConfigError: it is of a kind that cannot be served, or there is no such dtype.
            CheckpointError: its files are missing or damaged.
        """
        if dtype not in ("auto", *DTYPES):
            raise ConfigError(f"--dtype {dtype}: choose one of auto, {', '.join(DTYPES)}")
        own = read_decoder_config(folder)
        self.config: ModelSizes = own or read_hf_config(folder)[1]
        self.dtype = fastest_dtype(self.config, device) if dtype == "auto" else dtype
        self.is_deterministic = is_deterministic
        self.folder = folder
        activations, kind = DTYPES[self.dtype]
        self._itemsize = activations.itemsize
        self._loader: LayerLoader
        if own is not None:
            self._loader = DecoderLoader(own, activations, kind, device, is_isolated=is_deterministic)
        else:  # one sequence after the other: deterministic in any case
            self._loader = HfLoader(folder, activations, kind, device)

    @property
    def layers(self) -> int:
        """How many there are, entry and exit included."""
        return self._loader.layers

    def costs(self, size: CacheSize) -> list[LayerBytes]:
        """Of each layer, with caches of this size; by sizes alone.

        Raises:
            ConfigError: the model cannot be cut into stages.
        """
        costs = self._loader.costs()
        weight = _weight_bytes(self.dtype)
        cache = size.slots * size.length * self.bytes_per_position() / (len(costs) - 2)
        entry, *blocks, last = costs
        return [
            LayerBytes(entry.time * self._itemsize, entry.parameters * self._itemsize),
            *(LayerBytes(block.time * weight, block.parameters * weight + cache) for block in blocks),
            LayerBytes(last.time * weight, last.parameters * weight),
        ]

    def bytes_per_position(self) -> int:
        """Of keys and values, of one position of a sequence, in all blocks."""
        return self._loader.bytes_per_position()

    def decoder(self, layers: range, size: CacheSize) -> LayerDecoder:
        """Some layers, with an empty cache; blocks while it reads what is not there yet. The others are forgotten.

        Raises:
            ConfigError: the model cannot be cut there, or does not run.
            CheckpointError: the files are damaged.
        """
        # Pieces and copies that are gone again must not stay as gaps between those that are not.
        give_memory_back(_PIECE_BYTES)
        try:
            with TensorFiles(self.folder) as files:
                return self._loader.load(files, layers, slots=size.slots, length=size.length)
        finally:
            give_memory_back()
