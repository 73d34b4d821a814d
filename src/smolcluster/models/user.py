"""A model class of the user's own: `package.module:ClassName`, imported from the working directory or PYTHONPATH."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

import torch
from torch import nn

from smolcluster.config.schema import ModelConfig
from smolcluster.errors import ConfigError
from smolcluster.hub import first_line
from smolcluster.models.init import init_parameters, named_seed


def build_user_model(config: ModelConfig, *, seed: int, vocab_size: int | None, num_classes: int | None) -> nn.Module:
    """Import the class that `model.type` names and make one, with `model.args` as keyword arguments.

    A constructor that names `vocab_size`, `num_classes` or `max_seq_len` gets the data's number, or
    `model.max_seq_len`, unless `model.args` has one. Random numbers drawn in the constructor depend on the seed
    only; parameters with an `init_rule` are initialised from (seed, name) like the built-in models'.

    Raises:
        ConfigError: there is no such module or class, or it cannot be made.
    """
    made = _find_class(config.type)
    arguments = dict(config.args)
    signature = inspect.signature(made)
    known = {"vocab_size": vocab_size, "num_classes": num_classes, "max_seq_len": config.max_seq_len}
    for name, value in known.items():
        if name in signature.parameters and name not in arguments and value is not None:
            arguments[name] = value
    try:
        signature.bind(**arguments)
    except TypeError as exc:
        raise ConfigError(
            f"model.args do not fit {config.type}: {exc}. It takes {', '.join(signature.parameters) or 'none'}; "
            f"given: {', '.join(arguments) or 'none'}"
        ) from exc
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(named_seed(config.type, seed))
        try:
            model = made(**arguments)
        except Exception as exc:
            raise ConfigError(
                f"model.type {config.type} cannot be made: {_where(exc, made)}. Check model.args"
            ) from exc
    if not any(param.requires_grad for param in model.parameters()):
        raise ConfigError(f"model.type {config.type} has no parameters to train. Give its layers names in __init__")
    init_parameters(model, seed)
    trained: nn.Module = model.train()
    return trained


def _find_class(spec: str) -> type[nn.Module]:
    module_name, _, class_name = spec.partition(":")
    directory = os.getcwd()
    if directory not in sys.path and "" not in sys.path:
        # First, as `python -m` has it: an installed command has its own folder there.
        sys.path.insert(0, directory)
    importlib.invalidate_caches()  # the file may be younger than the last look into its folder
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as exc:
        if isinstance(exc, ModuleNotFoundError) and f"{module_name}.".startswith(f"{exc.name}."):
            raise ConfigError(
                f"model.type is {spec}, but there is no module {exc.name} in {directory} or on PYTHONPATH. Start "
                "from the folder that holds it, or set PYTHONPATH"
            ) from exc
        raise ConfigError(f"model.type is {spec}, but importing {module_name} fails: {_where(exc)}. Mend it") from exc
    found: Any = getattr(module, class_name, None)
    if found is None:
        classes = [name for name, value in vars(module).items() if _is_module_class(value)]
        raise ConfigError(
            f"model.type is {spec}, but {module.__file__} has no {class_name}; its models are: "
            f"{', '.join(classes) or 'none'}"
        )
    if not _is_module_class(found):
        raise ConfigError(f"model.type is {spec}, but {class_name} is no subclass of torch.nn.Module. Name a class")
    return found  # type: ignore[no-any-return]  # looked at the line before


def _is_module_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _where(error: BaseException, made: type[nn.Module] | None = None) -> str:
    """The error and its line, in the class's own file if it passed there: there is no traceback on the screen."""
    if isinstance(error, SyntaxError):  # raised where files are read, about a line that never ran
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = inspect.getinnerframes(error.__traceback__, context=0) if error.__traceback__ else []
    own_file = None if made is None else getattr(sys.modules.get(made.__module__), "__file__", None)
    frames = [frame for frame in frames if frame.filename == own_file] or frames
    return first_line(error) + (f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else "")
