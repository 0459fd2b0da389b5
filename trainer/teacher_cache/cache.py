"""Decides when the teacher runs and when its stored maps and logits are used."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from trainer.config import Config
from trainer.data import LabelledImages
from trainer.distributed import Ranks
from trainer.errors import ConfigError
from trainer.methods import Method, Taught
from trainer.teacher import Teacher
from trainer.teacher_cache import records
from trainer.teacher_cache.layout import Layout
from trainer.torch_settings import autocast, in_layout, new_pass

FORMAT = 1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Keys that decide what the teacher sees, and in which arithmetic; of its maps, those in `_header`.
KEYS = (
    "dataset",
    "image-size",
    "augment",
    "crop-padding",
    "limit-train",
    "seed",
    "augment-cycle",
    "teacher",
    "teacher-args",
    "amp",
    "precision",
    "teacher-cache-dtype",
)


class TeacherCache:
    """The teacher's maps and logits of the training images, per epoch of augment-cycle, computed once.

    The rows of an epoch of the cycle are made in the first epoch that uses them and, where they were lost
    since, in the same batches as then: so a run has the same bits however often it is interrupted. For the
    same reason a row that has just been made is used as it will be read, rounded.

    Raises:
        ConfigError: teacher-cache is a folder with other contents, or the memory can't hold it.
    """

    def __init__(
        self, config: Config, ranks: Ranks, dataset: LabelledImages, method: Method, teacher: Teacher
    ) -> None:
        self.config, self.ranks, self.dataset, self.method = config, ranks, dataset, method
        self.layout = Layout.of(method.teach(dataset.example()), config.teacher_cache_dtype)
        self.first = 0 if method.distils else config.at_start_epoch  # epoch in which the teacher is asked
        self.shape = config.augment_cycle, len(dataset.train), self.layout.bytes
        self.records: records.Records | None = None  # None also where the disk is full
        self._whole: set[int] = set()  # epochs of the cycle that lack no row which can be made
        self.folder = config.teacher_cache if isinstance(config.teacher_cache, Path) else None
        if self.folder is None:
            self._check_memory()
        else:
            header = self._header(teacher)
            self.header: dict[str, Any] = json.loads(json.dumps(header))  # as it will be read
            records.check(self.folder, self.header, self.shape)

    def open(self) -> str:
        """Begin to keep and to read; returns a line that says so, or why not."""
        cycle, images, size = self.shape
        told = f"{cycle * images * size / 1e6:,.1f} MB ({cycle} x {images:,} images, {self.layout.dtype})"
        if self.folder is None:
            self.records = records.InMemory(self.shape)
            return f"teacher-cache: {told} in memory"
        try:
            records.create(self.folder, self.header, self.shape)
            self.records = records.InFolder(self.folder, self.header, self.shape)
        except OSError as error:
            if error.errno not in FULL:
                raise ConfigError(f"teacher-cache {self.folder}: {error.strerror}") from None
            return f"warning: teacher-cache {self.folder}: {error.strerror} for {told}: going on without it"
        return f"teacher-cache: {told} in {self.folder}"

    def begin_epoch(
        self,
        epoch: int,
        parts: Sequence[slice],
        interrupted: Callable[[], int],
        say: Callable[[str], None],
    ) -> int:
        """Compute what is missing for the batches `parts` of an epoch; all ranks must call.

        Returns the number of a signal that `interrupted` it, else 0.
        """
        cycle = self.shape[0]
        self.epoch, self.place = epoch, epoch % cycle
        self.home = self.first + (self.place - self.first) % cycle  # the epoch in which its rows are made
        self.order = self._order(epoch)
        if epoch <= self.home or self.place in self._whole:
            return 0
        order = self._order(self.home)
        if missing := self._missing(order, parts):
            images = sum(part.stop - part.start for part in missing)
            say(f"teacher-cache: {images:,} images of epoch {self.home + 1} are missing, and made again")
        shares = [self.ranks.share(part.start, part.stop) for part in missing]
        batches = self.dataset.training_batches(self.config.seed, self.home, shares, self.shape[0])
        for part, (some, _) in zip(missing, batches, strict=True):
            self._make(order[part], some)
            if signal := interrupted():
                return signal
        self.ranks.gather(None)  # nobody reads before all have written
        self._whole.add(self.place)
        return 0

    def taught(self, part: slice, images: Tensor) -> Taught | None:
        """The teacher's maps and logits of `images`, this rank's share of the epoch's batch `part`.

        None before the epoch in which the student is first taught.
        """
        if self.epoch < self.first:
            return None
        share = self.ranks.share(part.start, part.stop)
        mine = self.order[share]
        if self.records is not None and bool(self.records.known(self.place, mine).all()) and self._ours(mine):
            rows = self.records.read(self.place, mine)
        elif self.epoch == self.home:
            rows = self._make(self.order[part], images)
        else:
            rows = self._rows(images)
        return self.layout.unpack(rows, images.device)

    # --- rows -----------------------------------------------------------------------------------------

    def _rows(self, images: Tensor) -> Tensor:
        """Those of a rank's share of a batch: the teacher sees as many at once as the student."""
        config, rows = self.config, []
        for some in images.chunk(config.accumulate):
            new_pass(config)
            with autocast(config, self.ranks.device):
                rows.append(self.layout.pack(self.method.teach(in_layout(config, some))))
        return torch.cat(rows)

    def _make(self, indices: Tensor, images: Tensor) -> Tensor:
        """Make and keep the rows of a global batch, whose images are `indices`; returns this rank's."""
        share = self.ranks.share(0, len(indices))
        rows = self._rows(images)
        keep = ~self._replaced(indices[share])
        found, theirs = indices[share], rows
        if self.folder is None and self.ranks.world > 1:  # each rank will read them all
            whole = torch.zeros(len(indices), rows.shape[1] + 1, dtype=torch.uint8)
            whole[share] = torch.cat([rows, keep[:, None].to(torch.uint8)], 1)
            self.ranks.sum_(whole)
            found, theirs, keep = indices, whole[:, :-1], whole[:, -1].bool()
        if self.records is not None and self.records.writable:
            try:
                self.records.write(self.place, found[keep], theirs[keep])
            except OSError as error:
                line = f"warning: teacher-cache {self.folder}: {error.strerror}: nothing more is kept there"
                print(line, file=sys.stderr, flush=True)
        return rows

    def _missing(self, order: Tensor, parts: Sequence[slice]) -> list[slice]:
        """The batches of which some rank lacks rows that can be made and kept."""
        mine: list[int] = []
        if self.records is not None and self.records.writable:
            known = self.records.known(self.place, order) | self._replaced(order)
            mine = [i for i, part in enumerate(parts) if not bool(known[part].all())]
        return [parts[i] for i in sorted({i for found in self.ranks.gather(mine) for i in found})]

    def _order(self, epoch: int) -> Tensor:
        return self.dataset.training_order(self.config.seed, epoch)

    def _replaced(self, indices: Tensor) -> Tensor:
        """Which of the images were not what the batch held: their rows are not theirs. (n,) bool."""
        return torch.isin(indices, torch.tensor([*self.dataset.replaced], dtype=indices.dtype))

    def _ours(self, indices: Tensor) -> bool:
        return not self.dataset.replaced or not bool(self._replaced(indices).any())

    # --- what must be the same ------------------------------------------------------------------------

    def _header(self, teacher: Teacher) -> dict[str, Any]:
        values = self.config.model_dump(mode="json", by_alias=True)
        maps = self.layout.maps
        names = getattr(self.method, "t_names", ())
        return {
            "format": FORMAT,
            "teacher's weights": teacher.digest,
            "teacher's code": next(iter(models.code(self.config.teacher or "").values()), None),
            "training images": self.dataset.training_digest(),
            **{key: values[key] for key in KEYS},
            "logits": self.layout.logits,
            "maps": maps and [[name, *size] for name, size in zip(names, maps, strict=True)],
            **{key: maps and values[key] for key in ("p", "mapping", "normalize")},
        }

    def _check_memory(self) -> None:
        cycle, images, size = self.shape
        needed = cycle * images * size * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
        if needed > there:
            raise ConfigError(
                f"teacher-cache memory: {needed / 1e9:,.0f} GB would be needed on this machine, which has "
                f"{there / 1e9:,.0f}; name a folder, or lower augment-cycle"
            )
