"""Records a page trace of routing over many experts, for `pikv plan --simulate`.

    python benchmarks/record_routing.py --experts 128 --out benchmarks/results/routing-128    # about two minutes

The reference model is SmolLM2-135M, sparsely upcycled: its experts are copies of one FFN, so its hidden states do not
depend on its router. That lets routers with any number of experts be put beside the dense model: centroids of its
hidden states (spherical k-means, as in `pikv_ds.tools.reference_model`), found on the beginnings of the books and
applied to what follows. Each token chooses its `--top-k` nearest; each page of tokens is written as the cache's own
trace writes it, with its home expert and votes. Real text, and a real model's hidden states; the router is ours, not a
trained one.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.progress import track

from pikv_ds.core.trace import PageTrace
from pikv_ds.tools.reference_model import example_texts, ffn_inputs, load_dense, router_weight

EXAMPLES = "\n".join(line.strip() for line in (__doc__ or "").splitlines() if "python" in line)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--experts", type=int, default=128, metavar="E")
    parser.add_argument("--top-k", type=int, default=8, metavar="K")
    parser.add_argument("--layers", type=int, default=6, metavar="N", help="evenly spread over the model's 30")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="of each sequence that is recorded")
    parser.add_argument("--sequences", type=int, default=4, metavar="N")
    parser.add_argument("--page-size", type=int, default=32, metavar="S")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args(argv)
    model, tokenizer = load_dense()
    texts = [tokenizer(path.read_text(), return_tensors="pt", verbose=False).input_ids[0] for path in example_texts()]
    fitted, recorded = [], []
    for ids in texts:  # the first part of each book is for the routers, what follows for the record
        fitted.append(ids[: args.tokens])
        rest = ids[args.tokens :]
        each = -(-args.sequences // len(texts))
        recorded += [rest[i * args.tokens : (i + 1) * args.tokens] for i in range(each)]
    recorded = [ids for ids in recorded if len(ids) == args.tokens][: args.sequences]
    total = model.config.num_hidden_layers
    layers = [i * total // args.layers for i in range(args.layers)]
    states = ffn_inputs(model, torch.cat(fitted), lambda _: None)[layers]
    routers = [
        router_weight(x, args.experts, 12, 0.6, i)
        for i, x in enumerate(track(states, "routers", transient=True, disable=not sys.stderr.isatty()))
    ]
    facts = {
        "ranks": 1, "layers": args.layers, "experts": args.experts, "page_size": args.page_size,
        "capacity_pages": None, "placement": "expert", "lookup": "exact", "codecs": [],
        "source": f"SmolLM2-135M, k-means routers of layers {layers}, top {args.top_k}",
    }  # fmt: skip
    trace = PageTrace(args.out, 0, facts)
    for sequence, ids in enumerate(track(recorded, "sequences", transient=True, disable=not sys.stderr.isatty())):
        hidden = ffn_inputs(model, ids, lambda _: None)[layers]
        for layer, (x, router) in enumerate(zip(hidden, routers, strict=True)):
            chosen = (x @ router.T).topk(args.top_k, dim=1).indices  # [T, k]
            pages = [part.flatten() for part in chosen.split(args.page_size) if len(part) == args.page_size]
            votes = torch.stack([torch.bincount(part, minlength=args.experts) for part in pages]).numpy()
            numbers = np.arange(len(pages))
            arrays = numbers * 0 + sequence, numbers * 0 + layer, numbers, numbers * 0, votes.argmax(1)
            trace.seal(*arrays, {layer: votes})
    trace.close()
    with trace.path.open("rb") as plain, gzip.open(f"{trace.path}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    trace.path.unlink()
    print(f"{len(recorded)} sequences of {args.tokens} tokens in {trace.path}.gz")
    return 0


if __name__ == "__main__":
    sys.exit(main())
