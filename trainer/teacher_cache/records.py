"""Where rows of bytes are kept, by epoch of the cycle and by image: in memory, or in a folder."""

from __future__ import annotations

import errno
import json
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from at_fused._files import write_atomically
from trainer.errors import ConfigError
from trainer.lock import LOCK, held

HEADER, RECORDS = "header.json", "records.bin"
CRC = 4  # bytes, behind each row
CANNOT = (errno.EINVAL, errno.EOPNOTSUPP)  # of file systems that take room only as it is written to

Shape = tuple[int, int, int]  # epochs of the cycle, images, bytes of a row


class Records(Protocol):
    """Rows (n, bytes) uint8 of the images `indices` (n,) in an epoch of the cycle."""

    writable: bool

    def known(self, epoch: int, indices: Tensor) -> Tensor:
        """Which of them are stored completely: (n,) bool."""
        ...

    def read(self, epoch: int, indices: Tensor) -> Tensor:
        """The rows; those that are not `known` hold arbitrary values."""
        ...

    def write(self, epoch: int, indices: Tensor, rows: Tensor) -> None:
        """Keep those that are not `known` yet."""
        ...


class InMemory:
    """Rows in this process's memory."""

    writable = True

    def __init__(self, shape: Shape) -> None:
        # NumPy's zeros take no page before it is written to.
        self._rows = torch.from_numpy(np.zeros(shape, np.uint8))
        self._known = torch.zeros(shape[:2], dtype=torch.bool)

    def known(self, epoch: int, indices: Tensor) -> Tensor:
        return self._known[epoch, indices]

    def read(self, epoch: int, indices: Tensor) -> Tensor:
        return self._rows[epoch].index_select(0, indices)

    def write(self, epoch: int, indices: Tensor, rows: Tensor) -> None:
        self._rows[epoch].index_copy_(0, indices, rows)
        self._known[epoch, indices] = True


class InFolder:
    """A memory-mapped file that any number of processes reads and writes at once.

    Each row is followed by its checksum, which begins with the header's: a row that was not written, not
    completely written, or written for another header, is not known. All writers of a row write the same.
    """

    def __init__(self, folder: Path, header: dict[str, Any], shape: Shape) -> None:
        """Open the records in `folder`, where `create` has been.

        Raises:
            OSError: it can't be read.
        """
        cycle, self._images, size = shape
        self._size = size + CRC
        self._start = zlib.crc32(_text(header).encode())
        self._file: IO[bytes] | None = None
        with suppress(OSError):  # of somebody else, or on a disk that is read-only: it can still be read
            self._file = open(folder / RECORDS, "r+b", buffering=0)  # noqa: SIM115 (closed with this object)
        self.writable = self._file is not None
        self._mapped = np.memmap(folder / RECORDS, np.uint8, "r", shape=(cycle, self._images, self._size))
        self._seen = np.zeros(shape[:2], dtype=bool)  # whose checksums were right

    def known(self, epoch: int, indices: Tensor) -> Tensor:
        places = indices.numpy()
        seen, mapped = self._seen[epoch], self._mapped[epoch]
        for place in places[~seen[places]].tolist():
            row = mapped[place]
            seen[place] = self._checksum(row[:-CRC]) == row[-CRC:].tobytes()
        return torch.from_numpy(seen[places])

    def read(self, epoch: int, indices: Tensor) -> Tensor:
        rows = self._mapped[epoch].take(indices.numpy(), axis=0)
        return torch.from_numpy(rows)[:, :-CRC].contiguous()

    def write(self, epoch: int, indices: Tensor, rows: Tensor) -> None:
        """Raises OSError where the disk is full."""
        if self._file is None:
            return
        for place, row in zip(indices.tolist(), rows.numpy(), strict=True):
            if self._seen[epoch, place]:
                continue
            start = self._size * (epoch * self._images + place)
            try:
                written = os.pwrite(self._file.fileno(), row.tobytes() + self._checksum(row), start)
                if written < self._size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self.writable = False
                raise

    def _checksum(self, row: np.ndarray) -> bytes:
        return zlib.crc32(row.data, self._start).to_bytes(CRC, "little")


def check(folder: Path, header: dict[str, Any], shape: Shape) -> bool:
    """Whether `folder` holds records by this header; nothing is touched.

    Raises:
        ConfigError: it holds those of another header, or something else, or they are damaged.
    """
    where = f"teacher-cache {folder}"
    try:
        names = {*os.listdir(folder)} - {LOCK, f".{HEADER}.tmp"} if folder.exists() else set()
        length = (folder / RECORDS).stat().st_size if HEADER in names else 0
        stored = json.loads((folder / HEADER).read_text(encoding="utf-8")) if HEADER in names else None
    except OSError as error:
        raise ConfigError(f"{where}: {error.filename or ''}: {error.strerror}") from None
    except ValueError:
        stored = ()
    if stored is None:
        if others := names - {RECORDS}:
            raise ConfigError(f"{where} holds other files ({min(others)}); name a new folder")
        return False
    if not isinstance(stored, dict):
        raise ConfigError(f"{where}: its {HEADER} is damaged; name a new folder")
    if differing := [key for key in {**header, **stored} if stored.get(key) != header.get(key)]:
        told = ", ".join(_difference(key, stored.get(key), header.get(key)) for key in differing)
        raise ConfigError(f"{where} was made for something else: {told}; name a new folder or remove it")
    if length != _length(shape):
        raise ConfigError(
            f"{where}: its {RECORDS} has {length:,} of {_length(shape):,} bytes; name a new folder"
        )
    return True


def create(folder: Path, header: dict[str, Any], shape: Shape) -> None:
    """Make `folder` hold records by this header, if it doesn't yet: room for all, none of them known.

    Raises:
        ConfigError: as from `check`, another training having been faster, or the folder can't be made.
        OSError: there is no room.
    """
    if check(folder, header, shape):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"teacher-cache {folder}: {error.strerror}") from None
    with held(folder):
        if check(folder, header, shape):
            return
        try:
            with open(folder / RECORDS, "wb") as file:  # of a start that was cut short, if there is one
                _reserve(file.fileno(), _length(shape))
                os.fsync(file.fileno())
        except OSError:
            (folder / RECORDS).unlink(missing_ok=True)
            raise
        write_atomically(folder / HEADER, _text(header).encode())  # last: with it the records count


def _reserve(file: int, length: int) -> None:
    """Take the room now, where the file system can: else a disk may prove full in the middle."""
    os.ftruncate(file, length)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(file, 0, length)
        except OSError as error:
            if error.errno not in CANNOT:
                raise


def _length(shape: Shape) -> int:
    cycle, images, size = shape
    return cycle * images * (size + CRC)


def _text(header: dict[str, Any]) -> str:
    return json.dumps(header, indent=2) + "\n"


def _difference(key: str, stored: Any, now: Any) -> str:
    return f"other {key}" if key.endswith(("weights", "code", "images")) else f"{key} {stored}, now {now}"
