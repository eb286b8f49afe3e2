"""Do placements put the pages that a query wants on few ranks?

    python benchmarks/placement_locality.py                       # the reference model, 6,000 tokens of prose
    python benchmarks/placement_locality.py --tokens 3000 --json locality.json

Homes are computed as the store computes them, bound included, from the experts that the model really chose, for 2, 4
and 8 ranks. Queries are the text's last ones; the pages that one wants are those of the most attention mass of its KV
head (an oracle), an eighth or a quarter of all. If placement follows what queries want, these lie on fewer ranks than
chance puts them on. A text of one piece is the harder case: of several, a query wants the pages of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pikv_ds.core.placement import owner_limit
from pikv_ds.core.rebalance import pack
from pikv_ds.ops import Ops
from pikv_ds.policies.placements import PLACEMENTS, HierarchicalPlacement, SealedPages
from pikv_ds.policies.topology import Topology
from pikv_ds.tools import tables
from pikv_ds.tools.eval.calibrate import prompt_ids
from pikv_ds.tools.eval.command import example_texts, load
from pikv_ds.tools.eval.snapshot import LayerInputs, take
from pikv_ds.tools.eval.text import read

EXAMPLES = "\n".join(line.strip() for line in (__doc__ or "").splitlines() if "python" in line)
UNLIMITED = 2**40
SHUFFLED = "expert, shuffled"
"""As many pages per rank, but any: what of the effect is the ranks' uneven shares alone."""


def homes(layer: LayerInputs, name: str, topology: Topology, page_size: int) -> Tensor:
    """The rank of each page of one layer, int64 ``[P]``."""
    assert layer.experts is not None
    pages = layer.key.shape[2] // page_size
    placement: Any = HierarchicalPlacement(2) if name == "hierarchical" else PLACEMENTS[name]()
    chosen = layer.experts[: pages * page_size].view(pages, -1)
    votes = np.stack([torch.bincount(row, minlength=topology.num_experts).numpy() for row in chosen])
    if name == "eplb":  # as if the experts had been packed with these pages in view
        counts = np.bincount(votes.argmax(1), minlength=topology.num_experts).tolist()
        topology = dataclasses.replace(topology, homes=pack(counts, topology, 1.1, 1))
    numbers, ranks = np.arange(pages), topology.num_ranks
    preference = placement.owners(SealedPages(numbers, votes, votes.cumsum(0)), topology)
    out = torch.empty(pages, dtype=torch.int32)
    Ops().place_pages(
        torch.from_numpy(preference.astype(np.int32)),
        torch.zeros(pages, dtype=torch.int32),
        torch.from_numpy(owner_limit((numbers + 1) * page_size, page_size, topology).astype(np.int32)),
        0,
        torch.zeros(1, ranks, dtype=torch.int32),
        torch.full([ranks], UNLIMITED),
        out,
    )
    return out.long()


def wanted(layer: LayerInputs, queries: int, page_size: int, share: float) -> Tensor:
    """The pages of the most attention mass, int64 ``[queries, K, pages]``."""
    pages = layer.key.shape[2] // page_size
    heads = layer.key.shape[1]
    keys = layer.key[0, :, : pages * page_size].float()
    query = layer.query[0, :, -queries:].float().unflatten(0, (heads, -1))  # [K, G, T, D]
    scores = torch.einsum("kgtd,knd->kgtn", query, keys) * layer.scale
    mass = scores.softmax(-1).unflatten(-1, (pages, page_size)).sum(-1).amax(1)  # [K, T, P]
    return mass.topk(max(1, round(share * pages)), dim=-1).indices.transpose(0, 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", default="reference", metavar="DIR", help="a MoE checkpoint; default: reference")
    parser.add_argument("--tokens", type=int, default=6000, metavar="N")
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="default: Moby Dick, of the examples'")
    parser.add_argument("--queries", type=int, default=64, metavar="N", help="last tokens whose pages count")
    parser.add_argument("--page-size", type=int, default=32, metavar="S")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.model, "bfloat16", Console(stderr=True))
    snapshot = take(model, prompt_ids(tokenizer, read(args.text or example_texts()[1:2]), args.tokens))
    experts = max(int(layer.experts.max()) for layer in snapshot.layers if layer.experts is not None) + 1
    rows = []
    for ranks in (2, 4, 8):
        if experts % ranks:
            continue
        topology = Topology(experts, ranks)
        for share in (0.125, 0.25):
            chosen = [wanted(layer, args.queries, args.page_size, share) for layer in snapshot.layers]
            for name in (*PLACEMENTS, SHUFFLED):
                visited, skew = [], []
                for layer, pages in zip(snapshot.layers, chosen, strict=True):
                    where = homes(layer, "expert" if name == SHUFFLED else name, topology, args.page_size)
                    if name == SHUFFLED:
                        where = where[torch.randperm(len(where), generator=torch.Generator().manual_seed(0))]
                    there = torch.nn.functional.one_hot(where[pages], ranks).amax(2)  # [T, K, ranks]
                    visited.append(float(there.sum(-1).float().mean()))
                    counts = torch.bincount(where, minlength=ranks)
                    skew.append(float(counts.max()) * ranks / float(counts.sum()))
                mean = sum(visited) / len(visited)
                rows.append({"ranks": ranks, "budget": share, "placement": name, "visited": mean,
                             "saved": 1 - mean / ranks, "skew": sum(skew) / len(skew)})  # fmt: skip
    table = Table(title=f"{args.model}, {snapshot.length} tokens, pages of {args.page_size}: ranks with wanted pages",
                  title_justify="left")  # fmt: skip
    for head in ("ranks", "budget", "placement", "ranks visited", "queries saved", "skew of pages"):
        table.add_column(head, justify="left" if head == "placement" else "right")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and (before["ranks"], before["budget"]) != (row["ranks"], row["budget"]):
            table.add_section()
        table.add_row(str(row["ranks"]), f"{row['budget']:.1%}", str(row["placement"]), f"{row['visited']:.3f}",
                      f"{row['saved']:.1%}", f"{row['skew']:.2f}")  # fmt: skip
    tables.show(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
