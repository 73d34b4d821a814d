"""Every key a user may set: its type, its only default, its unit and its effect.

A field's docstring is its documentation (`Field.description`); `smolcluster config show` prints the keys, and
docs are generated from here. The key names are those of CONTRACT section 2. The models are frozen and refuse
unknown keys. Imports neither torch nor anything above this layer.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from smolcluster.kinds import Algorithm, Backend, Compression, PipelineSchedule, Precision

LANGUAGE_MODELS = ("gpt", "moe", "hf")
FILE_DATASETS = ("text", "jsonl", "parquet")  # read from data.path
TEXT_DATASETS = ("wikitext2", "snli", "pydoc", *FILE_DATASETS)
IMAGE_DATASETS = ("mnist", "digits")

_GPT_KEYS = frozenset(
    ("type", "model_dim", "num_layers", "num_heads", "ff_dim", "dropout", "max_seq_len", "vocab_size", "init")
)
# Keys of `model` that have an effect, by built-in type.
MODEL_KEYS = {
    "simple_nn": frozenset(("type", "input_dim", "hidden", "out", "init")),
    "gpt": _GPT_KEYS | {"hf_model_name"},
    "moe": _GPT_KEYS | {"num_experts", "top_k", "capacity_factor", "aux_loss_weight", "z_loss_weight", "router_noise"},
    "hf": frozenset(("type", "hf_model_name", "init", "max_seq_len")),
}


# What a folder of transformers has beside a model that reads text, whatever the kind of tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")

# --- types of values


@dataclass(frozen=True, slots=True)
class Accepts:
    """Says in words what a type accepts, for error messages and documentation."""

    text: str


def _not_a_switch(value: object) -> object:
    # Python's True is an int: without this `batch_size: true` would mean 1.
    if isinstance(value, bool):
        raise ValueError("a switch is not a number")
    return value


def _countable(value: int) -> int:
    if abs(value) > _LARGEST_INT:
        raise problem(f"more than {_LARGEST_INT}, the largest whole number that torch knows")
    return value


def _address(value: str) -> str:
    if ":" in value or re.fullmatch(r"[0-9.]+", value):
        ipaddress.ip_address(value)
    elif not re.fullmatch(_HOST_NAME, value):
        raise ValueError("neither an IP address nor a host name")
    return value


# No leading "-" and no blank: these names become arguments of ssh and rsync.
_HOST_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"
_USER_MODEL = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"

_LARGEST_INT = 2**63 - 1

_Int: TypeAlias = Annotated[int, BeforeValidator(_not_a_switch), AfterValidator(_countable)]
_Float: TypeAlias = Annotated[float, BeforeValidator(_not_a_switch)]
NonNegativeInt: TypeAlias = Annotated[_Int, Ge(0)]
PositiveInt: TypeAlias = Annotated[_Int, Ge(1)]
Port: TypeAlias = Annotated[_Int, Ge(1), Le(65535)]
NonNegative: TypeAlias = Annotated[_Float, Ge(0)]
Positive: TypeAlias = Annotated[_Float, Gt(0)]
Fraction: TypeAlias = Annotated[_Float, Ge(0), Le(1)]
HostName: TypeAlias = Annotated[
    str, Field(pattern=f"^{_HOST_NAME}$"), Accepts("a host name (letters, digits, '.', '-', '_')")
]
Address: TypeAlias = Annotated[str, AfterValidator(_address), Accepts("an IP address or a host name")]
ModelType: TypeAlias = Annotated[
    str,
    Field(pattern=f"^(simple_nn|gpt|moe|hf|{_USER_MODEL})$"),
    Accepts("one of simple_nn, gpt, moe, hf, or package.module:ClassName of your own"),
]
Shares: TypeAlias = Annotated[
    Literal["even", "auto"] | dict[HostName, Positive] | tuple[Positive, ...],
    Accepts("even, auto, a list of weights above 0 in rank order, or a map of host names to weights"),
]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no infinities."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),  # model_dim and model_name are the spec's own names
    )


# --- sections


class ModelConfig(Section):
    """What is trained. Keys that `type` has no use for are ignored."""

    type: ModelType = "simple_nn"
    """Architecture: `simple_nn` (two-layer perceptron), `gpt` (GPT-2's shape), `moe` (gpt with experts), `hf` (any
    causal language model of transformers), or `package.module:ClassName` of your own."""
    args: dict[str, JsonValue] = {}
    """Keyword arguments for your own model class; no effect on the built-in types."""

    input_dim: PositiveInt = 784
    """simple_nn: numbers per sample (MNIST: 784 pixels)."""
    hidden: PositiveInt = 128
    """simple_nn: width of the hidden layer."""
    out: PositiveInt = 10
    """simple_nn: number of classes."""

    model_dim: PositiveInt = 256
    """gpt, moe: width of the residual stream; a multiple of `num_heads`."""
    num_layers: PositiveInt = 6
    """gpt, moe: number of transformer blocks."""
    num_heads: PositiveInt = 4
    """gpt, moe: attention heads per block."""
    ff_dim: PositiveInt = 1024
    """gpt, moe: width of the feed-forward layer."""
    dropout: Annotated[_Float, Ge(0), Le(0.99)] = 0.1
    """gpt, moe: probability with which an activation is dropped in training. Random numbers differ between ranks, so
    runs with another number of ranks give the same losses only at 0."""
    max_seq_len: PositiveInt = 128
    """gpt, moe, hf: tokens per sample, and the longest context."""
    vocab_size: PositiveInt | None = None
    """gpt, moe: number of token ids. null: the tokenizer's."""

    hf_model_name: str | None = None
    """hf: Hugging Face id or local folder of the model; gpt with `init: pretrained`: of a GPT-2."""
    init: Literal["random", "pretrained"] = "random"
    """Start from random weights, or (hf, gpt) from the published ones of `hf_model_name`."""

    num_experts: PositiveInt = 8
    """moe: experts per block, spread over the ranks by `ep`."""
    top_k: PositiveInt = 2
    """moe: experts that each token is sent to; at most `num_experts`."""
    capacity_factor: Positive | None = 1.25
    """moe: room of an expert, in multiples of an even share of the tokens of a micro-batch over all ranks; in training,
    tokens beyond it pass by. null: no limit."""
    # Switch's 0.01 is for batches of a million tokens: of 8 samples of tiny Shakespeare it leaves an expert with twice
    # the even load after 300 steps for some seeds (benchmarks/results/expert_balance.json).
    aux_loss_weight: NonNegative = 0.05
    """moe: weight of the load-balancing loss. 0: off."""
    z_loss_weight: NonNegative = 0.001
    """moe: weight of the loss that keeps the router's logits small. 0: off."""
    router_noise: NonNegative = 0.0
    """moe: standard deviation of the noise on the router's logits in training, the same for a sample on any number of
    ranks; for `single` and `ep`."""


class TrainingConfig(Section):
    """How it is trained."""

    batch_size: PositiveInt | None = None
    """Samples per step and rank (mp, mp_pipeline: per step). null: 32 up to 128 tokens per sample, 16 up to 256, else
    max(1, 4096 // tokens)."""
    epochs: PositiveInt | None = None
    """Passes over the training data. null: `max_steps` alone decides where it is set, else 30 for wikitext2, 20 for
    snli, 3 for all others."""
    max_steps: PositiveInt | None = None
    """Optimizer updates after which training ends, if `epochs` does not end it before. null: no limit."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Update rule: AdamW, or plain SGD."""
    learning_rate: Positive = 1e-3
    """Peak learning rate, reached after the warm-up."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay per update, times the learning rate."""
    grad_clip_norm: Positive | None = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. null: no clipping."""
    micro_batches: PositiveInt = 1
    """Parts that a rank's batch is computed in, one after the other (gradient accumulation); for mp_pipeline the number
    of micro-batches in the pipeline."""
    schedule: PipelineSchedule = "1f1b"
    """mp_pipeline: order of forward and backward passes."""
    stages_per_rank: PositiveInt = 2
    """mp_pipeline with schedule `interleaved`: stages that each rank has."""
    precision: Precision = "fp32"
    """Arithmetic: `fp64` and `fp32` throughout; `bf16` and `fp16` in matrix products, with fp32 weights (fp16:
    with loss scaling)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where a rank computes. auto: cuda, else mps, else cpu."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass, not keep them: less memory, a third to a half more time."""
    eval_steps: PositiveInt | None = 200
    """Updates between evaluations on the validation split. null: only at the end."""
    track_gradients: bool = False
    """Write `grad_norm/<parameter>` into the metrics."""
    polyak_alpha: Fraction = 0.0
    """syncps: how much of its own weights a worker keeps when it takes the server's. 0: none."""


class LrScheduleConfig(Section):
    """How the learning rate changes from update to update."""

    kind: Literal["cosine", "constant"] = "cosine"
    """`cosine`: from the peak down to `min_lr` at the last update; `constant`: stays at the peak."""
    warmup_iters: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly to its peak."""
    min_lr: NonNegative = 0.0
    """cosine: learning rate of the last update; at most training.learning_rate."""


class DataConfig(Section):
    """What it is trained on."""

    dataset: str = "mnist"
    """`mnist`, `digits`, `wikitext2`, `snli`, `pydoc` (text that ships with Python), `text`, `jsonl` or `parquet` (the
    file or folder `path`), or a Hugging Face id. Not set: mnist, for language models wikitext2."""
    path: str | None = None
    """File or folder that the data is read from, relative to the working directory. Needed for `text`, `jsonl` and
    `parquet`."""
    text_column: str | None = None
    """Column (JSON key) that holds the text, for Hugging Face datasets and for jsonl and parquet files. null: `text`,
    else the only column of texts."""
    train_split: str = "train"
    """Name of the split that is trained on."""
    tokenizer: str = "bytes"
    """Turns text into token ids: `bytes` (256 ids, built in), a folder or file, or a Hugging Face id. Not set: the
    model's own for model.type hf and for a pretrained gpt, else bytes."""
    streaming: bool = False
    """Read the data while training instead of loading it first: for data larger than memory."""


class CheckpointConfig(Section):
    """What is kept for resuming."""

    steps: PositiveInt | None = 500
    """Updates between checkpoints. null: only at the end and on Ctrl-C."""
    keep: PositiveInt | None = 3
    """How many checkpoints are kept, the newest ones. null: all."""
    save_optimizer: bool = True
    """Store the optimizer's state too. false: smaller files, but a resumed run is not the same run."""


class LoggingConfig(Section):
    """What is shown and sent to Weights & Biases. `metrics.jsonl` holds every step whatever stands here."""

    project_name: str = "smolcluster"
    """Project name at Weights & Biases."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Send metrics to Weights & Biases, or write its files to disk only."""
    log_interval: PositiveInt = 10
    """Steps between lines on the console and points at Weights & Biases."""


class TopologyHost(Section):
    """One rank of `allToAllTopology`."""

    hostname: HostName
    """The machine's name: what `smolcluster node --hostname` is given."""
    rank: NonNegativeInt
    """Its rank; the ranks of a file are 0, 1, 2, … without a gap."""
    port: Port | None = None
    """TCP port it listens on. null: from cluster.port."""
    ip: Address | None = None
    """Address it listens on and the others dial. null: from cluster.host_ip."""


class TopologyWorkers(Section):
    """The ranks of `allToAllTopology`."""

    regular: Annotated[tuple[TopologyHost, ...], Accepts("a list of {hostname, rank, port, ip}")] = ()
    """One entry per rank, in any order."""

    @model_validator(mode="after")
    def _every_rank_once(self) -> TopologyWorkers:
        names, ranks = [host.hostname for host in self.regular], [host.rank for host in self.regular]
        for place in range(len(names)):
            if names[place] in names[:place]:
                raise problem(f"{names[place]} is given twice", "regular", place, "hostname")
            if ranks[place] in ranks[:place]:
                raise problem(f"{ranks[place]} is given twice", "regular", place, "rank")
        if sorted(ranks) != list(range(len(ranks))):
            listed = ", ".join(map(str, sorted(ranks)))
            raise problem(f"the ranks are {listed}; expected 0 to {len(ranks) - 1} without a gap", "regular")
        return self


class AllToAllTopology(Section):
    """Every rank talks to every other."""

    workers: TopologyWorkers = TopologyWorkers()
    """The ranks."""


class WebInterface(Section):
    """Ports of the serving process."""

    api_port: Port = 8080
    """Port of the API and of the chat page."""
    frontend_port: Port | None = None
    """Second port that answers with the chat page. null: none."""


class SshHost(Section):
    """How `smolcluster launch` reaches one machine. Not the address of its data connections."""

    host: Address | None = None
    """Address for ssh. null: the machine's name, as the user's ssh configuration knows it."""
    user: Annotated[str, Field(pattern=f"^{_HOST_NAME}$"), Accepts("a user name")] | None = None
    """User name. null: ssh's own default."""
    port: Port | None = None
    """Port of its ssh server. null: ssh's own default (22)."""
    identity_file: str | None = None
    """Private key. null: ssh's own default."""
    os: Literal["linux", "macos", "windows"] = "linux"
    """Operating system; decides which commands are sent."""


class ClusterConfig(Section):
    """Who takes part and how the machines talk."""

    seed: NonNegativeInt = 42
    """Seed of weights, data order and dropout. Same seed, same run."""
    num_workers: PositiveInt | None = None
    """Number of ranks; for edp, syncps, mp and serving without the server. null: as many as the hosts below.
    `--local N` replaces it."""

    host_ip: dict[HostName, Address] = {}
    """Host name → address. The order is the rank order where `workers` is not set. Of a worker also the address of the
    server, at which it then reaches it."""
    port: Port | dict[HostName, Port] = 65432
    """TCP port of all hosts, or host name → port with `default` for the others."""
    server: HostName | None = None
    """Name of the server (edp, syncps), or of rank 0. Must be a key of host_ip."""
    workers: tuple[HostName, ...] | None = None
    """Names of the workers in rank order. Must be keys of host_ip. null: the first other hosts of host_ip, after the
    server."""
    allToAllTopology: AllToAllTopology | None = None  # noqa: N815 - the spec's own key name
    """Ranks with name, address and port, for algorithms without a server."""
    interface: str | None = None
    """Network interface to listen on, such as `en0` or `eth0`. null: the one that holds this host's address."""

    staleness_bound: NonNegativeInt | None = None
    """Steps that a gradient may be late (K). null: 0; for edp unbounded."""
    fsdp_stage: Literal[0, 1, 2, 3] = 1
    """fsdp: what is sharded. 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    worker_update_interval: PositiveInt = 1
    """edp, syncps: steps between a worker's pulls of the server's weights."""
    timeout: Positive | None = None
    """syncps: seconds after the first push of a step when it closes without the stragglers. null: wait for all."""
    patience: Annotated[_Float, Ge(0.1), Le(86400)] = 5.0
    """Seconds until a silent peer counts as lost. Every other network timeout derives from it."""
    min_ranks: PositiveInt | None = None
    """Fewest ranks to go on with after a loss. null: all ranks; for syncps and edp 2, the server and one worker."""
    shares: Shares = "even"
    """How the global batch is divided over the ranks: `even`, `auto` (by measured speed), or relative weights. Never
    changes the global batch."""
    layer_distribution: tuple[PositiveInt, ...] | dict[HostName, PositiveInt] | None = None
    """mp, mp_pipeline, serving: layers per rank, as a list in rank order or a map per host. null: by cost."""

    use_quantization: bool | None = None
    """Older name for `compression: int8`. null: `compression` decides."""
    compression: Compression = "none"
    """What gradients are sent as: unchanged, 16-bit floats, or 8-bit integers with error feedback."""
    bucket_bytes: Annotated[_Int, Ge(1024)] = 4 * 1024 * 1024
    """Bytes of gradients that are sent together while the backward pass goes on."""
    buffer_size: PositiveInt | dict[HostName, PositiveInt] | None = None
    """Socket buffers in MiB, both directions, for all hosts or per host. null, or a host that is not in the map: the
    kernel tunes them."""
    memory: Positive | dict[HostName, Positive] | None = None
    """Memory of the machines in GiB, for all hosts or per host; only for the warning that a model will not fit. null,
    or a host that is not in the map: as much as this machine."""
    shared_memory: Literal["auto", "off"] = "auto"
    """auto: ranks at one address exchange tensors in shared memory where they can. off: over TCP. Backend tcp."""
    tls: bool = False
    """Encrypt all connections between ranks, alike on every machine. Backend tcp; needs the extra `tls`."""

    track_network_metrics: bool = True
    """Write bandwidth, round-trip time and buffer use of every link into the metrics."""
    metrics_log_interval: PositiveInt = 50
    """Steps between those entries."""

    num_nodes: PositiveInt | None = None
    """Number of machines, as older files repeat it; the hosts decide."""
    num_layers: PositiveInt | None = None
    """Number of the model's layers, where model.num_layers is not given."""
    model_name: str | None = None
    """Name of the architecture, such as `causal_gpt2`, where model.type is not given."""
    web_interface: WebInterface = WebInterface()
    """Ports of the serving process."""
    ssh: dict[HostName, SshHost] = {}
    """Host name → how `smolcluster launch` reaches it. Not listed: by its name."""


class GreedyStrategy(Section):
    """Always the most probable token."""

    temperature: Positive = 1.0
    """No effect; older files have it."""


class SamplingStrategy(Section):
    """Draw from the whole distribution."""

    temperature: Positive = 1.0
    """Above 1 more random, below 1 less."""


class TopPStrategy(Section):
    """Draw from the most probable tokens that together reach p."""

    temperature: Positive = 1.0
    """Above 1 more random, below 1 less."""
    p: Annotated[_Float, Gt(0), Le(1)] = 0.9
    """Probability that the tokens drawn from reach together."""


class TopKStrategy(Section):
    """Draw from the k most probable tokens."""

    temperature: Positive = 1.0
    """Above 1 more random, below 1 less."""
    k: PositiveInt = 40
    """Number of tokens drawn from."""


class DecodingStrategies(Section):
    """Parameters of each way to choose the next token."""

    greedy: GreedyStrategy = GreedyStrategy()
    """Always the most probable token."""
    sampling: SamplingStrategy = SamplingStrategy()
    """Draw from the whole distribution."""
    top_p: TopPStrategy = TopPStrategy()
    """Draw from the most probable tokens that together reach p."""
    top_k: TopKStrategy = TopKStrategy()
    """Draw from the k most probable tokens."""


class ServingConfig(Section):
    """How a language model is served."""

    hf_model_name: str | None = None
    """Hugging Face id or local folder of the served model. null: `--model` says it."""
    weights_model_name: str | None = None
    """Key of the weights in a `model_weights.yaml` beside the configuration file, else in the preset of that name."""
    num_nodes: PositiveInt | None = None
    """Number of stages with `--cluster`; `--local N` wins. null: the cluster's ranks."""
    num_layers: PositiveInt | None = None
    """Number of layers, as older files repeat it; the model's own number wins."""
    max_new_tokens: PositiveInt = 256
    """Tokens generated where a request names no limit."""
    ctx_length: PositiveInt | None = None
    """Most tokens of prompt and answer together. null: the model's own limit."""
    active_decoding_strategy: Literal["greedy", "sampling", "top_p", "top_k"] = "top_k"
    """How the next token is chosen where a request does not say."""
    decoding_strategies: DecodingStrategies = DecodingStrategies()
    """Parameters of each way to choose the next token."""
    timeout: Positive = 300.0
    """Seconds until a request is given up."""
    max_concurrent: PositiveInt = 8
    """Requests that are generated at the same time."""
    max_queue: NonNegativeInt = 64
    """Requests that wait; more are answered with 429."""
    resume_s: NonNegative = 30.0
    """Seconds that the answer of a session goes on while nobody listens, and is kept after its end."""
    sessions_file: str | None = None
    """SQLite file with the conversations. null: one for each model, in the folder that also has the token."""
    controller: HostName | None = None
    """Host that runs API, page and scheduler but no layers. null: rank 0."""


class Config(Section):
    """The whole configuration of a run."""

    algorithm: Algorithm = "single"
    """How the work is spread over processes. `single`: plain PyTorch in one process."""
    backend: Backend = "tcp"
    """What carries tensors between ranks: our own TCP transport, or torch.distributed's gloo or nccl."""
    model: ModelConfig = ModelConfig()
    """What is trained."""
    training: TrainingConfig = TrainingConfig()
    """How it is trained."""
    lr_schedule: LrScheduleConfig = LrScheduleConfig()
    """How the learning rate changes."""
    data: DataConfig = DataConfig()
    """What it is trained on."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept for resuming."""
    logging: LoggingConfig = LoggingConfig()
    """What is shown and sent to Weights & Biases."""
    cluster: ClusterConfig = ClusterConfig()
    """Who takes part and how the machines talk."""
    serving: ServingConfig = ServingConfig()
    """How a language model is served."""

    @model_validator(mode="before")
    @classmethod
    def _fill_what_follows(cls, values: Any) -> Any:
        """Set data.dataset, data.tokenizer and cluster.compression where they are not given but follow from others."""
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        kind, name = _given(values, "model", "type"), _given(values, "model", "hf_model_name")
        if kind in LANGUAGE_MODELS:
            _fill(filled, "data", "dataset", "wikitext2")
        takes_weights = kind == "hf" or (kind == "gpt" and _given(values, "model", "init") == "pretrained")
        if takes_weights and isinstance(name, str) and _has_tokenizer(name):
            _fill(filled, "data", "tokenizer", name)
        if _given(values, "cluster", "use_quantization") in (True, "true", "yes", "on", 1):
            _fill(filled, "cluster", "compression", "int8")
        return filled

    @model_validator(mode="after")
    def _no_contradictions(self, info: ValidationInfo) -> Config:
        # The loader collects them, to name the lines they come from; anybody else gets the first one raised.
        collected = info.context.get("contradictions") if isinstance(info.context, dict) else None
        for contradiction in contradictions(self):
            if collected is None:
                raise problem(f"{contradiction.keys[0]}: {contradiction.text}")
            collected.append(contradiction)
        return self


def _given(values: dict[str, Any], section: str, key: str) -> Any:
    part = values.get(section)
    if isinstance(part, Section):
        return getattr(part, key) if key in part.model_fields_set else None
    return part.get(key) if isinstance(part, dict) else None


def _fill(values: dict[str, Any], section: str, key: str, value: str) -> None:
    part = values.get(section, {})
    if isinstance(part, Section) and key not in part.model_fields_set:
        values[section] = part.model_copy(update={key: value})
    elif isinstance(part, dict) and key not in part:
        values[section] = {**part, key: value}


def _has_tokenizer(hf_model_name: str) -> bool:
    """Whether a model brings a tokenizer: every id does, a local folder where the files are there."""
    folder = Path(hf_model_name).expanduser()
    return not folder.is_dir() or any((folder / name).is_file() for name in _TOKENIZER_FILES)


def problem(text: str, *below: str | int) -> PydanticCustomError:
    """An error of a validator whose text is shown as it stands; `below`: its place inside of what is validated."""
    return PydanticCustomError("problem", "{text}", {"text": text, "below": below})


# --- what must agree


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two or more keys that cannot hold together.

    Attributes:
        keys: dotted keys; the first is the one the error is reported at.
        text: what is wrong, and what to do.
        between_files: not an error of one file alone while one of the keys is left to another file.
    """

    keys: tuple[str, ...]
    text: str
    between_files: bool = False


def contradictions(config: Config) -> Iterator[Contradiction]:
    """Everything in a configuration that is well-formed key by key but cannot hold together."""
    yield from _model_contradictions(config)
    yield from _training_contradictions(config)
    yield from _cluster_contradictions(config.cluster)


def _model_contradictions(config: Config) -> Iterator[Contradiction]:
    model, data = config.model, config.data
    if model.type in ("gpt", "moe") and model.model_dim % model.num_heads:
        yield Contradiction(
            ("model.model_dim", "model.num_heads"),
            f"{model.model_dim} is not a multiple of model.num_heads {model.num_heads}",
        )
    if model.type == "moe" and model.top_k > model.num_experts:
        yield Contradiction(
            ("model.top_k", "model.num_experts"),
            f"{model.top_k} is more than model.num_experts {model.num_experts}",
        )
    if model.type == "moe" and model.router_noise > 0 and config.algorithm not in ("single", "ep"):
        yield Contradiction(
            ("model.router_noise", "algorithm"),
            f"{model.router_noise} needs algorithm single or ep, which know a sample's number, not {config.algorithm}",
            between_files=True,
        )
    if model.type == "hf" and not model.hf_model_name:
        yield Contradiction(("model.type", "model.hf_model_name"), "hf needs model.hf_model_name (id or folder)")
    if model.init == "pretrained" and model.type not in ("hf", "gpt"):
        yield Contradiction(
            ("model.init", "model.type"), f"pretrained needs model.type hf or gpt, but model.type is {model.type}"
        )
    if model.init == "pretrained" and model.type == "gpt" and not model.hf_model_name:
        yield Contradiction(
            ("model.init", "model.hf_model_name"), "pretrained needs model.hf_model_name (id or folder of a GPT-2)"
        )
    if data.dataset in FILE_DATASETS and not data.path:
        yield Contradiction(("data.dataset", "data.path"), f"{data.dataset} needs data.path (a file or folder)")
    wants = "text" if model.type in LANGUAGE_MODELS else "images" if model.type == "simple_nn" else None
    has = "text" if data.dataset in TEXT_DATASETS else "images" if data.dataset in IMAGE_DATASETS else None
    if wants and has and wants != has:
        yield Contradiction(
            ("data.dataset", "model.type"),
            f"{data.dataset} is {has}, but model.type {model.type} is trained on {wants}",
            between_files=True,
        )


def _training_contradictions(config: Config) -> Iterator[Contradiction]:
    training, lr_schedule = config.training, config.lr_schedule
    if lr_schedule.min_lr > training.learning_rate:
        yield Contradiction(
            ("lr_schedule.min_lr", "training.learning_rate"),
            f"{lr_schedule.min_lr:g} is more than training.learning_rate {training.learning_rate:g}",
        )
    batch_size = resolved_batch_size(config)
    if training.micro_batches > batch_size:
        yield Contradiction(
            ("training.micro_batches", "training.batch_size"),
            f"{training.micro_batches} parts of a batch of {batch_size}; lower it or raise training.batch_size",
        )
    if config.backend == "nccl" and training.device in ("cpu", "mps"):
        yield Contradiction(
            ("backend", "training.device"),
            f"nccl needs training.device cuda, but it is {training.device}; use tcp or gloo",
        )


def _cluster_contradictions(cluster: ClusterConfig) -> Iterator[Contradiction]:
    if cluster.use_quantization is not None and cluster.use_quantization != (cluster.compression == "int8"):
        yield Contradiction(
            ("cluster.compression", "cluster.use_quantization"),
            f"{cluster.compression} contradicts cluster.use_quantization {str(cluster.use_quantization).lower()} "
            "(true means int8); remove one of them",
        )
    workers = cluster.workers or ()
    doubled = next((name for name in workers if workers.count(name) > 1), None)
    if doubled is not None:
        yield Contradiction(("cluster.workers",), f"{doubled} is given twice")
    if cluster.server is not None and cluster.server in workers:
        yield Contradiction(
            ("cluster.workers", "cluster.server"), f"{cluster.server} is the server; it cannot be a worker too"
        )
    if cluster.host_ip:
        named = [("cluster.server", cluster.server)] if cluster.server else []
        for key, name in [*named, *(("cluster.workers", name) for name in workers)]:
            if name not in cluster.host_ip:
                known = ", ".join(cluster.host_ip)
                yield Contradiction((key, "cluster.host_ip"), f"{name} has no address in cluster.host_ip ({known})")


# --- what null means


def resolved_batch_size(config: Config) -> int:
    """Samples per step and rank (mp, mp_pipeline: per step): the given number, or the automatic one."""
    if config.training.batch_size is not None:
        return config.training.batch_size
    tokens = config.model.max_seq_len if reads_text(config) else 1
    if tokens <= 128:
        return 32
    return 16 if tokens <= 256 else max(1, 4096 // tokens)


def resolved_epochs(config: Config) -> int:
    """Passes over the training data: the given number, or the automatic one. See `total_steps` for max_steps."""
    if config.training.epochs is not None:
        return config.training.epochs
    return {"wikitext2": 30, "snli": 20}.get(config.data.dataset, 3)


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer updates of the whole run, from 0: what ends training and what the cosine schedule is stretched over.

    `training.max_steps` alone decides where epochs is null; where both are set, the smaller number.
    """
    max_steps = config.training.max_steps
    if max_steps is not None and config.training.epochs is None:
        return max_steps
    steps = resolved_epochs(config) * steps_per_epoch
    return steps if max_steps is None else min(steps, max_steps)


def resolved_staleness_bound(config: Config) -> int | None:
    """K: steps that a gradient may be late. None: unbounded (only edp)."""
    if config.cluster.staleness_bound is None and config.algorithm != "edp":
        return 0
    return config.cluster.staleness_bound


def reads_text(config: Config) -> bool:
    """Whether the run's samples are texts, its targets tokens. A user's model may read either."""
    if config.model.type in LANGUAGE_MODELS:
        return True
    return config.model.type != "simple_nn" and config.data.dataset not in IMAGE_DATASETS
