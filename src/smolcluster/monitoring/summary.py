"""`summary.json`: what a run gave, under the keys of CONTRACT section 2."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from smolcluster.errors import TrainingStopped
from smolcluster.kinds import JsonObject, JsonValue

RUN_KEYS = (
    "algorithm", "model", "world_size", "steps", "samples", "tokens", "wall_s", "tokens_per_s", "train_loss",
    "val_loss", "val_accuracy", "val_perplexity", "parameters", "weights_sha256", "lost_ranks", "joined_ranks",
    "restarts",
)  # fmt: skip
# summary key → key of a rank's own report
RANK_KEYS = {
    "rank_samples": "samples",
    "rank_weights_sha256": "weights_sha256",
    "parameter_bytes": "parameter_bytes",
    "gradient_bytes": "gradient_bytes",
    "optimizer_bytes": "optimizer_bytes",
    "peak_rss_bytes": "peak_rss_bytes",
    "sent_bytes": "sent_bytes",
    "recv_bytes": "recv_bytes",
}


def build_summary(run: Mapping[str, JsonValue], ranks: Sequence[Mapping[str, JsonValue] | None]) -> JsonObject:
    """All keys, null where nothing is known.

    Args:
        run: values of RUN_KEYS; others are refused.
        ranks: each rank's report in rank order; None: the rank is lost or gave none.
    """
    unknown = set(run) - set(RUN_KEYS)
    assert not unknown, f"not keys of summary.json: {sorted(unknown)}"
    summary: JsonObject = {key: run.get(key) for key in RUN_KEYS}
    for key in ("lost_ranks", "joined_ranks"):
        summary[key] = run.get(key) or []
    summary["restarts"] = run.get("restarts") or 0
    for key, own in RANK_KEYS.items():
        summary[key] = [None if report is None else report.get(own) for report in ranks]
    return summary


def write_summary(path: Path, summary: JsonObject) -> None:
    """Write it whole or not at all: a reader never sees half a file.

    Raises:
        TrainingStopped: the disk is full or the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise TrainingStopped(
            f"the summary cannot be written to {path} ({exc.strerror or exc}). Free some space; metrics.jsonl and the "
            "checkpoints hold what the run gave"
        ) from exc
