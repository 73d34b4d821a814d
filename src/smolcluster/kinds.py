"""Names of types that several layers share. Not `types.py`: a script run beside that could not import enum."""

from __future__ import annotations

from typing import Literal, TypeAlias

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
JsonObject: TypeAlias = "dict[str, JsonValue]"

Algorithm = Literal["single", "classicdp", "fsdp", "syncps", "edp", "mp", "mp_pipeline", "ep"]
Backend = Literal["tcp", "gloo", "nccl"]
Precision = Literal["fp64", "fp32", "bf16", "fp16"]
Compression = Literal["none", "bf16", "fp16", "int8"]
PipelineSchedule = Literal["gpipe", "1f1b", "interleaved"]
