"""`--state`: the tokens that each rank had generated when the job was asked to stop, so that it can go on.

A file per rank, ``FILE.rankN``. It says of which job it is, since tokens of another model, prompt or codec continue
into an answer that is wrong and looks right; and it carries a checksum.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples import generation
from pikv_ds import checks, launch_env
from pikv_ds.config import PiKVConfig, section
from pikv_ds.errors import UsageError
from pikv_ds.integrations.hf import checkpoints

VERSION = 3
WITHOUT_EFFECT = {"trace", "debug", "timeout_s", "slab_pages", "watermark", "capacity_tokens"}
"""Settings of pikv that change no token: a job may go on with others, such as more room."""


def fingerprint(
    args: argparse.Namespace, config: dict[str, Any], folder: str, prompts: list[list[int]], engine: str
) -> dict[str, Any]:
    """What decides over a rank's tokens, part by part.

    Args:
        config: DeepSpeed's, with its ``"pikv"`` section.
        folder: of the checkpoint.
        prompts: token ids of this rank's.
        engine: what runs the model.
    """
    pikv = PiKVConfig.from_dict(section(config, args.config))
    settings = {k: v for k, v in pikv.to_dict().items() if k not in WITHOUT_EFFECT}
    files = {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in pikv.files()}
    run = {"engine": engine, "dtype": args.dtype, "ignore_eos": args.ignore_eos}
    deepspeed = {k: v for k, v in config.items() if k != "pikv"}
    return {
        "model": checkpoints.identity(folder),
        "prompts": _digest(prompts),
        "settings": {**run, **settings, "files": files, "deepspeed": deepspeed},
    }


def prepare(
    args: argparse.Namespace,
    config: dict[str, Any],
    folder: str,
    world: launch_env.World,
    vocab_size: int,
    engine: str,
    **kwargs: Any,
) -> tuple[Any, list[list[int]], list[str], list[str], State]:
    """The tokenizer, this rank's prompts, what is asked in each and how the answers begin, and its file of `--state`.

    Every rank of the job calls it.

    Args:
        config, folder, engine: of `fingerprint`.
        kwargs: of the tokenizer.

    Raises:
        UsageError: a file that this rank cannot use.
        PeerError: another rank cannot use one of its own.
    """

    def work() -> tuple[Any, list[list[int]], list[str], list[str], State]:
        tokenizer = checkpoints.load_tokenizer(folder, "--model", **kwargs)
        mine, questions, prefixes = generation.my_prompts(args, tokenizer, world, vocab_size)
        job = fingerprint(args, config, folder, mine, engine) if args.state else {}
        return tokenizer, mine, questions, prefixes, State(args.state, world, job)

    return generation.together(work, world)


class State:
    """This rank's file.

    Args:
        path: as ``--state`` names it; None: nothing is kept.
        job: from `fingerprint`.
    """

    def __init__(self, path: str | None, world: launch_env.World, job: dict[str, Any]) -> None:
        self.path = None if path is None else Path(f"{path}.rank{world.rank}")
        self.world = world
        self.job = {"version": VERSION, "rank": world.rank, "ranks": world.size, **job}
        self.run = uuid.uuid4().hex
        """Of all files of one run, however often it was stopped."""

    def read(self, num_prompts: int, vocab_size: int) -> list[list[int]]:
        """Tokens after each prompt, none where nothing was noted. Every rank of the job calls it.

        Raises:
            UsageError: this rank's file is of another job, damaged or cannot be read, or the ranks' files are of
                several runs.
            PeerError: another rank has refused its file.
        """
        if self.path is None:
            return [[] for _ in range(num_prompts)]
        found = generation.together(lambda: self._found(num_prompts, vocab_size), self.world)
        everyone = generation.gather({"run": found.get("run"), "new": self.run}, self.world)
        runs = {rank: one["run"] for rank, one in enumerate(everyone) if one["run"]}
        if len(set(runs.values())) > 1:
            first = min(runs)
            other = next(rank for rank in runs if runs[rank] != runs[first])
            raise UsageError(
                f"--state: the files of ranks {first} and {other} ({self.path.stem}.rank…) are of different runs; "
                "remove all of them to begin anew, or name another file"
            )
        self.run = next(iter(runs.values()), everyone[0]["new"])
        return list(found["answers"])

    def _found(self, num_prompts: int, vocab_size: int) -> dict[str, Any]:
        """What the file holds; no tokens where there is none."""
        assert self.path is not None
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {"answers": [[] for _ in range(num_prompts)]}
        except OSError as error:
            raise UsageError(f"--state: {self.path} cannot be read ({error.strerror}); name another file") from None
        try:
            return self._load(data, num_prompts, vocab_size)
        except UsageError as error:
            raise UsageError(f"--state: {self.path} {error}; remove it to begin anew, or name another file") from None

    def _load(self, data: bytes, num_prompts: int, vocab_size: int) -> dict[str, Any]:
        try:
            content = checks.parse_json(data.decode())
        except UnicodeDecodeError:
            raise UsageError("is damaged (not a text in UTF-8)") from None
        except UsageError as error:
            raise UsageError(f"is damaged ({error})") from None
        if not isinstance(content, dict) or "answers" not in content:
            raise UsageError("holds no tokens of a job")
        if content.get("version") != VERSION:
            found = checks.shown(content.get("version", 1))
            raise UsageError(f"is of version {found} of this file, this program writes {VERSION}")
        checksum = content.pop("sha256", None)
        if checksum != _digest(content):
            raise UsageError("is damaged (its checksum differs)")
        for key in ("ranks", "rank"):
            if content[key] != self.job[key]:
                raise UsageError(f"is of rank {content['rank']} of {content['ranks']}, not {self._place()}")
        if content["model"] != self.job["model"]:
            raise UsageError("belongs to another model (config.json or weights differ)")
        if content["prompts"] != self.job["prompts"]:
            raise UsageError("belongs to other prompts")
        theirs, ours = content["settings"], json.loads(json.dumps(self.job["settings"]))
        for key in sorted({*theirs, *ours}):
            if theirs.get(key) != ours.get(key):
                there, here = checks.shown(theirs.get(key)), checks.shown(ours.get(key))
                raise UsageError(f"belongs to other settings ({key}: {there} there, {here} here)")
        answers = content["answers"]
        whole = isinstance(answers, list) and len(answers) == num_prompts
        if not whole or not all(
            isinstance(ids, list) and all(type(x) is int and 0 <= x < vocab_size for x in ids) for ids in answers
        ):
            raise UsageError(f"has no lists of token ids for {num_prompts} prompts")
        return content

    def _place(self) -> str:
        return f"rank {self.world.rank} of {self.world.size}; go on with as many ranks"

    def write(self, answers: list[list[int]]) -> None:
        """Notes the tokens after each prompt."""
        if self.path is not None:
            content = {**self.job, "run": self.run, "answers": answers}
            partial = self.path.with_suffix(self.path.suffix + ".part")
            partial.write_text(json.dumps({**content, "sha256": _digest(content)}) + "\n")
            partial.replace(self.path)

    def remove(self) -> None:
        """The job is done."""
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()


def until_end(ids: Sequence[int], ends: Sequence[int], most: int) -> list[int]:
    """An answer up to and with its first end token, at most `most` tokens: what follows is padding."""
    at = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[: min(at + 1, most)])


def is_done(ids: Sequence[int], ends: Sequence[int], most: int) -> bool:
    """Whether an answer needs no more tokens."""
    return len(ids) >= most or any(token in ends for token in ids)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
