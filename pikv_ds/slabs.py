"""Memory that lasts: `Slabs` are rows of bytes in separately allocated pieces, addressed by slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lasting_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that outlive the pass that makes them. It may run in inference mode, and the next one not: then a tensor
    of the first could not be written any more."""
    with torch.inference_mode(False):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)


class Slabs:
    """Slot ``s`` is row ``s % slab_rows`` of slab ``s // slab_rows``.

    Kernels find a row through `pointers`, the slabs' addresses on the device, so that storage can
    grow and shrink a slab at a time and nothing is ever copied.

    Args:
        slab_rows: rows per slab.
        row_bytes: bytes of a row.
    """

    def __init__(self, slab_rows: int, row_bytes: int, device: torch.device | str = "cpu") -> None:
        self.slab_rows, self.row_bytes = slab_rows, row_bytes
        self.device = torch.device(device)
        self.nbytes = 0
        """Bytes of memory allocated for rows."""
        self.tensors: list[Tensor | None] = []
        """Each uint8 ``[slab_rows, row_bytes]``; None: given back."""
        self.pointers = lasting_zeros([64], torch.int64, self.device)
        """Address of each slab, 0 where there is none; at least as long as `tensors`."""

    @classmethod
    def of(cls, rows: Tensor) -> Slabs:
        """One slab around rows that lie together, uint8 ``[N, row_bytes]``: row ``i`` is slot ``i``."""
        slabs = cls(len(rows), rows.shape[1], rows.device)
        slabs.put(0, rows.contiguous())
        return slabs

    def reach(self, num_slabs: int) -> None:
        """There are at least so many slabs, the new ones without storage."""
        self.tensors += [None] * (num_slabs - len(self.tensors))
        if num_slabs > len(self.pointers):
            longer = lasting_zeros([max(num_slabs, 2 * len(self.pointers))], torch.int64, self.device)
            longer[: len(self.pointers)] = self.pointers
            self.pointers = longer

    def reserve(self, num_slabs: int) -> None:
        """There is room for the addresses of so many, so that these stay where they are."""
        if num_slabs > len(self.pointers):
            longer = lasting_zeros([num_slabs], torch.int64, self.device)
            longer[: len(self.pointers)] = self.pointers
            self.pointers = longer

    def put(self, slab: int, storage: Tensor | None) -> None:
        """Sets a slab's storage, None to give it back."""
        self.reach(slab + 1)
        self.put_all([slab], [storage])

    def put_all(self, slabs: Sequence[int], storages: Sequence[Tensor | None]) -> None:
        """`put` for several slabs within `reach`, with one write to the device."""
        slab_bytes = self.slab_rows * self.row_bytes
        for slab, storage in zip(slabs, storages, strict=True):
            self.nbytes += slab_bytes * ((storage is not None) - (self.tensors[slab] is not None))
            self.tensors[slab] = storage
        addresses = [0 if storage is None else storage.data_ptr() for storage in storages]
        at, to = torch.tensor([list(slabs), addresses], dtype=torch.int64).to(self.device)
        self.pointers[at] = to

    def fill(self, slabs: Sequence[int]) -> None:
        """Gives some slabs zeroed storage of their own, which can be given back one by one."""
        shape = self.slab_rows, self.row_bytes
        with torch.inference_mode(False):  # see `lasting_zeros`
            storages = [torch.zeros(shape, dtype=torch.uint8, device=self.device) for _ in slabs]
        self.put_all(slabs, storages)

    def row(self, slot: int) -> Tensor:
        """A row, uint8 ``[row_bytes]``."""
        storage = self.tensors[slot // self.slab_rows]
        assert storage is not None, f"slab {slot // self.slab_rows} was given back, but slot {slot} is asked for"
        return storage[slot % self.slab_rows]
