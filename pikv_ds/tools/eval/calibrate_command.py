"""The commands `pikv calibrate` and `pikv codecs`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_ds.errors import UsageError
from pikv_ds.tools import tables
from pikv_ds.tools.command_line import THREADS, check_folders, name_or_json, whole
from pikv_ds.tools.eval.command import example_texts, load


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands `calibrate` and `codecs` to `pikv`."""
    for name, text, examples, run in (
        ("calibrate", "fits low-rank, distilled or corrected bases for a codec to a text", CALIBRATE, calibrate),
        ("codecs", "shows what codecs lose of a text's keys, values and attention", CODECS, codecs),
    ):
        parser = commands.add_parser(
            name, help=text, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--model", default="reference-dense", metavar="DIR", help="or reference, reference-dense")
        parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
        parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="default: the examples'")
        parser.add_argument("--tokens", type=whole(), default=4096, metavar="N", help="of the text; default: 4096")
        parser.add_argument("--page-size", type=whole(), default=32, metavar="S")
        parser.add_argument("--threads", type=whole(most=THREADS), default=torch.get_num_threads(), metavar="N")
        if name == "calibrate":
            parser.add_argument("--method", default="distilled", metavar="NAME", help="lowrank, distilled or lora")
            parser.add_argument("--rank", type=whole(), default=32, metavar="R", help="default: 32")
            parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
        parser.add_argument("--codec", action="append", default=[], metavar="NAME or JSON",
                            help="how coefficients are stored" if name == "calibrate" else "repeatable")  # fmt: skip
        parser.set_defaults(run=run)


CALIBRATE = """examples:
  pikv calibrate --method distilled --rank 32 --out bases.safetensors
  pikv calibrate --method lora --rank 8 --codec '{"name": "int2", "rotate": true}' --out int2-lora.safetensors
  then, in a configuration:  "codec": {"name": "int4", "projections": "bases.safetensors"}"""
CODECS = """examples:
  pikv codecs                                              all of them
  pikv codecs --codec int4 --codec '{"name": "int4", "projections": "bases.safetensors"}'"""


def _codec(text: str) -> Any:
    from pikv_ds.config import PiKVConfig

    return PiKVConfig.from_dict({"codec": name_or_json("codec", text)}).codec


def _snapshots(args: argparse.Namespace, shares: Sequence[float]) -> list[Any]:
    """Snapshots of consecutive pieces of the text."""
    from pikv_ds.tools.eval import calibrate as calibration
    from pikv_ds.tools.eval.snapshot import take
    from pikv_ds.tools.eval.text import read

    if args.tokens < 8 * args.page_size:
        raise UsageError(f"--tokens {args.tokens}: use at least {8 * args.page_size}, eight pages")
    torch.set_num_threads(args.threads)
    texts = read(args.text or example_texts())
    console = Console(stderr=True)
    model, tokenizer = load(args.model, args.dtype, console)
    ids = calibration.prompt_ids(tokenizer, texts, args.tokens)
    ends = [round(sum(shares[: i + 1]) * ids.shape[1]) for i in range(len(shares))]
    with console.status("running the model over the text …"):
        return [take(model, ids[:, start:end]) for start, end in itertools.pairwise([0, *ends])]


def calibrate(args: argparse.Namespace) -> int:
    """Fits bases on three quarters of the text and reports errors on the rest."""
    from rich.table import Table

    from pikv_ds.tools.eval import calibrate as calibration

    if len(args.codec) > 1:
        raise UsageError("--codec: bases are for one codec; name one")
    codec = _codec(args.codec[0] if args.codec else "none")
    if args.method not in calibration.METHODS:
        raise UsageError(f"--method {args.method}: choose of {', '.join(calibration.METHODS)}")
    check_folders(args.out)
    seen, unseen = _snapshots(args, (0.75, 0.25))
    bases = calibration.fit(seen, args.method, args.rank, codec, args.page_size)
    facts = {"method": args.method, "rank": str(args.rank), "model": args.model, "codec": json.dumps(codec.settings())}
    calibration.save(str(args.out), bases, facts)
    fitted = dataclasses.replace(codec, rotate=False, projections=str(args.out))
    before, _ = calibration.errors(unseen, codec, args.page_size)
    after, share = calibration.errors(unseen, fitted, args.page_size)
    title = f"{args.out}: {args.method}, rank {args.rank}, {share:.3f} of plain pages"
    caption = "relative errors on text that was not fitted to; in brackets without the bases"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in ("layer", "keys", "values", "attention output"):
        table.add_column(name, justify="right")
    for i, (a, b) in enumerate(zip(after, before, strict=True)):
        table.add_row(str(i), *(f"{getattr(a, k):.3f} ({getattr(b, k):.3f})" for k in ("keys", "values", "output")))
    tables.show(table)
    return 0


def codecs(args: argparse.Namespace) -> int:
    """Errors of codecs, the mean over layers."""
    from rich.table import Table

    from pikv_ds.policies.codecs import ELEMENTS, Codec
    from pikv_ds.tools.eval import calibrate as calibration
    from pikv_ds.tools.eval.methods import ROTATED

    chosen = [_codec(text) for text in args.codec] or [
        *(Codec(name) for name in ELEMENTS if name != "int1"),
        *(Codec(k, values=None if k == v else v, **ROTATED) for k, v in PAIRS),  # type: ignore[arg-type]
    ]
    (snapshot,) = _snapshots(args, (1.0,))
    title = f"{args.model}, {args.dtype}, {args.tokens} tokens, pages of {args.page_size}"
    table = Table(
        title=title, title_justify="left", caption="relative errors, mean over layers", caption_justify="left"
    )
    for name in ("codec", "bytes / plain", "keys", "values", "attention output"):
        table.add_column(name, justify="left" if name == "codec" else "right")
    for codec in chosen:
        found, share = calibration.errors(snapshot, codec, args.page_size)
        means = (sum(getattr(e, k) for e in found) / len(found) for k in ("keys", "values", "output"))
        setting = codec.settings()
        text = setting if isinstance(setting, str) else ", ".join(
            f"{v}" if k == "name" else f"{k} {v}" for k, v in setting.items())  # fmt: skip
        table.add_row(text, f"{share:.3f}", *(f"{m:.4f}" for m in means))
    tables.show(table)
    return 0


PAIRS = (("int4", "int4"), ("int4", "int2"), ("int3", "int3"), ("int3", "int2"), ("int2", "int2"), ("int2", "int1"))
"""Elements of keys and values that `pikv codecs` shows rotated, clipped and with eight-bit scales."""
