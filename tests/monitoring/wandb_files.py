"""Reads the files of offline W&B runs back: records of LevelDB's log format, each a protobuf message of wandb's."""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 32 << 10
_HEADER_BYTES = 7
_FULL, _FIRST, _LAST = 1, 2, 4


@dataclass
class OfflineRun:
    """What one offline run would upload."""

    name: str = ""
    group: str = ""
    project: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    kinds: set[str] = field(default_factory=set)


def offline_runs(folder: Path) -> list[OfflineRun]:
    """All of a run folder, by name."""
    files = folder.glob("wandb/offline-run-*/*.wandb")
    return sorted((read_run(path) for path in files), key=lambda run: run.name)


def read_run(path: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record

    run = OfflineRun()
    for payload in _records(path.read_bytes()):
        record = Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        run.kinds.add(kind)
        if kind == "run":
            run.name, run.group = record.run.display_name, record.run.run_group
            run.project, run.job_type = record.run.project, record.run.job_type
            run.config |= {_key(item): json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            run.points.append({_key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            run.summary |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def _records(data: bytes) -> list[bytes]:
    assert data[:4] == b":W&B"
    records, parts, at = [], b"", _HEADER_BYTES
    while at + _HEADER_BYTES <= len(data):
        if _BLOCK_BYTES - at % _BLOCK_BYTES < _HEADER_BYTES:  # too little is left of a block for another record
            at += _BLOCK_BYTES - at % _BLOCK_BYTES
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", data, at)
        at += _HEADER_BYTES
        parts = data[at : at + length] if kind in (_FULL, _FIRST) else parts + data[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            records.append(parts)
    return records
