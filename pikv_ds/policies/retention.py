"""Retention: which tokens go first when a budget is short.

A policy says two things. `scores` rates the tokens of a prompt, once, when its attention has run; what the budget
does not let a head keep is dropped before the pages are sealed (as SnapKV and kvpress do). While decoding, whole
pages are evicted by their *utility* (as H2O does),

    utility = mass_weight * mass + recency_weight / (1 + age) + frequency_weight * log(1 + visits)

with `mass` a moving average of the attention that the page has received, `age` the steps since its last visit, and
ties going to the older page. A policy is a frozen dataclass with one method; add one by writing it and naming it in
`RETENTIONS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from pikv_ds import checks
from pikv_ds.errors import UsageError

SUM = 1 - 2**-20
"""A decay so slow that the moving average is a sum, times ``1 - SUM``."""
MOST_KERNEL = 1023
"""Tokens over which scores are smoothed."""


@dataclass(frozen=True)
class Prompt:
    """A prompt at one layer, positions already encoded."""

    query: Tensor
    """``[H, n, D]``"""
    key: Tensor
    """``[K, n, D]``"""
    value: Tensor
    """``[K, n, V]``"""
    scale: float
    source: Any = None
    """The attention module and its inputs, where an integration hands them over (`kvpress:NAME` needs them)."""

    @property
    def length(self) -> int:
        return self.key.shape[1]

    def attention(self, window: int) -> Tensor:
        """Attention of the last `window` tokens, causal: float32 ``[K, G, window, n]``."""
        window = min(window, self.length)
        heads = self.key.shape[0]
        query = self.query[:, -window:].unflatten(0, (heads, -1)).float()
        scores = torch.einsum("kgwd,knd->kgwn", query, self.key.float()) * self.scale
        later = torch.ones(window, self.length, dtype=torch.bool, device=query.device).triu(self.length - window + 1)
        return scores.masked_fill(later, -torch.inf).softmax(-1)


@runtime_checkable
class Retention(Protocol):
    """Who stays."""

    name: str

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of mass, recency and frequency in a page's utility."""
        ...

    @property
    def decay(self) -> float:
        """Of the mass per step, in [0, 1)."""
        ...

    @property
    def learns(self) -> str:
        """What of the attention it wants to be told while decoding: "nothing", "visits", "reads" or "mass"."""
        ...

    @property
    def whole_pages(self) -> bool:
        """Prompts, too, are cut by whole pages, the same ones for all heads of a page."""
        ...

    @property
    def wants_source(self) -> bool:
        """It rates prompts by their attention's inputs (see `Prompt.source`)."""
        ...

    def scores(self, prompt: Prompt) -> Tensor:
        """Rates the tokens of a prompt, float32 ``[K, n]``: higher stays longer; infinite: always."""
        ...


def _recency(prompt: Prompt) -> Tensor:
    """Positions, ``[K, n]``: the latest is worth the most."""
    at = torch.arange(prompt.length, dtype=torch.float32, device=prompt.key.device)
    return at.expand(prompt.key.shape[0], -1).clone()


@dataclass(frozen=True)
class LruRetention:
    """The page that was visited the longest ago goes first; of a prompt the oldest tokens.

    A visit is more than an equal share of a query's attention (under a sparse lookup: among the chosen pages).
    """

    name = "lru"
    weights = (0.0, 1.0, 0.0)
    decay = 0.0
    learns = "visits"
    whole_pages = False
    wants_source = False

    def scores(self, prompt: Prompt) -> Tensor:
        return _recency(prompt)


@dataclass(frozen=True)
class LruPlusRetention:
    """LRU and how often a page was visited (PiKV's LRU+): ``1 / (1 + age) + frequency * log(1 + visits)``."""

    frequency: float = 0.1
    name = "lru_plus"
    decay = 0.0
    learns = "visits"
    whole_pages = False
    wants_source = False

    def __post_init__(self) -> None:
        checks.real_attribute(self, "frequency", 0, 100, "use a weight between 0 and 100")

    @property
    def weights(self) -> tuple[float, float, float]:
        return 0.0, 1.0, self.frequency

    def scores(self, prompt: Prompt) -> Tensor:
        return _recency(prompt)


@dataclass(frozen=True)
class StreamingRetention:
    """The first tokens and the latest (StreamingLLM, Xiao et al. 2023)."""

    sink: int = 4
    """First tokens that always stay."""
    name = "streaming"
    weights = (0.0, 1.0, 0.0)  # of the age since it was sealed
    decay = 0.0
    learns = "nothing"
    whole_pages = False
    wants_source = False

    def __post_init__(self) -> None:
        checks.whole_attributes(self, "sink")

    def scores(self, prompt: Prompt) -> Tensor:
        scores = _recency(prompt)
        scores[:, : self.sink] = torch.inf
        return scores


@dataclass(frozen=True)
class MassRetention:
    """What those have that go by the attention mass of pages: its moving average."""

    weights = (1.0, 0.0, 0.0)
    decay = 0.95
    learns = "mass"
    whole_pages = False
    wants_source = False


@dataclass(frozen=True)
class H2oRetention(MassRetention):
    """What has received the least attention in all goes first (H2O, Zhang et al. 2023).

    Of a prompt all columns of the attention matrix are summed up, for the mean of a group's heads, in pieces:
    n^2 products once more, which the prompt's own attention costs, too.
    """

    name = "h2o"
    decay = SUM

    def scores(self, prompt: Prompt) -> Tensor:
        total = torch.zeros(prompt.key.shape[:2], dtype=torch.float32, device=prompt.key.device)
        for end in range(256, prompt.length + 256, 256):
            end = min(end, prompt.length)
            part = Prompt(prompt.query[:, :end], prompt.key[:, :end], prompt.value[:, :end], prompt.scale)
            total[:, :end] += part.attention((end - 1) % 256 + 1).mean(1).sum(1)
        return total * (1 - SUM)


@dataclass(frozen=True)
class FlexGenRetention(MassRetention):
    """What is read the least often goes first: the cost of moving decides (FlexGen, Sheng et al. 2023).

    FlexGen chooses what lies near by what it costs to fetch the rest, bytes times reads over bandwidth. Pages of one
    layer have the same bytes, and what is over the budget has one place to go, so its optimum is to keep the pages
    that are read most often: the moving average of the reads, one wherever a sparse lookup chooses a page or an exact
    one finds it. Of a prompt the oldest tokens go first: nobody has read it yet.
    """

    name = "flexgen"
    learns = "reads"

    def scores(self, prompt: Prompt) -> Tensor:
        return _recency(prompt) / prompt.length * 1e-3  # together less than one read


@dataclass(frozen=True)
class TovaRetention(MassRetention):
    """What the latest token attends to the least goes first (TOVA, Oren et al. 2024), the mean over heads."""

    name = "tova"
    decay = 0.0  # only the last step counts

    def scores(self, prompt: Prompt) -> Tensor:
        mean = prompt.attention(1).mean((0, 1, 2))
        return mean.expand(prompt.key.shape[0], -1)


@dataclass(frozen=True)
class SnapRetention(MassRetention):
    """What the end of the prompt attends to (SnapKV, Li et al. 2024).

    The attention of the last `window` tokens, averaged over them and over the heads of a group, smoothed along the
    tokens by `kernel`; the window itself stays. While decoding the average goes on.
    """

    window: int = 64
    kernel: int = 5
    name = "snap"

    def __post_init__(self) -> None:
        checks.whole_attributes(self, "window")
        checks.whole_attributes(self, "kernel", most=MOST_KERNEL)
        if self.kernel % 2 == 0:
            checks.refuse("kernel", self.kernel, "use an odd number, so that it has a middle")

    def scores(self, prompt: Prompt) -> Tensor:
        window = min(self.window, prompt.length)
        mean = prompt.attention(window).mean((1, 2))  # [K, n]
        before = mean[:, : prompt.length - window]
        if before.shape[1]:
            before = F.avg_pool1d(before, self.kernel, stride=1, padding=self.kernel // 2, count_include_pad=True)
        return torch.cat([before, torch.full_like(mean[:, :window], torch.inf)], dim=1)


@dataclass(frozen=True)
class ChunkRetention(MassRetention):
    """SnapKV's scores over whole pages, the same pages for all heads (ChunkKV, Liu et al. 2025).

    Neighbouring tokens stay together, so pages stay places in the text, as lookups want them.
    """

    window: int = 64
    name = "chunk"
    whole_pages = True

    def __post_init__(self) -> None:
        checks.whole_attributes(self, "window")

    def scores(self, prompt: Prompt) -> Tensor:
        return prompt.attention(self.window).mean((1, 2))


@dataclass(frozen=True)
class ExpectedRetention(MassRetention):
    """What future queries are expected to attend to (Expected Attention, Devoto et al. 2025).

    Queries to come are taken as Gaussian with the mean and covariance of the last `window` ones, positions
    included: ``E[exp(q . k)] = exp(mean . k + k' cov k / 2)``, times the value's norm. The paper takes them
    before their positions and averages over those to come; a cache sees queries only with their positions.
    """

    window: int = 512
    sink: int = 4
    name = "expected"

    def __post_init__(self) -> None:
        checks.whole_attributes(self, "window", "sink")

    def scores(self, prompt: Prompt) -> Tensor:
        heads = prompt.key.shape[0]
        query = prompt.query[:, -self.window :].float() * prompt.scale  # [H, w, D]
        mean = query.mean(1)
        centred = query - mean[:, None]
        cov = centred.transpose(1, 2) @ centred / query.shape[1]
        mean, cov = mean.unflatten(0, (heads, -1)), cov.unflatten(0, (heads, -1))
        key = prompt.key.float()
        logits = torch.einsum("kgd,knd->kgn", mean, key) + torch.einsum("knd,kgde,kne->kgn", key, cov, key) / 2
        weights = logits.softmax(-1).mean(1) * prompt.value.float().norm(dim=-1)
        weights[:, : self.sink] = torch.inf
        return weights


UNFIT_PRESSES = {
    "observedattention": "it needs the weights of eager attention, which are never formed here (the retention h2o "
    "does the same without them)",
    "criticalkv": "it rates by another press, which a name does not give",
    "adakv": "it is no scorer of tokens (the budget ada does the same to any)",
    "criticaladakv": "it is no scorer of tokens (the budget ada gives heads what they need)",
    "chunkkv": "it is no scorer of tokens (the retention chunk does the same)",
    "duoattention": "it is no scorer of tokens (the budget duo does the same)",
}
"""Presses of kvpress that cannot work here, beside those that `_why_unfit` finds out."""


@dataclass(frozen=True)
class KvpressRetention(MassRetention):
    """The scores of a press of kvpress (NVIDIA, ``ScorerPress``), e.g. ``"kvpress:knorm"``.

    They want the attention module and its hidden states, which the Hugging Face integration hands over.
    While decoding the mass of attention decides, as with `SnapRetention`.
    """

    press: str
    name = "kvpress"
    wants_source = True

    def __post_init__(self) -> None:
        if not isinstance(self.press, str) or not self.press:
            checks.refuse("press", self.press, 'name a press of kvpress, e.g. "knorm"')
        self.build()

    def build(self) -> Any:
        """The press; `ValueError` where there is none of the name, or it cannot work here."""
        try:
            import kvpress
        except ImportError as error:
            raise UsageError(
                f"press = {self.press!r}: kvpress cannot be imported ({error}); pip install kvpress"
            ) from None
        presses = {
            name.removesuffix("Press").lower(): kind
            for name, kind in vars(kvpress).items()
            if isinstance(kind, type) and issubclass(kind, kvpress.BasePress)
        }
        for abstract in ("base", "scorer"):
            presses.pop(abstract)
        unfit = {name: why for name, kind in presses.items() if (why := _why_unfit(name, kind, kvpress))}
        key = self.press.lower().replace("_", "").removesuffix("press")
        if key not in presses or key in unfit:
            why = f"{unfit[key]}; " if key in unfit else ""
            raise UsageError(
                f"press = {checks.shown(self.press)}: {why}choose one of {', '.join(sorted(presses.keys() - unfit))}"
            )
        return presses[key]()

    def scores(self, prompt: Prompt) -> Tensor:
        if prompt.source is None:
            raise UsageError(
                f"retention kvpress:{self.press} needs the attention's inputs, which only attached Hugging Face "
                "models hand over; choose another retention here"
            )
        press = self.build()
        # What a press keeps anyway, it does not rate; of a prompt that has nothing else it makes an error.
        window, sink, first, last = (getattr(press, name, 0) for name in _KEPT)
        if prompt.length <= max(window, sink, first + last):
            return torch.full_like(_recency(prompt), torch.inf)
        module, hidden, kwargs = prompt.source
        scores = press.score(module, hidden, prompt.key[None], prompt.value[None], None, kwargs)
        return scores[0].float()


_KEPT = ("window_size", "n_sink", "sink_size_start", "sink_size_end")
"""How presses name the tokens that they keep unrated."""


def _why_unfit(name: str, kind: Any, kvpress: Any) -> str | None:
    """Why a press of kvpress cannot rate prompts here, None if it can."""
    if name in UNFIT_PRESSES:
        return UNFIT_PRESSES[name]
    if not issubclass(kind, kvpress.ScorerPress):
        return "it is no scorer of tokens (kvpress.ScorerPress)"
    if kind.post_init_from_model is not kvpress.BasePress.post_init_from_model:
        return "it wants weights or statistics made for the model, which kvpress downloads and PiKV does not"
    return None


RETENTIONS: dict[str, type[Retention]] = {
    "lru": LruRetention,
    "lru_plus": LruPlusRetention,
    "streaming": StreamingRetention,
    "h2o": H2oRetention,
    "tova": TovaRetention,
    "snap": SnapRetention,
    "chunk": ChunkRetention,
    "flexgen": FlexGenRetention,
    "expected": ExpectedRetention,
    "kvpress": KvpressRetention,
}
