"""Any causal language model of transformers, from a folder or a Hugging Face id, as a module: tokens in, logits out.

Text is padded on the right, if at all. Under causal attention no token sees what follows it, so the padding changes
nothing for the tokens before it and needs no mask; its targets carry no loss.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from smolcluster.config.schema import ModelConfig
from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.hub import first_line, import_extra, quiet_transformers
from smolcluster.models.folder import load_tensors, model_folder, weight_files
from smolcluster.models.hf_layers import find_layers, run_layers
from smolcluster.models.init import named_seed
from smolcluster.models.sampling import sample_tokens
from smolcluster.models.stage import Layers

# What transformers raises for a config.json or weights that it can do nothing with.
_REFUSALS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)
# The method of its models that advises a mask where a text begins or ends with the padding token.
_ADVICE = "warn_if_padding_and_no_attention_mask"
# Its models draw from the process's one generator, and its log is the process's too: ranks that are threads take turns.
_TURN = threading.Lock()


class HFModel(nn.Module):
    """A causal language model of transformers, under its own parameter names.

    Its parts are registered here directly, so `state_dict()` has the names of Hugging Face, without a prefix.
    """

    def __init__(self, inner: Any, max_seq_len: int | None) -> None:
        """Take a transformers model over.

        Args:
            inner: an AutoModelForCausalLM.
            max_seq_len: the longest sequence that it takes; None: any.
        """
        super().__init__()
        for name, part in inner.named_children():
            self.add_module(name, part)
        object.__setattr__(self, "inner", inner)  # past nn.Module, which would register it as a part
        for part in inner.modules():
            if hasattr(part, _ADVICE):
                setattr(part, _ADVICE, _say_nothing)
        self.max_seq_len = max_seq_len
        self._layers: Layers | None = None

    inner: Any

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a part is replaced in transformers' model too, which is the one that computes."""
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and name in self.inner._modules:
            setattr(self.inner, name, value)

    def train(self, mode: bool = True) -> HFModel:
        """Switch to training or evaluation; also the model that is no part of this one."""
        self.inner.training = mode
        return super().train(mode)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: (B, T) int64; sequences shorter than T are padded on the right with any token.

        Returns:
            (B, T, V).

        Raises:
            ConfigError: T is more than the model takes.
        """
        self._check_length(tokens)
        logits: Tensor = self.inner(input_ids=tokens, use_cache=False).logits
        return logits

    def _check_length(self, tokens: Tensor) -> None:
        if self.max_seq_len is not None and tokens.shape[1] > self.max_seq_len:
            raise ConfigError(
                f"a sequence of {tokens.shape[1]} tokens is longer than the model's limit of {self.max_seq_len}. "
                "Set a smaller model.max_seq_len"
            )

    def layers(self) -> Layers:
        """See models/stage.py."""
        if self._layers is None:
            with _TURN, quiet_transformers():
                self._layers = find_layers(self, self.inner)
        return self._layers

    def forward_layers(self, x: Tensor, layers: range) -> Tensor:
        """(B, T) ids or (B, T, D) to (B, T, D) or logits (B, T, V); see models/stage.py."""
        if layers.start == 0:
            self._check_length(x)
        return run_layers(self.inner, self.layers(), x, layers)

    def generate(
        self, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 0
    ) -> Tensor:
        """Continue each sequence (B, T) by `max_new_tokens`; see `sample_tokens`."""
        return sample_tokens(
            self,
            lambda context: self(context)[:, -1],
            tokens,
            max_new_tokens,
            max_seq_len=self.max_seq_len or tokens.shape[1] + max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )

    def save_pretrained(self, folder: str) -> None:
        """Write config.json and model.safetensors as transformers does, in the model's own dtype."""
        with quiet_transformers():
            # One file whatever its size: CONTRACT's export is model.safetensors.
            self.inner.save_pretrained(folder, max_shard_size="100TB")


def build_hf(config: ModelConfig, *, seed: int, vocab_size: int | None, with_weights: bool) -> HFModel:
    """Build the model that `model.hf_model_name` names: float32, on the CPU, in training mode. Perhaps a download.

    Args:
        config: the section `model`.
        seed: of random weights.
        vocab_size: token ids of the data's tokenizer; None: not checked.
        with_weights: load the published weights; False: random ones, which depend on (seed, module name) only.

    Raises:
        ConfigError: there is no such model, transformers does not know it, or it is too small for the data.
        CheckpointError: its weights are damaged or incomplete.
    """
    transformers = import_extra("transformers", "model.type hf")
    folder = model_folder(config.hf_model_name, with_weights=with_weights)
    with own_generator(seed):
        try:
            hf_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            if getattr(hf_config, "quantization_config", None) is not None:
                raise ConfigError(f"the model in {folder} is quantized, which cannot be trained. Use the original")
            if with_weights:
                inner = _load(transformers, folder, hf_config)
            else:
                inner = transformers.AutoModelForCausalLM.from_config(
                    hf_config, dtype=torch.float32, trust_remote_code=False
                )
        except _REFUSALS as exc:
            raise ConfigError(
                f"transformers cannot build a causal language model from {folder} ({first_line(exc)}). Code in a "
                "model's folder is never executed; check the folder, and the version of transformers"
            ) from exc
        if not with_weights:
            init_hf_parameters(inner, seed)
    check_causal(inner, folder)
    _check_sizes(config, inner, folder, vocab_size)
    return HFModel(inner, _longest(inner)).train()


def init_hf_parameters(inner: Any, seed: int, only: Iterable[Tensor] | None = None) -> None:
    """Initialise a model by its own rules, each module from (seed, module name); in place.

    transformers draws all parameters from the global generator one after the other, so that each depends on what
    was built before it. Here each module draws from a seed of its own. The global generator's state is used up:
    call it in `fork_rng`. A tied parameter counts under its first module.

    Args:
        inner: the model of transformers.
        seed: the run's seed.
        only: leave modules alone in which, however deep, none of these parameters is; None: initialise all modules.
    """
    initialised: set[int] = set()
    wanted = None if only is None else {id(param) for param in only}

    def visit(module: Any, name: str, owner: Any) -> None:
        for child_name, child in module.named_children():
            # A model inside a model has rules of its own.
            is_model = hasattr(child, "_init_weights")
            visit(child, f"{name}.{child_name}" if name else child_name, child if is_model else owner)
        params = {id(param) for param in module.parameters(recurse=False)}
        if params and params <= initialised:
            return
        initialised.update(params)
        if wanted is not None and wanted.isdisjoint(id(param) for param in module.parameters()):
            return
        torch.default_generator.manual_seed(named_seed(name, seed))
        # After its children: GPT-2's attention draws its projection again, narrower than a plain one.
        owner._init_weights(module)

    with torch.no_grad():
        visit(inner, "", inner)
    inner.tie_weights()


def draw_hf_parameters(model: HFModel, names: Collection[str], seed: int) -> dict[str, Tensor] | None:
    """What `init_hf_parameters` gives some of the parameters, on the CPU; no others are made.

    Args:
        model: with its parameters on the meta device. It is busy meanwhile, and then as it was.
        names: which parameters, tied ones by their first names.
        seed: the run's seed.

    Returns:
        The values by name; None if some begin as what their module's constructor gave them.
    """
    shapes = {name: model.get_parameter(name) for name in names}
    if not all(like.is_floating_point() for like in shapes.values()):
        return None
    # Not a number: what nobody draws keeps it.
    drawn = {name: nn.Parameter(torch.full_like(like, math.nan, device="cpu")) for name, like in shapes.items()}
    try:
        with own_generator(seed), _replaced(model, drawn), _DrawsForMeta():  # type: ignore[no-untyped-call]  # torch's
            init_hf_parameters(model.inner, seed, only=drawn.values())
    except RuntimeError:  # something was computed from values that are on the meta device
        return None
    values = {name: param.detach() for name, param in drawn.items()}
    return None if any(math.isnan(value.sum()) for value in values.values()) else values


def stored_names(model: HFModel, stored: Mapping[str, Tensor]) -> dict[str, str] | None:
    """For each name in the model's state dict, the tensor of its folder that transformers would load there as it is.

    Args:
        model: its parameters may be on the meta device.
        stored: the folder's tensors. Nothing of them is read, unless there are several for a tied parameter.

    Returns:
        Names in the files by names in the model; None if transformers would make one tensor out of others, or find that
        one is missing or of another shape. Then it has to load the whole model.
    """
    own = model.state_dict(keep_vars=True)
    conversions = conversions_of(model.inner)
    if conversions is None:
        return None
    found: dict[int, list[str]] = {}
    for name, tensor in stored.items():
        target, pattern = loaded_name(name, own, model.inner.base_model_prefix, conversions)
        if pattern is not None or (target in own and own[target].shape != tensor.shape):
            return None
        if target in own:
            found.setdefault(id(own[target]), []).append(name)
    names = {}
    for name, target_tensor in own.items():
        places = found.get(id(target_tensor), [])
        # transformers does not tie what differs in the file.
        if not places or any(not _same_bits(stored[place], stored[places[0]]) for place in places[1:]):
            return None
        names[name] = places[0]
    return names


def adopt_folder(model: HFModel, folder: Any, stored: Iterable[str]) -> None:
    """Give a model that was made from its configuration what else from_pretrained takes from a folder, in place.

    Args:
        model: one that has `stored_names`.
        folder: its folder.
        stored: the names in the folder's files.
    """
    transformers = import_extra("transformers", "model.type hf")
    with _TURN, quiet_transformers(), contextlib.suppress(OSError, ValueError):  # most folders have none
        model.inner.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    used = conversions_of(model.inner) or []
    for name in stored:
        loaded_name(name, {}, "", used)
    # It is saved under the names that it has in the folder. Until transformers 5.5 conversions do not tell whether they
    # were used, and from_pretrained keeps all.
    model.inner._weight_conversions = [each for each in used if not hasattr(each, "was_used") or each.was_used()]


def conversions_of(inner: Any) -> list[Any] | None:
    """What transformers does to names and tensors of this model when it loads them; None: it cannot be asked."""
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
    except ImportError:  # before transformers 5
        return None if getattr(inner, "_checkpoint_conversion_mapping", None) else []
    # Names are changed first, by all that match; then tensors.
    return sorted(mapping.get_model_conversion_mapping(inner), key=is_converter)


def is_converter(conversion: Any) -> bool:
    return hasattr(conversion, "operations")


def loaded_name(name: str, own: Collection[str], prefix: str, conversions: Iterable[Any]) -> tuple[str, str | None]:
    """The name in the model of a tensor in a file, as from_pretrained has it.

    Args:
        name: in the file.
        own: the names in the model.
        prefix: of the model inside the language model.
        conversions: as `conversions_of` gives them.

    Returns:
        The name, and the pattern of the conversion that makes it of this tensor and others; None: it stays as it is.
    """
    renamed, pattern = name, None
    for conversion in conversions:
        renamed, matched = conversion.rename_source_key(renamed)
        if matched is not None and is_converter(conversion):
            pattern = matched
            break
    target = _prefixed(renamed, own, prefix)
    if target not in own and name in own:
        return _prefixed(name, own, prefix), None
    return target, pattern


def _prefixed(name: str, own: Collection[str], prefix: str) -> str:
    """A folder may be that of the language model or of the model inside it."""
    short, long = name.removeprefix(f"{prefix}."), f"{prefix}.{name}"
    if short != name and short in own:
        return short
    return long if long in own else name


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


class _DrawsForMeta(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Lets random values for tensors on the meta device use up the generator as if they were in memory.

    A module's own rule may draw several parameters one after the other: what the second gets must not depend on whether
    the first is there.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and any(map(_is_meta, tree_leaves((args, kwargs)))):
            func(*tree_map(_in_memory, args), **tree_map(_in_memory, kwargs))
        return func(*args, **kwargs)


def _is_meta(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.is_meta) or (isinstance(value, torch.device) and value.type == "meta")


def _in_memory(value: Any) -> Any:
    if not _is_meta(value):
        return value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")


@contextlib.contextmanager
def own_generator(seed: int) -> Iterator[None]:
    """transformers by itself, with the default generator at the seed; afterwards the generator is as it was."""
    with _TURN, quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(named_seed("", seed))
        yield


@contextlib.contextmanager
def _replaced(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """The model with these parameters, wherever it has those that bear their names; afterwards as before."""
    by_old = {id(model.get_parameter(name)): param for name, param in params.items()}
    places = [
        (module._parameters, name, old)
        for module in model.modules()
        for name, old in module._parameters.items()
        if id(old) in by_old
    ]
    for held, name, old in places:
        held[name] = by_old[id(old)]
    try:
        yield
    finally:
        for held, name, old in places:
            held[name] = old


def _say_nothing(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """A mask is not needed: see above."""


def _load(transformers: Any, folder: Any, hf_config: Any) -> Any:
    files = weight_files(folder)
    try:
        inner, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=hf_config,
            dtype=torch.float32,
            use_safetensors=True,  # never a pickle
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError) as exc:
        load_tensors(folder)  # says which file is damaged
        raise CheckpointError(
            f"the weights {files[0]} cannot be read ({first_line(exc)}). Download or copy them again"
        ) from exc
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{files[0]} lacks {len(missing)} of the model's tensors (first: {missing[0]}). Name a folder with the "
            "weights of the whole language model"
        )
    return inner


def check_causal(inner: Any, folder: Any) -> None:
    """Encoders too come as language models: BERT's attention sees the next token unless its config.json forbids it."""
    if any(getattr(module, "is_decoder", None) is False for module in inner.modules()):
        raise ConfigError(
            f"the model in {folder} ({inner.config.model_type}) reads texts in both directions, so it would see what "
            "it is to predict. Name a causal language model"
        )


def _check_sizes(config: ModelConfig, inner: Any, folder: Any, vocab_size: int | None) -> None:
    rows = inner.get_input_embeddings().weight.shape[0]
    if vocab_size is not None and vocab_size > rows:
        raise ConfigError(
            f"the tokenizer has {vocab_size} ids, but the model in {folder} has {rows}. Set data.tokenizer to the "
            "model's own"
        )
    longest = _longest(inner)
    if longest is not None and config.max_seq_len > longest:
        raise ConfigError(
            f"model.max_seq_len is {config.max_seq_len}, but the model in {folder} takes at most {longest} tokens. "
            f"Set model.max_seq_len={longest} or less"
        )
    if next(inner.parameters(recurse=False), None) is not None:
        raise ConfigError(f"the model in {folder} has parameters outside of its parts, which this release cannot train")


def _longest(inner: Any) -> int | None:
    longest = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None
