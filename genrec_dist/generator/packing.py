"""Padded batches to flat rows of the real places and back: what works place by place need not work on padding.

Layer norms, projections and feed-forward layers take x_TD as they take x_BSD; attention needs the padded form.
Shape legend: B rows, S places, T real places of all rows (and padding to a fixed size, in row B), D width.
"""

from __future__ import annotations

import torch


def places(mask_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and place of every True, row after row; their number has to be waited for.

    Shapes:
        mask_BS: bool. Returns two (T,) int64.
    """
    row, place = mask_BS.nonzero(as_tuple=True)
    return row, place


def pack(x_BSD: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
    """The rows where the mask is True; their number has to be waited for.

    Shapes:
        x_BSD: (B, S, ...). mask_BS: bool. Returns (T, ...).
    """
    return x_BSD[mask_BS]


def take(x_BSD: torch.Tensor, row_T: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
    """`pack` by known places, of a size known beforehand; padding tokens (row B) are zeros.

    Shapes:
        x_BSD: (B, S, ...). row_T, place_T: (T,) int64. Returns (T, ...).
    """
    batch, width = x_BSD.shape[:2]
    real = row_T < batch
    flat = x_BSD.flatten(0, 1).index_select(0, torch.where(real, row_T * width + place_T, 0))
    return flat * real.view(-1, *[1] * (flat.ndim - 1))


def unpack(x_TD: torch.Tensor, row_T: torch.Tensor, place_T: torch.Tensor, batch: int, width: int) -> torch.Tensor:
    """Padded form of packed rows, zeros between; what is in row `batch` is dropped.

    Args:
        row_T, place_T: where each row goes; no two to the same place but for those of row `batch`.
        batch: B.
        width: S.

    Shapes:
        x_TD: (T, ...). row_T, place_T: (T,) int64. Returns (B, S, ...).
    """
    # One row of places behind the last takes the padding, so its gradient is that of a dropped value: zero.
    out = x_TD.new_zeros((batch + 1) * width, *x_TD.shape[1:])
    out = out.index_put((row_T * width + place_T,), x_TD)
    return out.view(batch + 1, width, *x_TD.shape[1:])[:batch]
