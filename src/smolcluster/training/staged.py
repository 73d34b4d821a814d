"""What an algorithm that divides a model by layers has besides its step: passes, messages, a step's end, checkpoints.

A micro-batch goes up through the stages in forward and down in backward; between two stages it is a message:
activations one way, their gradients the other. Ranks speak to their neighbours only, also to agree on a step's sums
(training/stage_sums.py).

With K > 0 a gradient is applied K steps late, and backward of a batch may run when the weights have moved on. So each
step computes with its own copy of them, a stash, which goes when its backward is done.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smolcluster.collectives.base import Communicator, Work
from smolcluster.collectives.chain import ChainSum
from smolcluster.data.batch import Batch
from smolcluster.errors import CollectiveMismatch, ConfigError
from smolcluster.kinds import Precision
from smolcluster.models.partition import Unit
from smolcluster.models.split import layer_costs, split_by_cost
from smolcluster.models.stage import layers_of
from smolcluster.training.late_weights import LateWeights
from smolcluster.training.modules import bring_to_first, buffers_of
from smolcluster.training.optim import OptimizerFactory, optimizer_state
from smolcluster.training.own_stages import OwnStages
from smolcluster.training.restore import Part, load_parts
from smolcluster.training.schedule import LrSchedule
from smolcluster.training.stage_sums import StageAgreement
from smolcluster.training.step import (
    AUTOCAST_DTYPES,
    SCALER,
    EvalSums,
    LossScaler,
    MicroBatches,
    PendingGradient,
    Shard,
    StateReader,
    StepResult,
    as_batches,
    count_targets,
    grade,
    is_applicable,
    pending_state,
    read_pending,
    scale_gradients,
    summed_loss,
)

# Tags of messages. Those of micro-batches count up and begin anew; the others are far above.
_MICRO_TAGS = 2**28
_EVAL_TAG = 2**28  # and the stage
_EVAL_ACK_TAG = 2**28 + 2**20
_EVAL_SUMS_TAG = 2**29 + 32
_PARAMETER_TAG = 2**29 + 33
_SUMS_TAG = 2**29 + 1024
_SAMPLES_TAG = 2**29 + 2**20  # and the step
# Batches of an evaluation by which a stage may be ahead of the next one.
_EVAL_AHEAD = 2
# Sums of several steps are under way at once and may overtake each other. One tag is the totals', the others are those
# of tied parameters.
_SUMS_TAGS = 16
_STEPS_APART = 1024

_UP, _DOWN = 0, 1


@dataclass(slots=True)
class Passes:
    """A step's passes through this rank's stages.

    Attributes:
        step: the step's number.
        batches: its micro-batches.
        params: this rank's parameters as they were when the step began; none any more once backward is done.
        grads: of those that are trained, when backward is done.
        loss_scale: what the loss is multiplied with (fp16).
        planned: targets of the step; known on the last rank.
        first_micro: micro-batches of all steps before it.
        left: backward passes to run.
        loss_sum: on the last rank, over what it has computed.
        inputs: of passes whose backward is to come, by (stage, micro-batch); as outputs.
        gradients: what backward finds for each input that came from another stage.
        outputs: what goes up: activations, on the last rank the summed loss.
        arriving: messages that are expected, by (direction, stage, micro-batch).
        agreement: on the step's sums; None: backward is not done.
        samples_before: message with the samples that each micro-batch has on the rank before; None: none, or checked.
    """

    step: int
    batches: list[Batch]
    params: dict[str, nn.Parameter]
    loss_scale: float
    planned: int
    first_micro: int
    left: int = 0
    grads: dict[str, Tensor | None] = field(default_factory=dict)
    loss_sum: Tensor | None = None
    inputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    gradients: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    arriving: dict[tuple[int, int, int], Work] = field(default_factory=dict)
    agreement: StageAgreement | None = None
    samples_before: Work | None = None


class StagedStrategy:
    """All of a Strategy (and DividesModel) but `train_step`, which says in which order the passes run.

    See training/strategy.py for what the methods are for.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_factory: OptimizerFactory,
        comm: Communicator,
        *,
        split: Sequence[range] | None = None,
        stages_per_rank: int = 1,
        staleness_bound: int = 0,
        grad_clip_norm: float | None = None,
        lr_schedule: LrSchedule | None = None,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        skip_nonfinite: bool = False,
        values: Callable[[Unit], Mapping[str, Tensor]] | None = None,
        has_late_weights: bool = False,
    ) -> None:
        """Take the model over and give this rank its layers. Blocks until every rank has done so.

        Args:
            model: maps inputs to logits, (B, C) or (B, T, V); see models/stage.py for which ones can be divided.
            optimizer_factory: makes the optimizer from this rank's parameters to train.
            comm: the ranks, in the order of the layers.
            split: the layers of each stage, over all ranks; stage s lies on rank s mod P. None: by what they cost.
            stages_per_rank: V; `split` must have V * P stages, but on one rank, which computes all as one.
            staleness_bound: K, the steps by which a gradient is applied late.
            grad_clip_norm: bound of the global gradient norm; None: never clipped.
            lr_schedule: learning rate of update i; None: what the optimizer has.
            precision: "fp64" converts the model; "bf16" and "fp16" compute under autocast.
            device: where this rank computes; ranks may differ.
            skip_nonfinite: pass over updates that are not finite instead of stopping.
            values: the parameters of a unit by name, where the model's lie on the meta device: the whole of it is then
                on no rank. The same on every rank.
            has_late_weights: gradients of linear layers' weights are computed when those of the stage's inputs have
                left; see training/late_weights.py.

        Raises:
            ConfigError: the model cannot be cut so, or `split` has another number of stages.
        """
        stages = comm.world_size * stages_per_rank
        if split is None:
            layers = layers_of(model)
            costs = layer_costs(model, layers)
            times = [[cost.time for cost in costs]] * stages
            split = split_by_cost(times, [cost.parameters for cost in costs], stages_per_rank=stages_per_rank)
        if comm.world_size == 1 and split:  # stages of one rank have nobody to speak to
            split = [range(split[0].start, split[-1].stop)]
        elif len(split) != stages:
            raise ConfigError(
                f"split has {len(split)} stages, but {comm.world_size} ranks with {stages_per_rank} each have "
                f"{stages}. Give the layers of {stages} stages, or leave split out"
            )
        self._stages = OwnStages(model, split, comm, precision=precision, device=device, values=values)
        self._comm = comm
        self._trained = self._stages.trained()
        # The first stage has nobody who waits for it.
        later = [(n, stage) for n, stage in self._stages.own.items() if has_late_weights and not stage.is_first]
        self._late = {number: LateWeights(stage.module) for number, stage in later}
        # A rank may have nothing to train; optimizers want something to step.
        owned = list(self._trained.values()) or [nn.Parameter(torch.empty(0, device=device))]
        self._optimizer = optimizer_factory(owned)
        self._staleness_bound = staleness_bound
        self._grad_clip_norm = grad_clip_norm
        self._lr_schedule = lr_schedule
        self._precision = precision
        self._device = device
        self._skip_nonfinite = skip_nonfinite
        self._scaler = LossScaler() if precision == "fp16" else None
        # Ids that pass by a rank have no gradient, and a leaf may not be worked on in place: so autograd is given this.
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._under_way: deque[Passes] = deque()
        self._norms: deque[dict[str, float]] = deque(maxlen=staleness_bound + 1)
        self._sending: deque[Work] = deque()
        self._eval_acks: deque[Work] = deque()
        self._most_held = self._most_stashed = 0
        self._step = 0
        self._micro = 0
        self._is_stop_requested = False

    # ---- for train_step

    def _begin(self, micro_batches: MicroBatches) -> Passes:
        """1 zero_grad: open a step, and wait for nothing. Its weights are those of now."""
        batches = as_batches(micro_batches)
        params = self._stages.params
        if self._staleness_bound:
            params = {n: nn.Parameter(p.detach().clone()) if p.requires_grad else p for n, p in params.items()}
        self._optimizer.zero_grad()
        planned = 0
        if self._is_last:
            planned = batches[0].planned_count or max(count_targets(batches), 1)
        passes = Passes(self._step, batches, params, self._scaler.scale if self._scaler else 1.0, planned, self._micro)
        self._comm.telemetry.step = self._step
        self._under_way.append(passes)
        if self._staleness_bound:
            self._most_stashed = max(self._most_stashed, sum(bool(step.params) for step in self._under_way))
        self._step += 1
        self._micro += len(batches)
        self._tell_samples(passes)
        computed = [micro for micro, batch in enumerate(batches) if batch.samples]
        for stage in self._stages.own:
            for micro in computed:
                passes.left += 1
                # All messages of a step are expected from its beginning: what comes early does not wait for this rank.
                if stage > 0:
                    passes.arriving[_UP, stage, micro] = self._receive(passes, _UP, stage, micro)
                if stage < self._stages.number - 1:
                    passes.arriving[_DOWN, stage, micro] = self._receive(passes, _DOWN, stage, micro)
        if not passes.left:
            self._agree(passes)
        return passes

    def _forward(self, passes: Passes, stage: int, micro: int) -> None:
        """2 forward of a micro-batch through one of this rank's stages; what it gives is on its way to the next one."""
        batch, own = passes.batches[micro], self._stages.own[stage]
        if not batch.samples:
            return
        self._poll()
        self._stages.install(passes.params)
        if own.is_first:
            x = given = self._inputs(batch)
        else:
            self._check_samples()
            x = self._arrived(passes, _UP, stage, micro)
            passes.gradients[stage, micro] = []
            given = _Arrival.apply(self._anchor, x, passes.gradients[stage, micro])  # type: ignore[no-untyped-call]
        with self._comm.telemetry.span("forward", {"step": passes.step, "stage": stage, "micro_batch": micro}):
            out = self._run(stage, given)
            if own.is_last:
                out = summed_loss(out, batch.targets.to(self._device))
                passes.loss_sum = out.detach() + (0 if passes.loss_sum is None else passes.loss_sum)
        passes.inputs[stage, micro], passes.outputs[stage, micro] = x, out
        if not own.is_last:
            self._send(out, stage + 1, self._tag(passes, _UP, stage + 1, micro))

    def _backward(self, passes: Passes, stage: int, micro: int) -> None:
        """2 backward of the same; a step agrees on its sums after its last one here. Done already: nothing."""
        if (stage, micro) not in passes.outputs:
            return
        self._poll()
        self._stages.install(passes.params)
        x, out = passes.inputs.pop((stage, micro)), passes.outputs.pop((stage, micro))
        own = self._stages.own[stage]
        if own.is_last:
            grad = torch.full_like(out, passes.loss_scale / passes.planned)
        else:
            grad = self._arrived(passes, _DOWN, stage, micro)
        with self._comm.telemetry.span("backward", {"step": passes.step, "stage": stage, "micro_batch": micro}):
            if out.requires_grad:
                out.backward(grad)  # type: ignore[no-untyped-call]
        del out
        if not own.is_first:
            found = passes.gradients.pop((stage, micro))
            back = found[0] if found else torch.zeros_like(x)
            self._send(back, stage - 1, self._tag(passes, _DOWN, stage - 1, micro))
            if stage in self._late:
                with self._comm.telemetry.span("backward", {"step": passes.step, "stage": stage, "micro_batch": micro}):
                    self._late[stage].compute()
        passes.left -= 1
        if not passes.left:
            self._agree(passes)

    def _end(self) -> StepResult | None:
        """3 agree, 4 step: apply the gradient that is due, if one is."""
        if len(self._under_way) <= self._staleness_bound:
            return None
        return self._apply()

    # ---- a step's end

    def _agree(self, passes: Passes, fields: list[float] | None = None, *, is_tied_summed: bool = False) -> None:
        """Begin to add a step's sums up; `fields`: what this rank brings in, if not what it has computed."""
        if fields is None:
            fields = self._computed(passes)
            passes.grads = {name: passes.params[name].grad for name in self._trained}
            passes.params = {}
        tied: list[str] = []
        if self._comm.world_size > 1 and not is_tied_summed:
            tied = [name for name in self._stages.tied if self.model.get_parameter(name).requires_grad]
        tag = _SUMS_TAG + passes.step % _STEPS_APART * _SUMS_TAGS
        votes = self._is_stop_requested
        passes.agreement = StageAgreement(self._comm, self._stages, passes.grads, tied, fields, votes, tag)

    def _computed(self, passes: Passes) -> list[float]:
        """Loss, targets, samples, planned targets, whether the loss is not finite: the last rank knows them."""
        if not self._is_last:
            return [0.0] * 5
        loss_sum = 0.0 if passes.loss_sum is None else float(passes.loss_sum)
        samples = sum(batch.samples for batch in passes.batches)
        count = count_targets(passes.batches)
        return [loss_sum, count, samples, passes.planned, float(not math.isfinite(loss_sum))]

    def _apply(self) -> StepResult:
        """Of the oldest step: wait for all ranks' sums, correct the gradient to the mean, clip, step the parameters."""
        self._check_samples()
        due = self._under_way.popleft()
        assert due.agreement is not None, "its backward is done"
        with self._comm.telemetry.span("comm_wait"):
            due.agreement.wait()
        sums = due.agreement.sums()
        loss = sums.loss_sum / max(sums.count, 1)
        correction = sums.planned / max(sums.count, 1) / due.loss_scale
        grad_norm = math.inf if sums.nonfinite else math.sqrt(sum(sums.squares)) * correction
        for name, param in self._trained.items():
            param.grad = due.grads[name]
        grads = [param.grad for param in self._trained.values() if param.grad is not None]
        self._most_held = max(self._most_held, sum(grad.nbytes for grad in grads) * (len(self._under_way) + 1))
        scale_gradients(grads, grad_norm, self._grad_clip_norm, correction)
        if self._lr_schedule is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr_schedule(due.step)
        lr = float(self._optimizer.param_groups[0]["lr"])
        is_applied = sums.count > 0 and is_applicable(
            due.step,
            loss,
            grad_norm,
            lr,
            scaler=self._scaler,
            loss_scale=due.loss_scale,
            skip_nonfinite=self._skip_nonfinite,
        )
        if is_applied:
            self._optimizer.step()
            names = self._stages.names
            self._norms.append(
                {n: math.sqrt(s) * correction for n, s in zip(names, sums.squares, strict=True) if s > 0}
            )
        return StepResult(due.step, loss, sums.count, sums.samples, grad_norm, lr, is_applied, sums.stop_votes > 0)

    def _drain(self) -> None:
        """Run all backward passes that are left, of the oldest step first."""
        self._check_samples()
        for passes in self._under_way:
            for micro in range(len(passes.batches)):
                for stage in reversed(self._stages.own):
                    self._backward(passes, stage, micro)

    # ---- messages

    @property
    def _is_last(self) -> bool:
        return self._stages.number - 1 in self._stages.own

    def _tag(self, passes: Passes, direction: int, stage: int, micro: int) -> int:
        """Of the message to `stage`."""
        place = (passes.first_micro + micro) * self._stages.number + stage
        return (2 * place + direction) % _MICRO_TAGS

    def _tell_samples(self, passes: Passes) -> None:
        """Tell the next rank how many samples each micro-batch has, and expect to hear it from the one before."""
        rank, tag = self._comm.rank, _SAMPLES_TAG + passes.step % _STEPS_APART
        if rank < self._comm.world_size - 1:
            self._send(torch.tensor([batch.samples for batch in passes.batches], dtype=torch.int64), rank + 1, tag)
        if rank > 0:
            passes.samples_before = self._comm.recv(rank - 1, tag)

    def _check_samples(self) -> None:
        """Compare them, of all steps under way: ranks that expect other messages would wait for each other for ever.

        What is compared was sent before the step's first activation, so this waits no longer than that will take.

        Raises:
            CollectiveMismatch: the rank before this one was given other micro-batches.
        """
        for passes in self._under_way:
            if passes.samples_before is None:
                continue
            [told] = passes.samples_before.result()
            passes.samples_before = None
            before, own = told.tolist(), [batch.samples for batch in passes.batches]
            if before != own:
                rank = self._comm.rank
                raise CollectiveMismatch(
                    f"step {passes.step}: rank {rank} was given micro-batches of {own} samples, but rank {rank - 1} of "
                    f"{before}. Every rank computes the whole batch of a step: give every rank the same micro-batches"
                )

    def _receive(self, passes: Passes, direction: int, stage: int, micro: int) -> Work:
        sender = stage - 1 if direction == _UP else stage + 1
        return self._comm.recv(sender % self._comm.world_size, self._tag(passes, direction, stage, micro))

    def _arrived(self, passes: Passes, direction: int, stage: int, micro: int) -> Tensor:
        work = passes.arriving.pop((direction, stage, micro))
        with contextlib.nullcontext() if work.done() else self._comm.telemetry.span("comm_wait"):
            [tensor] = work.result()
        return tensor.to(self._device)

    def _send(self, tensor: Tensor, stage: int, tag: int) -> None:
        """To the rank of `stage`. Nobody may change the tensor any more."""
        self._sending.append(self._comm.send(tensor.detach().contiguous(), stage % self._comm.world_size, tag))
        while self._sending and self._sending[0].done():
            self._sending.popleft().wait()  # raises what went wrong

    def _poll(self) -> None:
        """Let neighbours go on that wait for a step's sums."""
        for passes in self._under_way:
            if passes.agreement is not None:
                passes.agreement.poll()

    # ---- computing

    def _inputs(self, batch: Batch) -> Tensor:
        inputs = batch.inputs.to(self._device, non_blocking=True)
        return inputs.double() if self._precision == "fp64" and inputs.is_floating_point() else inputs

    def _run(self, stage: int, x: Tensor) -> Tensor:
        own, half = self._stages.own[stage], AUTOCAST_DTYPES.get(self._precision)
        with contextlib.nullcontext() if half is None else torch.autocast(x.device.type, dtype=half):
            out: object = own(x)  # a module of the user's, whatever its signature says
        if not isinstance(out, Tensor):
            raise ConfigError(
                f"layer {own.end!r} of the {type(self.model).__name__} gives a {type(out).__name__}, but stage {stage} "
                "ends with it, and a stage gives one tensor. Cut the model elsewhere (split=, or "
                "cluster.layer_distribution), let the layer give one tensor, or choose algorithm fsdp"
            )
        # A sum of thousands of losses has no place in 11 bits.
        return out.float() if half is not None and own.is_last else out

    # ---- the rest of a Strategy

    @property
    def model(self) -> nn.Module:
        """Names and shapes of the whole model; its parameters have no values."""
        return self._stages.model

    def eval_step(self, batch: Batch) -> EvalSums:
        """Loss sum, target count and correct predictions of one batch on the last rank, zeros elsewhere.

        Every rank calls it with the same batches.
        """
        sums = EvalSums(0.0, 0, 0, 0)
        if not batch.samples:
            return sums
        self._stages.install(self._stages.params)
        for number, stage in self._stages.own.items():
            if stage.is_first:
                x = self._inputs(batch)
            else:
                before = (number - 1) % self._comm.world_size
                x = self._comm.recv(before, _EVAL_TAG + number).result()[0].to(self._device)
                self._send(torch.empty(0), number - 1, _EVAL_ACK_TAG + number)
            was_training = stage.module.training
            stage.module.eval()
            try:
                with torch.no_grad():
                    out = self._run(number, x)
            finally:
                stage.module.train(was_training)
            if stage.is_last:
                sums = grade(out, batch, self._device)
                continue
            self._send(out, number + 1, _EVAL_TAG + number + 1)
            after = (number + 1) % self._comm.world_size
            self._eval_acks.append(self._comm.recv(after, _EVAL_ACK_TAG + number + 1))
        while len(self._eval_acks) > _EVAL_AHEAD * len(self._stages.own):
            self._eval_acks.popleft().wait()
        return sums

    def add_up(self, sums: EvalSums) -> EvalSums:
        """The sums over all ranks. Every rank calls it; blocks."""
        while self._eval_acks:
            self._eval_acks.popleft().wait()
        total = torch.tensor([sums.loss_sum, sums.count, sums.correct, sums.graded], dtype=torch.float64)
        ChainSum(self._comm, total, _EVAL_SUMS_TAG).wait()
        return EvalSums(float(total[0]), *(round(number) for number in total[1:].tolist()))

    def finish(self) -> list[StepResult]:
        """Apply what is still under way, in order; their results, oldest first."""
        self._drain()
        results = [self._apply() for _ in range(len(self._under_way))]
        while self._sending:
            self._sending.popleft().wait()
        self._stages.collect_buffers()
        return results

    def request_stop(self) -> None:
        """Vote for stopping, with a step's sums; from any thread."""
        self._is_stop_requested = True

    @property
    def layers(self) -> dict[int, range]:
        """The layers of this rank's stages, by the stage's number."""
        return {number: stage.layers for number, stage in self._stages.own.items()}

    @property
    def holds_whole_model(self) -> bool:
        """Whether `model` has all parameters."""
        return False

    @property
    def parameters(self) -> int:
        """How many numbers the whole model has, tied ones once."""
        return sum(param.numel() for param in self.model.parameters())

    def take_gradient_norms(self) -> dict[str, float] | None:
        """The norm of each parameter's gradient before clipping, of the oldest update not asked for; None: no more."""
        return self._norms.popleft() if self._norms else None

    def whole_parameter(self, name: str) -> Tensor | None:
        """A parameter as it is now, on rank 0's CPU; None elsewhere. Every rank calls it; blocks.

        Raises:
            KeyError: the model has no such parameter.
            PeerLost: a rank is gone.
        """
        name = self._stages.aliases.get(name, name)
        return bring_to_first(self._comm, self._stages.params.get(name), self._stages.owners[name], _PARAMETER_TAG)

    def held_bytes(self) -> tuple[int, int, int]:
        """Bytes of parameters, gradients and optimizer state that this rank has held at most, all at once."""
        params = self._stages.params.values()
        stashes = self._most_stashed * sum(param.nbytes for param in params if param.requires_grad)
        parameters = sum(param.nbytes for param in params) + stashes
        slots = [value for state in self._optimizer.state.values() for value in state.values()]
        return parameters, self._most_held, sum(value.nbytes for value in slots if isinstance(value, Tensor))

    def state(self) -> dict[str, Shard]:
        """What this rank answers for: weights, optimizer state, and the gradients that wait."""
        self._drain()
        stages = self._stages
        found = {f"model/{n}": Shard(p.detach(), "param") for n, p in stages.params.items() if stages.answers_for(n)}
        found |= {f"model/{name}": Shard(buffer, "buffer") for name, buffer in stages.buffers().items()}
        found |= optimizer_state(self._optimizer, {n: p for n, p in self._trained.items() if stages.answers_for(n)})
        if self._comm.rank == 0:
            for alias, name in stages.aliases.items():
                shape = tuple(self.model.get_parameter(name).shape)
                found[f"model/{alias}"] = Shard(torch.empty(0), "param", shape, alias_of=f"model/{name}")
            if self._scaler is not None:
                found[SCALER] = self._scaler.state()
        pending = []
        for passes in self._under_way:
            assert passes.agreement is not None, "its backward is done"
            passes.agreement.wait()
            sums = passes.agreement.sums()
            answered = {name: grad for name, grad in passes.grads.items() if stages.answers_for(name)}
            grads = [answered.get(name) for name in stages.names]
            pending.append(PendingGradient.of(passes.step, sums, sums.planned, passes.loss_scale, grads))
        found |= pending_state(pending, stages.names, with_sums=self._comm.rank == 0)
        return found

    def load_state(self, reader: StateReader) -> None:
        """Go on from a checkpoint; see Strategy."""
        stages = self._stages
        load_parts(
            reader,
            self._optimizer,
            shapes={name: tuple(param.shape) for name, param in self.model.named_parameters()},
            aliases=stages.aliases,
            parts={name: Part(0, param) for name, param in stages.params.items()},
            buffers=buffers_of(self.model) | stages.buffers(),
        )
        if self._scaler is not None:
            self._scaler.load_state(reader)
        for item in read_pending(reader, [stages.params.get(name) for name in stages.names], stages.names):
            grads = dict(zip(stages.names, item.grads, strict=True))
            passes = Passes(item.step, [], {}, item.loss_scale, item.planned, 0)
            passes.grads = {name: grads[name] for name in self._trained}
            # The sums are those of all ranks: rank 0 brings them in, so that they count once.
            fields = [item.loss_sum, item.count, item.samples, item.planned, item.nonfinite]
            self._agree(passes, fields if self._comm.rank == 0 else [0.0] * 5, is_tied_summed=True)
            self._under_way.append(passes)
        self._step = reader.step + len(self._under_way)


class _Arrival(torch.autograd.Function):
    """An activation that has arrived, as the result of a computation: in backward its gradient is put into a list."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, found: list[Tensor]) -> Tensor:
        ctx.found = found
        out = x.detach()
        if not x.is_floating_point():
            ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.found.append(grad)
        return None, None, None
