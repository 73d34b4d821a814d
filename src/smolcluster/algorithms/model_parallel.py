"""Model parallelism by layers: each rank holds some consecutive layers, and a batch goes through the ranks and back.

Idea      A model that fits on no rank is cut into P stages of consecutive layers, by what they cost. Rank 0 reads the
          inputs and computes the first layers; what they give goes to rank 1, and so on; the last rank knows the
          targets and the loss. Backward goes the other way: each rank gives the one before the gradient of what it got.
          Every rank steps its own layers. While one rank computes, all others wait: this is the naive version that
          shows why pipelines exist. With K > 0 up to K + 1 batches are in flight, so ranks compute at the same time, on
          weights that are K steps old.
Step      1 zero_grad  2 forward through the stages, backward through the stages  3 agree on the gradient's norm 4
          optimizer.step on the own layers
Cost      A = bytes of what one stage gives the next. A rank sends A up and A down per step, to its neighbours only, and
          two messages of a few KB for the sums, and how many samples a micro-batch has. If the head is tied to the
          embedding (V rows of D), the first and the last rank also send V D elements, those between 2 V D. Memory: a
          rank's layers, 16 bytes a parameter with fp32 AdamW, and their activations. Time: the sum of all stages; P-1
          of P ranks wait at any time.
Staleness K = 0: as plain training. K > 0: a gradient is applied K steps late, on all ranks alike. Each of the K + 1
          batches in flight has its own copy of the weights (a stash): backward computes with what forward did.
Breaks if time matters more than memory: use mp_pipeline, which cuts the batch as well. If the model fits on every
          rank: use classicdp, where all compute at once.
Source    Dean et al. 2012, Large Scale Distributed Deep Networks, NeurIPS 25, section 3; weight stashing: Narayanan et
          al. 2019, PipeDream, SOSP, section 3.3
Try       smolcluster train --preset mp_gpt --local 3
"""

from __future__ import annotations

from smolcluster.training.staged import StagedStrategy
from smolcluster.training.step import MicroBatches, StepResult


class ModelParallel(StagedStrategy):
    """Training of a model whose layers lie on several ranks, one batch after the other."""

    def train_step(self, micro_batches: MicroBatches) -> StepResult | None:
        """Compute the gradient of one step's batch and apply the one that is due; see Strategy.

        Args:
            micro_batches: the whole batch, as Batches or (inputs, targets) pairs, computed one after the other; as many
                of as many samples on every rank. Inputs are looked at on the first rank, targets on the last one.

        Raises:
            TrainingStopped: the loss or the gradient is not finite; on all ranks at the same step.
            CollectiveMismatch: the rank before this one was given other micro-batches.
            PeerLost: a rank is gone.
        """
        rank, last = self._comm.rank, self._comm.world_size - 1

        # 1 zero_grad; with K > 0 also a copy of the weights
        step = self._begin(micro_batches)

        # 2 forward, backward. With K > 0 this rank's backward is as many batches behind as ranks come after it
        behind = min(self._staleness_bound, last - rank)
        if behind == 0:
            for micro in range(len(step.batches)):
                self._forward(step, rank, micro)
                self._backward(step, rank, micro)
        else:
            for micro in range(len(step.batches)):
                self._forward(step, rank, micro)
            if len(self._under_way) > behind:
                due = self._under_way[-1 - behind]
                for micro in range(len(due.batches)):
                    self._backward(due, rank, micro)

        # 3 agree on the sums, 4 step: with the oldest gradient, this one if K = 0
        return self._end()
