"""`PageTable`: the slots of the pages that a rank holds, for every row, unit and format.

A row has a *list* of pages for each unit and format, in order of arrival. A list is cut into *segments* of `SEGMENT`
entries, which lie in one arena; a *directory* says which segments a list has. So a list grows by writing what is new,
never by moving what is there, and rows of very different lengths waste little. The host has the same two levels as
the device; on a CPU they are the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pikv_ds.core.pool import NULL_SLOT, PagePool
from pikv_ds.ops.lists import SEGMENT, PageLists
from pikv_ds.slabs import lasting_zeros

Ints = NDArray[np.int64]
RESERVED_ROWS = 64
"""Rows whose lists end within a segment, which a reserve counts with."""


@dataclass(frozen=True)
class TableRows:
    """The pages of some lists as ops take them."""

    slots: Tensor
    """``[R, P]`` int32, `NULL_SLOT` at and beyond `counts`."""
    page_idx: Tensor
    """``[R, P]`` int32, number of each page within its sequence."""
    counts: Tensor
    """``[R]`` int32, pages of each list."""
    total: int
    """The sum of `counts`."""


class Entries(NamedTuple):
    """Entries of several lists, those of one list side by side and in their order."""

    which: Ints
    """``[N]``: the place of the entry's list among those that were asked for."""
    numbers: Ints
    """``[N]``: of the pages within their sequences."""
    slots: Ints
    """``[N]``"""


class Mirror:
    """An int32 array on the host with its copy on the device; on a CPU both are one."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        self._take(lasting_zeros([size], torch.int32, torch.device("cpu")))

    def _take(self, memory: Tensor) -> None:
        self._memory = memory
        self.host: NDArray[np.int32] = memory.numpy()
        with torch.inference_mode(False):  # see `lasting_zeros`
            self.tensor = memory if self.device.type == "cpu" else memory.to(self.device)

    def reach(self, size: int) -> None:
        """Makes it at least so long, at least doubling it; what is new is zero."""
        if size > len(self.host):
            longer = lasting_zeros([max(size, 2 * len(self.host))], torch.int32, torch.device("cpu"))
            longer[: len(self.host)] = self._memory
            self._take(longer)

    def write(self, at: Ints, values: NDArray[np.integer]) -> None:
        self.host[at] = values
        if self.tensor is not self._memory:
            places, new = torch.from_numpy(np.stack([at, values.astype(np.int64)])).to(self.device)
            self.tensor[places] = new.int()

    @property
    def nbytes(self) -> int:
        """Of host and device."""
        return self._memory.nbytes * (1 if self.tensor is self._memory else 2)


class PageTable:
    """Which page lies where.

    Args:
        num_units: units of a row (see `SequenceBatch`).
        num_formats: page formats; each has a list of its own.
        reserve: entries for which there is memory from the beginning, so that it stays where it is while there are
            at most `RESERVED_ROWS` rows.
    """

    def __init__(
        self, num_units: int, device: torch.device | str = "cpu", num_formats: int = 1, reserve: int = 0
    ) -> None:
        self.num_units, self.num_formats, self.device = num_units, num_formats, torch.device(device)
        self._num_lists = num_units * num_formats  # of a row
        self._count_of, self._directory_of = Mirror(0, self.device), Mirror(0, self.device)
        segments = 1 + (reserve // SEGMENT + RESERVED_ROWS * self._num_lists if reserve else 0)
        size = segments * SEGMENT
        self._slots, self._numbers = Mirror(size, self.device), Mirror(size, self.device)  # [segment * SEGMENT]
        self._directory = Mirror(4 * segments, self.device)  # of a row [list, room], from its start
        self._free_segments = np.zeros(0, np.int64)
        self._num_segments = 1  # segment 0 is of null entries: unset places of a directory point there
        self._free_directories: dict[int, list[int]] = {}  # starts, by room
        self._asking: Tensor | None = None  # rows of the last `lists`
        self._directory_end = 0

    @property
    def _counts(self) -> NDArray[np.int32]:
        """Entries of each list, ``[rows, lists]``."""
        return self._count_of.host.reshape(-1, self._num_lists)

    @property
    def _start(self) -> NDArray[np.int32]:
        """Where the directory of each row begins, ``[rows]``."""
        return self._directory_of.host[0::2]

    @property
    def _room(self) -> NDArray[np.int32]:
        """Segments per list that it has room for, ``[rows]``; 0: the row has none."""
        return self._directory_of.host[1::2]

    # -- what is there ----------------------------------------------------------------------------------------------

    def counts(self, row: int) -> NDArray[np.int32]:
        """Pages of a row that lie here, ``[units, formats]``."""
        if row >= len(self._counts):
            return np.zeros((self.num_units, self.num_formats), np.int32)
        return self._counts[row].reshape(self.num_units, self.num_formats)

    def totals(self, rows: Ints) -> Ints:
        """Pages of some rows that lie here, ``[units, formats]``."""
        counts = self._counts[rows[rows < len(self._counts)]]
        return counts.sum(0, dtype=np.int64).reshape(self.num_units, self.num_formats)

    def num_pages_by_format(self) -> list[int]:
        """Pages noted here, of each format."""
        return [int(n) for n in self._counts.reshape(-1, self.num_formats).sum(0)]

    @property
    def nbytes(self) -> int:
        """Bytes of the table on host and device."""
        return self._free_segments.nbytes + sum(mirror.nbytes for mirror in self._mirrors)

    @property
    def _mirrors(self) -> tuple[Mirror, ...]:
        return self._slots, self._numbers, self._directory, self._count_of, self._directory_of

    def entries(self, rows: Ints, units: Ints, page_format: int) -> Entries:
        """The entries of some lists.

        Args:
            rows, units: ``[L]``
        """
        rows, lists = np.asarray(rows, np.int64), np.asarray(units, np.int64) * self.num_formats + page_format
        counts = np.zeros(len(rows), np.int64)
        known = rows < len(self._counts)
        counts[known] = self._counts[rows[known], lists[known]]
        which, places = _spread(counts)
        at = self._places(rows[which], lists[which], places)
        return Entries(which, self._numbers.host[at].astype(np.int64), self._slots.host[at].astype(np.int64))

    def find(self, rows: Ints, units: Ints, numbers: Ints) -> tuple[Ints, Ints]:
        """Slots and formats of some pages, slot `NULL_SLOT` where a page is not here.

        Args:
            rows, units, numbers: ``[N]``
        """
        slots, formats = np.full(len(rows), NULL_SLOT, np.int64), np.zeros(len(rows), np.int64)
        if not len(rows):
            return slots, formats
        pairs, place = np.unique(np.stack([rows, units]), axis=1, return_inverse=True)
        wanted = place.reshape(-1) * _MOST_PAGES + numbers
        order = wanted.argsort()
        for page_format in range(self.num_formats):
            found = self.entries(pairs[0], pairs[1], page_format)
            keys = found.which * _MOST_PAGES + found.numbers
            at = wanted[order].searchsorted(keys).clip(max=len(order) - 1)
            hit = wanted[order][at] == keys
            slots[order[at[hit]]], formats[order[at[hit]]] = found.slots[hit], page_format
        return slots, formats

    def lists(self, rows: Ints, heads: int) -> PageLists:
        """The lists of some rows where they are, for ops: those of the first unit and format (see `PageLists.at`).
        They are good while no page comes or goes.

        Args:
            rows: ``[R]``, -1: empty lists.
            heads: units of a row that follow each other.
        """
        self._reach(int(rows.max(initial=-1)) + 1)
        longest = int(self._counts[rows[rows >= 0]].max(initial=0))
        width = 1 << (longest - 1).bit_length() if longest else 0  # which changes seldom
        counts, directories = self._count_of.tensor.view(-1, self._num_lists), self._directory_of.tensor.view(-1, 2)
        where = self._slots.tensor, counts, self._directory.tensor, directories
        asking = torch.from_numpy(rows.astype(np.int32))
        if self._asking is None or self._asking.shape != asking.shape:
            self._asking = lasting_zeros(asking.shape, torch.int32, self.device)
        self._asking.copy_(asking)  # into the same memory while their number stays
        return PageLists(*where, self._asking, width, 0, self.num_formats, heads)

    def rows(self, rows: list[int], units: range, page_format: int = 0) -> TableRows:
        """The lists of some rows as ops take them, for each row one per unit."""
        at = np.repeat(np.asarray(rows, np.int64), len(units))
        lists = np.tile(np.arange(units.start, units.stop) * self.num_formats + page_format, len(rows))
        counts = np.zeros(len(at), np.int32)
        known = at < len(self._counts)
        counts[known] = self._counts[at[known], lists[known]]
        width = int(counts.max(initial=0))
        starts, rooms = np.zeros(len(at), np.int64), np.ones(len(at), np.int64)
        starts[known], rooms[known] = (
            self._start[at[known]] + lists[known] * self._room[at[known]],
            self._room[at[known]],
        )
        packed = torch.from_numpy(np.stack([starts, rooms, counts])).to(self.device)
        place = torch.arange(width, device=self.device)
        segment = torch.minimum(place[None] // SEGMENT, packed[1, :, None].clamp(min=1) - 1)  # a short list has fewer
        entry = self._directory.tensor[packed[0, :, None] + segment].long() * SEGMENT + place % SEGMENT
        entry.masked_fill_(place >= packed[2, :, None], 0)
        return TableRows(self._slots.tensor[entry], self._numbers.tensor[entry], packed[2].int(), int(counts.sum()))

    # -- what comes and goes ----------------------------------------------------------------------------------------

    def append(self, rows: Ints, units: Ints, formats: Ints, numbers: Ints, slots: Ints) -> None:
        """Adds pages at the ends of their lists, in the order given. Each page may be added once.

        Args:
            rows, units, formats, numbers, slots: ``[N]``
        """
        if not len(rows):
            return
        self._reach(int(rows.max()) + 1)
        per_row = self.num_units * self.num_formats
        keys = rows * per_row + units * self.num_formats + formats
        order = keys.argsort(kind="stable")
        lists, counts = np.unique(keys, return_counts=True)
        at_row, at_list = lists // per_row, lists % per_row
        before = self._counts[at_row, at_list].astype(np.int64)
        after = before + counts
        had, needs = -(-before // SEGMENT), -(-after // SEGMENT)
        most = np.zeros(len(self._counts), np.int64)
        np.maximum.at(most, at_row, needs)
        for row in np.flatnonzero(most > self._room):
            self._widen(int(row), int(most[row]))
        which, new = _spread(needs - had)
        if len(which):
            places = self._start[at_row[which]] + at_list[which] * self._room[at_row[which]] + had[which] + new
            self._directory.write(places, self._take_segments(len(which)))
        which, new = _spread(counts)
        entries = self._places(at_row[which], at_list[which], before[which] + new)
        self._slots.write(entries, slots[order])
        self._numbers.write(entries, numbers[order])
        self._count_of.write(at_row * self._num_lists + at_list, after)

    def remove(self, rows: Ints, units: Ints, numbers: Ints) -> Ints:
        """Forgets pages that are here, and returns their slots, ``[N]``. The others keep their order.

        Args:
            rows, units, numbers: ``[N]``
        """
        slots, formats = self.find(rows, units, numbers)
        assert (slots != NULL_SLOT).all(), "a page that is to go is not here"
        for page_format in np.unique(formats):
            gone = formats == page_format
            pairs = np.unique(np.stack([rows[gone], units[gone]]), axis=1)
            found = self.entries(pairs[0], pairs[1], int(page_format))
            stays = ~np.isin(found.slots, slots[gone])
            lists = pairs[1] * self.num_formats + page_format
            counts = np.bincount(found.which[stays], minlength=len(lists))
            which, places = _spread(counts)
            entries = self._places(pairs[0][which], lists[which], places)
            self._slots.write(entries, found.slots[stays])
            self._numbers.write(entries, found.numbers[stays])
            self._drop_segments(pairs[0], lists, self._counts[pairs[0], lists], counts)
            self._count_of.write(pairs[0] * self._num_lists + lists, counts)
        return slots

    def release(self, row: int) -> Ints:
        """Forgets a row and returns the slots of all its pages."""
        if row >= len(self._counts) or not self._room[row]:
            return np.zeros(0, np.int64)
        lists = np.arange(self._num_lists)
        rows = np.full(len(lists), row)
        which, places = _spread(self._counts[row].astype(np.int64))
        slots = self._slots.host[self._places(rows[which], lists[which], places)].astype(np.int64)
        self._drop_segments(rows, lists, self._counts[row], np.zeros(len(lists), np.int64))
        self._count_of.write(rows * self._num_lists + lists, np.zeros(len(lists), np.int64))
        self._free_directories.setdefault(int(self._room[row]), []).append(int(self._start[row]))
        self._set_directory(row, 0, 0)
        return slots

    def check_integrity(self, pool: PagePool) -> None:
        """Every page of the table is in use in the pool, once, and none is left over."""
        rows, lists = (self._counts > 0).nonzero()
        counts = self._counts[rows, lists]
        segments, all_slots = [], []
        for row, at_list, count in zip(rows.tolist(), lists.tolist(), counts.tolist(), strict=True):
            unit, page_format = divmod(at_list, self.num_formats)
            found = self.entries(np.array([row]), np.array([unit]), page_format)
            wrong = found.slots[pool.format_of(found.slots) != page_format]
            assert not len(wrong), f"row {row} unit {unit}: slots {wrong} hold pages of another format"
            needs = -(-count // SEGMENT)
            assert needs <= self._room[row], f"row {row}: its directory is too small"
            first = self._start[row] + at_list * self._room[row]
            segments += self._directory.host[first : first + needs].tolist()
            all_slots += found.slots.tolist()
            numbers = np.concatenate(
                [self.entries(np.array([row]), np.array([unit]), f).numbers for f in range(self.num_formats)]
            )
            assert len(np.unique(numbers)) == len(numbers), f"row {row} unit {unit}: a page is there twice"
        assert len(set(all_slots)) == len(all_slots), "two pages share a slot"
        assert NULL_SLOT not in all_slots, "a page lies in the null slot"
        assert len(all_slots) == pool.num_used, f"{len(all_slots)} pages in the table, {pool.num_used} in the pool"
        segments += self._free_segments.tolist()
        assert sorted(segments) == list(range(1, self._num_segments)), "a segment is lost, or used twice"
        for mirror in self._mirrors:
            assert np.array_equal(mirror.tensor.cpu().numpy(), mirror.host), "host and device differ"

    # -- segments and directories -----------------------------------------------------------------------------------

    def _places(self, rows: Ints, lists: Ints, places: Ints) -> Ints:
        """Where the entries of some lists at some places lie in the arena."""
        segments = self._directory.host[self._start[rows] + lists * self._room[rows] + places // SEGMENT]
        return segments.astype(np.int64) * SEGMENT + places % SEGMENT

    def _reach(self, num_rows: int) -> None:
        self._count_of.reach(num_rows * self._num_lists)
        self._directory_of.reach(num_rows * 2)

    def _set_directory(self, row: int, start: int, room: int) -> None:
        self._directory_of.write(np.array([2 * row, 2 * row + 1]), np.array([start, room]))

    def _take_segments(self, count: int) -> Ints:
        free = len(self._free_segments)
        if count > free:
            more = np.arange(self._num_segments, self._num_segments + count - free)
            self._num_segments += len(more)
            for arena in (self._slots, self._numbers):
                arena.reach(self._num_segments * SEGMENT)
            self._free_segments = np.concatenate([self._free_segments, more])
        taken, self._free_segments = self._free_segments[-count:], self._free_segments[:-count]
        return taken

    def _drop_segments(self, rows: Ints, lists: Ints, before: NDArray[np.int32], after: Ints) -> None:
        """Gives back the segments that lists do not need any more."""
        had, needs = -(-before.astype(np.int64) // SEGMENT), -(-after // SEGMENT)
        which, places = _spread(had - needs)
        at = self._start[rows[which]] + lists[which] * self._room[rows[which]] + needs[which] + places
        self._free_segments = np.concatenate([self._free_segments, self._directory.host[at].astype(np.int64)])
        self._directory.write(at, np.zeros(len(at), np.int64))

    def _widen(self, row: int, segments: int) -> None:
        """Gives a row a directory with room for so many segments per list, and copies the one that it has."""
        room, before, lists = 1 << (segments - 1).bit_length(), int(self._room[row]), self._num_lists
        free = self._free_directories.get(room)
        if free:
            start = free.pop()
        else:
            start, self._directory_end = self._directory_end, self._directory_end + lists * room
            self._directory.reach(self._directory_end)
        table = np.zeros((lists, room), np.int64)
        if before:
            old = int(self._start[row])
            table[:, :before] = self._directory.host[old : old + lists * before].reshape(lists, before)
            self._free_directories.setdefault(before, []).append(old)
        self._directory.write(np.arange(start, start + lists * room), table.reshape(-1))
        self._set_directory(row, start, room)


_MOST_PAGES = 1 << 32
"""More than any row has."""


def _spread(counts: Ints) -> tuple[Ints, Ints]:
    """``[0] * counts[0] + [1] * counts[1] + ...``, and the place of each within its own."""
    which = np.repeat(np.arange(len(counts)), counts)
    starts = counts.cumsum() - counts
    return which, np.arange(len(which)) - starts[which]
