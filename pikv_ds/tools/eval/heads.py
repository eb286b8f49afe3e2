"""Which KV heads find things: the classes of DuoAttention (Xiao et al. 2024), by needle probes.

While a model writes the answer to a needle question, some heads look at the needle and most do not (retrieval heads,
Wu et al. 2024). A head's score is the attention that the tokens which predict the answer pay to the needle's sentence,
the most of its query heads, on average over cases. DuoAttention fits gates by gradient descent; this needs one
forward pass per case.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pikv_ds.tools.eval.snapshot import take
from pikv_ds.tools.eval.tasks import Case


def probe(model: Any, tokenizer: Any, cases: Sequence[Case], step: Callable[[], None]) -> Tensor:
    """Scores in [0, 1], ``[layers, KV heads]``."""
    total: Tensor | None = None
    for case in cases:
        answer = tokenizer(" " + case.answer, add_special_tokens=False).input_ids
        snapshot = take(model, torch.tensor([case.input_ids + list(answer)]))
        start, end = case.needle
        found = []
        for layer in snapshot.layers:
            heads = layer.key.shape[1]
            query = (
                layer.query[0, :, -len(answer) - 1 : -1].float().unflatten(0, (heads, -1))
            )  # they predict the answer
            scores = torch.einsum("kgtd,knd->kgtn", query, layer.key[0].float()) * layer.scale
            later = torch.ones(query.shape[2], scores.shape[3], dtype=torch.bool).triu(
                scores.shape[3] - query.shape[2]
            )
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            found.append(weights[..., start:end].sum(-1).mean(-1).amax(1))
        total = torch.stack(found) if total is None else total + torch.stack(found)
        step()
    assert total is not None, "no cases"
    return total / len(cases)


def classes(scores: Tensor, share: float) -> Tensor:
    """The `share` of all heads with the highest scores, bool ``[layers, KV heads]``."""
    count = max(1, round(share * scores.numel()))
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().topk(count).indices] = True
    return chosen.view(scores.shape)


def save(path: Path, scores: Tensor, share: float, model: str) -> None:
    """Writes what `DuoBudget.heads` reads."""
    content = {
        "retrieval": classes(scores, share).tolist(),
        "scores": [[round(x, 4) for x in row] for row in scores.tolist()],
        "share": share,
        "model": model,
    }
    path.write_text(json.dumps(content) + "\n")


def plot(path: Path, scores: Tensor, share: float, title: str) -> None:
    """A map of the scores; retrieval heads are framed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(max(4.0, 0.5 * scores.shape[1] + 3), max(4.0, 0.22 * scores.shape[0] + 1)))
    image = axis.imshow(scores.numpy(), aspect="auto", cmap="viridis")
    for layer, head in classes(scores, share).nonzero().tolist():
        axis.add_patch(pyplot.Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="white"))
    axis.set_xlabel("KV head")
    axis.set_ylabel("layer")
    axis.set_xticks(range(scores.shape[1]))
    axis.set_title(title, fontsize=9)
    figure.colorbar(image, label="attention to the needle")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
