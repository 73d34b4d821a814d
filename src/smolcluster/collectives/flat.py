"""Many tensors as one flat tensor for each dtype: what a parameter server's messages carry, and how it is encoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smolcluster.collectives.base import Codec
from smolcluster.collectives.codec import Int8Codec


class FlatLayout:
    """Tensors of a model as one flat tensor for each dtype, in the order of the first tensor of each."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Describe the layout of these tensors; every process of a run has the same."""
        self.dtypes = list(dict.fromkeys(tensor.dtype for tensor in tensors))
        self._groups = [[i for i, tensor in enumerate(tensors) if tensor.dtype == dtype] for dtype in self.dtypes]
        self._shapes = [tensor.shape for tensor in tensors]
        self._counts = [tensor.numel() for tensor in tensors]
        self.numels = [sum(self._counts[i] for i in group) for group in self._groups]
        places: dict[int, tuple[int, int]] = {}  # tensor → flat tensor, first element
        for number, group in enumerate(self._groups):
            start = 0
            for i in group:
                places[i] = (number, start)
                start += self._counts[i]
        self._places = [places[i] for i in range(len(tensors))]

    def flatten(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """New flat tensors on the CPU with the values of `tensors`; zeros for None."""
        flats = []
        for group, dtype in zip(self._groups, self.dtypes, strict=True):
            pieces = []
            for i in group:
                tensor = tensors[i]
                if tensor is None:
                    pieces.append(torch.zeros(self._counts[i], dtype=dtype))
                else:
                    pieces.append(tensor.detach().reshape(-1).cpu())
            flats.append(torch.cat(pieces))
        return flats

    def parts(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Views into the flat tensors, one for each tensor, in its shape."""
        return [
            flats[number][start : start + count].view(shape)
            for (number, start), count, shape in zip(self._places, self._counts, self._shapes, strict=True)
        ]

    def empty(self, codec: Codec | None = None) -> list[Tensor]:
        """Flat tensors to receive into, encoded or not."""
        if codec is None:
            return [torch.empty(numel, dtype=dtype) for numel, dtype in zip(self.numels, self.dtypes, strict=True)]
        return [torch.empty(codec.encoded_nbytes(numel), dtype=torch.uint8) for numel in self.numels]


class FeedbackEncoder:
    """Encodes a sequence of flat tensors so that what one loses is added to the next."""

    def __init__(self, codec: Codec, layout: FlatLayout) -> None:
        self._codec = codec
        self._layout = layout
        self._residuals = [flat.zero_() for flat in layout.empty()]

    def encode(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """What goes on the wire instead of `flats`, uint8."""
        encoded = self._layout.empty(self._codec)
        for flat, residual, out in zip(flats, self._residuals, encoded, strict=True):
            if isinstance(self._codec, Int8Codec):
                self._codec.encode_with_feedback(flat, residual, out)
                continue
            residual.add_(flat)
            self._codec.encode(residual, out)
            decoded = torch.empty_like(residual)
            self._codec.decode(out, decoded)
            residual.sub_(decoded)
            residual.masked_fill_(~torch.isfinite(residual), 0.0)  # one bad step must not spoil those after it
        return encoded


def decode_flats(encoded: Sequence[Tensor], codec: Codec | None, layout: FlatLayout) -> list[Tensor]:
    """The flat tensors that `encoded` stands for; itself without a codec."""
    if codec is None:
        return list(encoded)
    flats = layout.empty()
    for data, flat in zip(encoded, flats, strict=True):
        codec.decode(data, flat)
    return flats
