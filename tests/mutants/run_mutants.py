"""Break the program in the usual ways, one at a time, and see that the tests notice: `make mutants`.

Each mutant is an exact replacement of text in a copy of `src/`. Where the text is no longer there, this fails loudly:
adapt the mutant to the new code. A mutant that the tests do not notice fails as well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLASSICDP_TESTS = ("tests/algorithms/test_classicdp.py",)
INT8_TESTS = ("tests/collectives/test_int8.py",)
FSDP_TESTS = ("tests/algorithms/test_fsdp.py",)
ROWS_TESTS = ("tests/algorithms/test_fsdp_rows.py",)
STAGED_TESTS = ("tests/algorithms/test_model_parallel.py",)
SINGLE_TESTS = ("tests/algorithms/test_single.py",)
EP_TESTS = ("tests/algorithms/test_expert_parallel.py",)


@dataclass(frozen=True)
class Mutant:
    """One mistake: `old` becomes `new` in `file` (below src/smolcluster), and `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = CLASSICDP_TESTS


MUTANTS = (
    Mutant(
        "no broadcast",
        "algorithms/classicdp.py",
        "        _broadcast_model(model, comm)\n",
        "",
    ),
    Mutant(
        "wrong 1/N",
        "algorithms/classicdp.py",
        "correction = due.planned / max(sums.count, 1) / due.loss_scale",
        "correction = due.planned / max(sums.count, 1) / due.loss_scale / self._comm.world_size",
    ),
    Mutant(
        "one bucket skipped",
        "collectives/bucket.py",
        "        flat = self._set.buckets[bucket]\n",
        "        flat = self._set.buckets[bucket]\n"
        "        if len(self._pending) == 1:\n"
        "            flat = flat.clone()  # the sum goes nowhere\n",
    ),
    Mutant(
        "clip before reduce",
        "algorithms/classicdp.py",
        """        forward_backward(
            self.model,
            batches,
            loss_scale / planned,
            self._precision,
            device=self._device,
            before_last=self._buckets.arm,
            telemetry=self._comm.telemetry,
        )
""",
        """        loss_sum = forward_backward(
            self.model,
            batches,
            loss_scale / planned,
            self._precision,
            device=self._device,
            telemetry=self._comm.telemetry,
        )
        share = None if self._grad_clip_norm is None else self._grad_clip_norm / self._comm.world_size
        clip_gradients(self._params, share)
        self._buckets.arm(loss_sum)
""",
    ),
    Mutant(
        "K off by one",
        "algorithms/classicdp.py",
        "if len(self._under_way) <= self._staleness_bound:",
        "if len(self._under_way) <= self._staleness_bound - 1:",
    ),
    Mutant(
        "every rank computes the whole batch",
        "data/sampler.py",
        "return _ranges(sum(counts[:rank]), split_by_shares(counts[rank], even))",
        "return _ranges(0, split_by_shares(count, even))",
    ),
    Mutant(
        "int8: contributions forget what they lost",
        "collectives/mesh.py",
        "codec.encode_with_feedback(chunks[dst], residuals[dst], contribution)",
        "codec.encode(chunks[dst], contribution)",
        INT8_TESTS,
    ),
    Mutant(
        "int8: sums forget what they lost",
        "collectives/mesh.py",
        "    codec.encode_with_feedback(total, residual, out)\n",
        "    codec.encode(total, out)\n",
        INT8_TESTS,
    ),
    Mutant(
        "int8: the owner keeps the sum that it did not send",
        "collectives/mesh.py",
        "for src, part in {**parts, wire.rank: own}.items():",
        "for src, part in parts.items():",
        INT8_TESTS,
    ),
    Mutant(
        "int8: a resumed run begins without residuals",
        "algorithms/classicdp.py",
        "        load_residuals(reader, self._buckets.residuals, names, comm.rank, comm.world_size)\n",
        "",
        ("tests/run/test_resume.py",),
    ),
    Mutant(
        "single: K off by one",
        "algorithms/single.py",
        "if len(self._queue) <= self._staleness_bound:",
        "if len(self._queue) <= self._staleness_bound - 1:",
        SINGLE_TESTS,
    ),
    Mutant(
        "single: never clipped",
        "algorithms/single.py",
        "grad_norm = clip_gradients(self._params, self._grad_clip_norm, correction)",
        "grad_norm = clip_gradients(self._params, None, correction)",
        SINGLE_TESTS,
    ),
    Mutant(
        "fsdp: what was gathered never expires",
        "algorithms/fsdp.py",
        """            if self._shares_optimizer:
                self._gather.expire()
        # Stages""",
        "        # Stages",
        FSDP_TESTS,
    ),
    Mutant(
        "fsdp: stale parameters are gathered",
        "collectives/gather.py",
        "            whole, own = shards.whole[number], shards.own_of(number)\n",
        "            whole, own = shards.whole[number], shards.own_of(number)\n"
        "            own = self.__dict__.setdefault('first', {}).setdefault(number, own.clone())\n",
        FSDP_TESTS,
    ),
    Mutant(
        "fsdp: sums of micro-batches are added twice",
        "collectives/scatter.py",
        "leaving.number).add_(leaving.addend)",
        "leaving.number).add_(leaving.addend).add_(leaving.addend)",
        FSDP_TESTS,
    ),
    Mutant(
        "fsdp: gradients are scattered twice",
        "collectives/scatter.py",
        "            work = self._comm.reduce_scatter(own, flat, codec=self._codec)\n",
        "            work = self._comm.reduce_scatter(own, flat.add_(flat), codec=self._codec)\n",
        FSDP_TESTS,
    ),
    Mutant(
        "fsdp: the norm of the own part only",
        "training/sharded.py",
        "    loss_sum, count, samples, planned, nonfinite, votes, *each = total.tolist()\n",
        "    loss_sum, count, samples, planned, nonfinite, votes, *each = total.tolist()\n"
        "    each[: len(squares)] = squares\n",
        FSDP_TESTS,
    ),
    Mutant(
        "fsdp: the last micro-batch only",
        "algorithms/fsdp.py",
        "            if self._shares_gradients or is_last:\n",
        "            if is_last:\n",
        FSDP_TESTS,
    ),
    Mutant(
        "fsdp: rows that were looked up give no gradient",
        "collectives/scatter.py",
        "            part.index_add_(0, rows, theirs)",
        "            part.index_add_(0, rows, theirs * 0)",
        ROWS_TESTS,
    ),
    Mutant(
        "ep: dispatch is detached from the graph",
        "collectives/dispatch.py",
        "_AllToAllRows.apply(rows, comm",
        "_AllToAllRows.apply(rows.detach(), comm",
        EP_TESTS,
    ),
    Mutant(
        "ep: gradients of experts count twice in the norm",
        "algorithms/expert_parallel.py",
        "        squares |= _squares(self._experts, expert_grads)\n",
        "        squares |= {name: 2 * square for name, square in _squares(self._experts, expert_grads).items()}\n",
        EP_TESTS,
    ),
    Mutant(
        "ep: a rank fills the experts as if its tokens were the first",
        "models/moe.py",
        "place_NE = before_RE[self.exchange.rank]",
        "place_NE = before_RE[0]",
        EP_TESTS,
    ),
    Mutant(
        "ep: the balancing loss weighs the own targets only",
        "algorithms/expert_parallel.py",
        "targets=int(targets_RM[:, micro].sum()),",
        "targets=int(targets_RM[comm.rank, micro]),",
        EP_TESTS,
    ),
    Mutant(
        "ep: each rank has router noise of its own",
        "training/own_experts.py",
        "            layer.noise_seed = seed\n",
        "            pass\n",
        EP_TESTS,
    ),
    Mutant(
        "mp: a stage without optimizer step",
        "training/staged.py",
        "            self._optimizer.step()\n",
        "            if self._comm.rank != 1:\n                self._optimizer.step()\n",
        STAGED_TESTS,
    ),
    Mutant(
        "pipeline: a ragged micro-batch weighs as much as a full one",
        "training/staged.py",
        "torch.full_like(out, passes.loss_scale / passes.planned)",
        "torch.full_like(out, passes.loss_scale / max(count_targets([passes.batches[micro]]), 1) / 2)",
        STAGED_TESTS,
    ),
    Mutant(
        "pipeline: weights whose gradients wait are left out",
        "training/staged.py",
        "                    self._late[stage].compute()\n",
        "                    pass\n",
        STAGED_TESTS,
    ),
    Mutant(
        "pipeline: the stage before waits for gradients of weights",
        "training/late_weights.py",
        "        self._waiting.append((weight, rows.t(), grad) if is_transposed else (weight, grad.t(), rows))\n",
        "        self._waiting.append((weight, rows.t(), grad) if is_transposed else (weight, grad.t(), rows))\n"
        "        self.compute()\n",
        ("tests/training/test_late_weights.py",),
    ),
    Mutant(
        "mp: a tied head is trained without what the embedding has found",
        "collectives/chain.py",
        "            self._tensor += self._arrived.to(self._tensor.device)  # now that nothing of it is being sent\n",
        "",
        STAGED_TESTS,
    ),
    Mutant(
        "mp: backward sees newer weights than forward",
        "training/staged.py",
        "        if self._staleness_bound:\n            params",
        "        if False:\n            params",
        STAGED_TESTS,
    ),
)


def main() -> int:
    """Try all mutants, or those whose names contain an argument; the exit code is the number not noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; default: all mutants")
    names = parser.parse_args().names
    chosen = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
    unnoticed = [mutant.name for mutant in chosen if not is_noticed(mutant)]
    for name in unnoticed:
        print(f"NOT NOTICED: {name}")
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} mutants noticed")
    return len(unnoticed)


def is_noticed(mutant: Mutant) -> bool:
    """Whether the mutant's tests fail on a copy of the source that contains it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        apply(mutant, source / "smolcluster")
        environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
        tested = _run(["-c", "import smolcluster; print(smolcluster.__file__)"], environment)
        if not Path(tested.stdout.strip()).resolve().is_relative_to(source.resolve()):
            raise SystemExit(f"the tests would run against {tested.stdout.strip()}, not the mutant in {source}")
        pytest = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests]
        run = _run(pytest, environment)
    if run.returncode not in (0, 1):  # 1: tests failed; anything else: they did not run
        raise SystemExit(f"{mutant.name}: pytest ended with {run.returncode}\n{run.stdout}\n{run.stderr}")
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(f"{mutant.name}: {'noticed by ' + failed[0] if failed else 'all tests pass'}", flush=True)
    return run.returncode == 1


def apply(mutant: Mutant, package: Path) -> None:
    """Put the mutant into the copy of the package."""
    file = package / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(
            f"mutant {mutant.name!r}: its text occurs {text.count(mutant.old)} times in src/smolcluster/{mutant.file}, "
            f"not once. The code has changed: adapt the mutant in tests/mutants/run_mutants.py."
        )
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def _run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


if __name__ == "__main__":
    sys.exit(main())
