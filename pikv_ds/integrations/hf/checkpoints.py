"""Hugging Face checkpoints, whole or not at all.

`from_pretrained` draws at random what a checkpoint lacks, and leaves out what the model has no place for: a model of
random layers runs, and answers. Here both are errors, as are tensors of another shape. What transformers itself
declares as dispensable (``_keys_to_ignore_on_load_missing`` and ``_unexpected``, tied weights) is not reported by it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pikv_ds import checks
from pikv_ds.errors import UsageError

FOLDER = "name the folder of a Hugging Face checkpoint"
SAMPLES, SAMPLE = 64, 2**16
NAMED = 3
"""Tensors that a message names of each kind."""
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD = "pytorch_model*.bin"
WEIGHTS = ("*.safetensors", OLD)


class CheckpointError(UsageError):
    """The files are not the weights of this model; the message names the folder and the file or the tensors."""


def load_model(folder: str | Path, dtype: torch.dtype, option: str = "") -> Any:
    """A causal language model in evaluation mode, every weight of it from the checkpoint.

    Args:
        option: of the command line that named the folder, for messages.

    Raises:
        CheckpointError: there is no model in the folder, a file is damaged, or config.json and the weights do not fit
            each other: tensors that are missing, unexpected, or of another shape, by name.
    """
    from transformers import AutoModelForCausalLM

    check_files(folder, option)
    with _quiet():
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a file that somebody else has written makes transformers raise anything
            told = checks.one_line(error)
            if isinstance(error, (KeyError, TypeError, AttributeError, IndexError)):  # whose words say little
                told = f"a setting in its JSON files cannot be used ({type(error).__name__}: {told})"
            raise CheckpointError(f"{_where(folder, option)}: {told}") from error
    mismatched = [
        f"{name} {list(stored)} instead of {list(wanted)}" for name, stored, wanted in found["mismatched_keys"]
    ]
    refuse_unfitting(folder, found["missing_keys"], found["unexpected_keys"], mismatched, option)
    if found["error_msgs"]:
        raise CheckpointError(f"{_where(folder, option)}: {checks.one_line('; '.join(found['error_msgs']))}")
    return model.eval()


def load_tokenizer(folder: str | Path, option: str = "", **kwargs: Any) -> Any:
    """The tokenizer of a checkpoint.

    Args:
        option: of the command line that named the folder, for messages.
        kwargs: of `AutoTokenizer.from_pretrained`.

    Raises:
        CheckpointError: there is none in the folder, or its files cannot be read.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise CheckpointError(f"{_where(folder, option)}: no such folder; {FOLDER}")
    remedy = "copy the tokenizer's files there from where the weights are from"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **kwargs)
    except Exception as error:  # of tokenizers, sentencepiece, protobuf, …
        known = any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
        reason = checks.one_line(error)[:300] if known else "no tokenizer there (tokenizer.json)"
        raise CheckpointError(f"{_where(folder, option)}: {reason}; {remedy}") from error
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((Path(folder) / name).is_file() for name in names):  # an empty vocabulary, which transformers takes
        raise CheckpointError(f"{_where(folder, option)}: no tokenizer there ({', '.join(sorted(names))}); {remedy}")
    return tokenizer


def check_files(folder: str | Path, option: str = "") -> None:
    """Whether a folder has a model with whole files in it; reads headers only.

    Raises:
        CheckpointError: naming the file.
    """
    path, where, remedy = Path(folder), _where(folder, option), FOLDER
    if not path.is_dir():
        raise CheckpointError(f"{where}: no such folder; {remedy}")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{where}: no config.json there; {remedy}")
    try:
        config = checks.read_json(path / "config.json")
        if not isinstance(config, dict):
            raise UsageError("no JSON object")
    except UsageError as error:
        raise CheckpointError(f"{where}: config.json: {error}; {remedy}") from None
    files = safetensors_files(path)
    if not files and not any(path.glob(OLD)):
        raise CheckpointError(f"{where}: no weights there ({WHOLE}, {INDEX} or {OLD}); {remedy}")
    for _ in open_files(files):
        pass


def identity(folder: str | Path) -> str:
    """SHA-256 of a checkpoint: its settings, and names, sizes and samples of its weights.

    Of a large file `SAMPLES` pieces of `SAMPLE` bytes are read, spread over it: enough to tell two trainings of one
    model apart, without reading hundreds of gigabytes.
    """
    path = Path(folder)
    files = [path / "config.json", path / "generation_config.json", path / INDEX]
    return sampled([*files, *sorted(file for pattern in WEIGHTS for file in path.glob(pattern))])


def sampled(files: Iterable[Path]) -> str:
    """SHA-256 of names, sizes and `SAMPLES` pieces of files; those that are missing are left out."""
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            step = max(SAMPLE, (size - SAMPLE) // (SAMPLES - 1))
            for start in range(0, size, step):
                content.seek(start)
                digest.update(content.read(SAMPLE))
    return digest.hexdigest()


def safetensors_files(path: Path) -> list[Path]:
    """The safetensors files that are a folder's model: `WHOLE` or those of its index, as transformers chooses.

    Others that lie there (an adapter, ``consolidated.safetensors``) are not of the model.

    Raises:
        CheckpointError: the index cannot be read.
    """
    if (path / WHOLE).is_file():
        return [path / WHOLE]
    if not (path / INDEX).is_file():
        return []
    try:
        table = checks.read_json(path / INDEX)["weight_map"]
        return [path / name for name in sorted(set(table.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / INDEX}: no table of tensors and files in it ({error!r})") from None


def open_files(files: Iterable[Path]) -> Iterator[tuple[Path, Any]]:
    """Each of a model's safetensors files with its name, open.

    Raises:
        CheckpointError: one cannot be read, or two have a tensor of the same name.
    """
    owners: dict[str, Path] = {}
    for path in files:
        file = open_safetensors(path)
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name in owners:
                raise CheckpointError(
                    f"{path}: has {name}, and so has {owners[name].name}; the files are of different "
                    "checkpoints, copy one of them anew"
                )
            owners[name] = path
        yield path, file


def open_safetensors(file: Path) -> Any:
    """An open safetensors file.

    Raises:
        CheckpointError: it is missing, cut off or something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        reason = checks.one_line(error)
        raise CheckpointError(f"{file}: {reason}; the checkpoint is incomplete or damaged, copy it anew") from None


def refuse_unfitting(
    folder: str | Path,
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Collection[str],
    option: str = "",
) -> None:
    """Raises the error that names what of a model's weights is missing, unexpected or of another shape, if anything.

    Args:
        mismatched: names with both shapes.
    """
    parts = [
        f"{what} {_some(sorted(names))}"
        for what, names in (
            ("the checkpoint lacks", missing),
            ("the model has no place for", unexpected),
            ("of another shape:", mismatched),
        )
        if names
    ]
    if parts:
        raise CheckpointError(
            f"{_where(folder, option)}: config.json does not describe these weights: {'; '.join(parts)}. "
            "Use the config.json that came with them"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _where(folder: str | Path, option: str) -> str:
    return f"{option} {folder}" if option else str(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the report that transformers logs of missing weights, and without its progress bar: ours say it."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
