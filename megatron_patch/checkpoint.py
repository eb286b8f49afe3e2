"""The tensors of a Hugging Face checkpoint, read in slices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from pikv_ds.integrations.hf import checkpoints
from pikv_ds.integrations.hf.checkpoints import CheckpointError


class MissingTensorError(CheckpointError):
    """Tensors that a parameter is made of are not there."""

    def __init__(self, directory: Path, names: list[str]) -> None:
        super().__init__(f"{directory}: no tensor {', '.join(names)} there; is it a checkpoint of this model?")
        self.names = names


class ShapeError(CheckpointError):
    """A tensor or a parameter is of another shape than config.json says."""


STORED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per number of the types, in safetensors' words, whose numbers are the weights themselves."""

MAPPED_BYTES = 64 * 2**20
"""How much of a file is read before it is opened anew. What was read of a mapped file counts as this
process's memory until the file is closed; without this a rank would hold its weights twice."""


class Checkpoint:
    """The tensors of a folder with safetensors files, read in slices, one file open at a time.

    Raises:
        CheckpointError: no such files, one that cannot be read, or a tensor that two of them have.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.read_bytes = 0
        self.nbytes = 0
        """Bytes of all tensors."""
        self.requested: set[str] = set()
        """Names that somebody has asked for, there or not."""
        self.shapes: dict[str, list[int]] = {}
        """Of all tensors."""
        self._paths: dict[str, Path] = {}  # the file of each tensor
        self._file: tuple[Path, Any] | None = None  # the open one
        self._mapped_bytes = 0
        for path, file in checkpoints.open_files(self._files()):
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                self.nbytes += math.prod(part.get_shape()) * STORED.get(part.get_dtype(), 1)
                self._paths[name] = path
                self.shapes[name] = list(part.get_shape())

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def need(self, *names: str) -> None:
        """Notes that these are asked for.

        Raises:
            MissingTensorError: some are not there.
        """
        self.requested.update(names)
        if missing := [name for name in names if name not in self]:
            raise MissingTensorError(self.directory, missing)

    def read(self, name: str, *index: slice | int) -> Tensor:
        """A tensor, or a part of it; what is not asked for is not read.

        Raises:
            CheckpointError: it is not there, or it is quantised.
        """
        self.need(name)
        path = self._paths[name]
        file = self._open(path)
        dtype = file.get_slice(name).get_dtype()
        if dtype not in STORED:
            raise CheckpointError(
                f"{path}: {name} is stored as {dtype}, which means nothing without its scales; "
                "dequantise the checkpoint to bf16 first"
            )
        tensor = file.get_slice(name)[index] if index else file.get_tensor(name)
        self.read_bytes += tensor.nbytes
        self._mapped_bytes += tensor.nbytes
        return tensor

    def _files(self) -> list[Path]:
        files = checkpoints.safetensors_files(self.directory)
        if not files:
            raise CheckpointError(
                f"{self.directory}: neither {checkpoints.WHOLE} nor {checkpoints.INDEX} there; "
                "PiKV loads safetensors only"
            )
        return files

    def _open(self, path: Path) -> Any:
        if self._file is None or self._file[0] != path or self._mapped_bytes >= MAPPED_BYTES:
            self._file = (path, checkpoints.open_safetensors(path))
            self._mapped_bytes = 0
        return self._file[1]
