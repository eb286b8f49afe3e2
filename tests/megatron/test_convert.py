"""Hugging Face weights in Megatron: the same logits for every family, and each rank reads only what it owns."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

import transformers
from harness import Ranks, ranks_fixture
from safetensors.torch import load_file, save_file

import megatron_patch
from megatron_patch import checkpoint, convert, models
from megatron_patch.checkpoint import Checkpoint
from pikv_ds import PiKVConfig

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny models live on a CPU")
two, four = ranks_fixture(2, "megatron"), ranks_fixture(4, "megatron")
fresh = ranks_fixture(2, "memory")  # whose allocators hold no freed memory yet

VOCAB, EXPERTS, LAYERS, LENGTH = 64, 4, 3, 21
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
LATENT = SHARED | {
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "beta_fast": 32,
    "beta_slow": 1,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {k: v for k, v in SHARED.items() if k != "num_experts_per_tok"} | {"head_dim": 12},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", SHARED | {"num_local_experts": EXPERTS, "head_dim": 12}),
    "mixtral-tied": (
        "MixtralForCausalLM",
        "MixtralConfig",
        SHARED | {"num_local_experts": EXPERTS, "tie_word_embeddings": True},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        SHARED
        | {"num_experts": EXPERTS, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 8}
        | {"mlp_only_layers": [1]},
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", SHARED | {"num_experts": EXPERTS}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", LATENT | {"topk_method": "greedy"}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        LATENT | {"q_lora_rank": 20, "norm_topk_prob": True, "n_routed_experts": 8, "n_group": 2},
    ),
    "deepseek_v3-yarn": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        LATENT | {"norm_topk_prob": True, "rope_parameters": YARN},
    ),
    "deepseek_v3-plain-yarn": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        LATENT | {"norm_topk_prob": True, "rope_parameters": YARN | {"mscale": None, "mscale_all_dim": None}},
    ),
    "deepseek_v3-epsilon": (  # so large that it shows: the norms of the latents have another
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        LATENT | {"q_lora_rank": 20, "norm_topk_prob": True, "rms_norm_eps": 0.05},
    ),
    "deepseek_v2-yarn": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        LATENT | {"topk_method": "greedy", "rope_parameters": YARN},
    ),
}
TWO_RANKS = ["mixtral", "mixtral-tied", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"]


def save(folder: Path, family: str, fused: bool = False, **changes: Any) -> Path:
    """A tiny random checkpoint, its norms and biases random, too.

    Args:
        fused: with all experts of a layer in one tensor, as transformers holds them, not as the hub does.
    """
    model_class, config_class, settings = FAMILIES[family]
    # Random routers can be as good as tied between two experts, and rounding then decides: with seed 0 and
    # deepseek_v2 all tokens of a sequence from one on differ, with this one and four others none does.
    torch.manual_seed(1)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings | changes))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            tensor.data = 1 + 0.2 * torch.randn_like(tensor)
        elif "e_score_correction_bias" in name:
            tensor.data = 0.3 * torch.randn_like(tensor)
    model.eval().float().save_pretrained(folder, max_shard_size="60KB", save_original_format=not fused)
    return folder


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def megatron_groups(tp: int = 1, ep: int = 1) -> Iterator[None]:
    """Megatron's groups over this job's ranks; a job of this process alone where there is none."""
    from megatron.core import parallel_state

    from megatron_patch import cpu

    cpu.install()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.destroy_model_parallel()
    groups = dist.distributed_c10d._world.pg_map
    before = set(groups)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1
    )
    cpu.seed(1)
    try:
        yield
        dist.barrier()  # nobody needs them any more
        for group in set(groups) - before:  # Megatron only forgets them: some twenty, each with threads of its own
            dist.destroy_process_group(group)
    finally:
        parallel_state.destroy_model_parallel()


def megatron_logits(folder: Path, tp: int, ep: int) -> tuple[torch.Tensor, convert.Report]:
    """Logits ``[2, LENGTH, VOCAB]`` of the checkpoint in Megatron over this job's ranks."""
    with megatron_groups(tp, ep):
        hf = models.load_config(folder)
        model = models.build_model(hf, models.transformer_config(hf, tp=tp, ep=ep))
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # whatever is not loaded shows
        report = convert.load_hf(model, folder)
        return forward(model), report


def forward(model: Any) -> torch.Tensor:
    """Logits ``[2, LENGTH, VOCAB]`` of all tokens at once."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(LENGTH)[None].expand(2, -1)
    with torch.inference_mode():
        return model(tokens(), positions, mask, runtime_gather_output=True)


def hf_logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    rope = model.config.rope_parameters
    if model.config.model_type == "deepseek_v2" and rope["rope_type"] == "yarn":
        # transformers 5.2 forgets this factor of DeepSeek's own code (huggingface/transformers, pull request 47435)
        mscale = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1
        for layer in model.model.layers:
            layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5 * mscale**2
    with torch.inference_mode():
        return model(tokens()).logits


def expert_bytes(folder: Path) -> int:
    """Of all routed experts in fp32."""
    c = models.load_config(folder)
    dense = len(getattr(c, "mlp_only_layers", [])) + getattr(c, "first_k_dense_replace", 0)
    size = getattr(c, "moe_intermediate_size", c.intermediate_size)
    return (LAYERS - dense) * models._num_experts(c) * 3 * size * c.hidden_size * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_hugging_faces_logits(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path, family)
    assert len(list(folder.glob("*.safetensors"))) > 1
    logits, report = megatron_logits(folder, 1, 1)
    expected = hf_logits(folder)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert expected.abs().max() > 0.5
    assert report.read_bytes == report.checkpoint_bytes


def case(rank: int, folder: str, tp: int, ep: int) -> tuple[torch.Tensor, convert.Report]:
    return megatron_logits(Path(folder), tp, ep)


@pytest.mark.distributed
@pytest.mark.sampled
@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("family", TWO_RANKS)
def test_ranks_read_only_what_they_own(family: str, tp: int, ep: int, two: Ranks, tmp_path: Path) -> None:
    folder = save(tmp_path, family)
    expected = hf_logits(folder)
    for logits, report in two.run(case, folder=str(folder), tp=tp, ep=ep):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        most = report.checkpoint_bytes - expert_bytes(folder) * (ep - 1) // ep
        assert report.read_bytes <= most
        assert (report.read_bytes == most) is (tp == 1)


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_experts_in_one_tensor_are_read_in_slices(family: str, two: Ranks, tmp_path: Path) -> None:
    folder = save(tmp_path, family, fused=True)
    assert any("experts.gate_up_proj" in name for name in Checkpoint(folder)._paths)
    expected = hf_logits(folder)
    for logits, report in two.run(case, folder=str(folder), tp=1, ep=2):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert report.read_bytes == report.checkpoint_bytes - expert_bytes(folder) // 2


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def memory_case(rank: int, folder: str) -> tuple[int, convert.Report]:
    """How much the resident memory of a rank grows at most while it loads its share of two."""
    with megatron_groups(ep=2):
        hf = models.load_config(folder)
        model = models.build_model(hf, models.transformer_config(hf, ep=2))  # allocated, not yet touched
        checkpoint.MAPPED_BYTES, before = 4 * 2**20, checkpoint.MAPPED_BYTES
        seen = [resident_bytes()]

        def watch(parameters: Iterable[Any]) -> Iterator[Any]:
            for parameter in parameters:
                yield parameter
                seen.append(resident_bytes())

        report = convert.load_hf(model, folder, progress=watch)
        checkpoint.MAPPED_BYTES = before
    return max(seen) - seen[0], report


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_no_rank_holds_more_than_its_share(fresh: Ranks, tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        **FAMILIES["mixtral"][2] | {"hidden_size": 256, "intermediate_size": 1024, "num_local_experts": 16}
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)  # one file
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    experts = LAYERS * 16 * 3 * 256 * 1024 * 4  # 151 MB, half of it on each rank
    for grown, report in fresh.run(memory_case, folder=str(tmp_path)):
        assert report.checkpoint_bytes - report.read_bytes == experts // 2
        assert experts // 2 < grown < experts * 3 // 4
        assert report.peak_host_bytes > grown


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_four_ranks(family: str, four: Ranks, tmp_path: Path) -> None:
    folder = save(tmp_path, family)
    expected = hf_logits(folder)
    for logits, _ in four.run(case, folder=str(folder), tp=2, ep=4):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_the_bias_of_a_bf16_model_chooses_the_same_experts(tmp_path: Path) -> None:
    folder = save(tmp_path, "deepseek_v3")
    with megatron_groups():
        hf = models.load_config(folder)
        model = models.build_model(hf, models.transformer_config(hf, dtype=torch.bfloat16))
        convert.load_hf(model, folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    stored = Checkpoint(folder)
    for number, layer in enumerate(model.decoder.layers):
        if number >= hf.first_k_dense_replace:
            bias = stored.read(f"model.layers.{number}.mlp.gate.e_score_correction_bias")
            assert not torch.equal(bias, bias.bfloat16().float())
            torch.testing.assert_close(layer.mlp.router.expert_bias, bias, atol=0, rtol=0)


def decode_case(rank: int, folder: str, tp: int, ep: int) -> tuple[torch.Tensor, int]:
    """Logits ``[2, LENGTH - 8, VOCAB]``, with PiKV, of a prompt of 9 tokens and of the others one by one."""
    from megatron.core.inference.contexts import StaticInferenceContext

    with megatron_groups(tp, ep):
        hf = models.load_config(folder)
        model = models.build_model(hf, models.transformer_config(hf, tp=tp, ep=ep))
        convert.load_hf(model, folder)
        megatron_patch.patch_model(model, PiKVConfig(page_size=8))
        context, ids, logits = StaticInferenceContext(2, LENGTH), tokens(), []
        with torch.inference_mode():
            for start, end in [(0, 9), *((i, i + 1) for i in range(9, LENGTH))]:
                mask = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None] if end == 9 else None
                positions = torch.arange(start, end)[None].expand(2, -1)
                new = model(ids[:, start:end], positions, mask, inference_context=context, runtime_gather_output=True)
                logits.append(new[:, -1:])
                context.increment_sequence_len_offset(end - start)
                context.enable_decode_mode()
        pages = megatron_patch.stats(model)["pages_in_scope"]
        megatron_patch.unpatch_model(model)
    return torch.cat(logits, dim=1), pages


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3"])
def test_tensor_parallel_ranks_decode_with_pikv(family: str, two: Ranks, tmp_path: Path) -> None:
    folder = save(tmp_path, family)
    expected = hf_logits(folder)[:, 8:]
    for logits, pages in two.run(decode_case, folder=str(folder), tp=2, ep=2):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert pages > 0


def through_megatron(rank: int, folder: str, saved: str, tp: int, ep: int, save: bool) -> torch.Tensor:
    """Logits of a checkpoint that Megatron has written (``save``: writes it first, from Hugging Face's)."""
    # Megatron writes from processes of its own, which a daemon, as the harness starts its ranks, may not have
    multiprocessing.current_process()._config["daemon"] = False
    with megatron_groups(tp, ep):
        hf = models.load_config(folder)
        model = models.build_model(hf, models.transformer_config(hf, tp=tp, ep=ep))
        if save:
            convert.load_hf(model, folder)
            convert.save_megatron(model, saved)
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        convert.load_megatron(model, saved)
        return forward(model)


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3"])
def test_a_megatron_checkpoint_of_another_parallel_size(family: str, two: Ranks, tmp_path: Path) -> None:
    folder, saved = save(tmp_path / "hf", family), tmp_path / "megatron"
    expected = hf_logits(folder)
    for tp, ep, write in ((2, 2, True), (1, 2, False), (2, 1, False)):
        for logits in two.run(through_megatron, folder=str(folder), saved=str(saved), tp=tp, ep=ep, save=write):
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / convert.LATEST).write_text("12\n")
    saved.rename(tmp_path / "run" / "iter_0000012")
    arguments = {"folder": str(folder), "saved": str(tmp_path / "run"), "tp": 1, "ep": 2, "save": False}
    torch.testing.assert_close(two.run(through_megatron, **arguments)[0], expected, atol=1e-4, rtol=0)


def test_a_folder_without_a_megatron_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(convert.CheckpointError, match=r"no metadata\.json there"):
        convert.load_megatron(None, tmp_path)


# -- what cannot be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"sliding_window": 16}, "sliding_window = 16: windows are not supported"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias = True"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "topk_method = 'group_limited_greedy'"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False"),
        ("deepseek_v3", {"num_experts_per_tok": 1, "n_group": 1}, "num_experts_per_tok = 1"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("deepseek_v3", {"num_experts_per_tok": 4, "topk_group": 1, "n_group": 2}, "topk_group = 1"),
        ("deepseek_v3", {"rope_parameters": YARN | {"attention_factor": 1.3}}, "attention_factor = 1.3"),
        ("deepseek_v3", {"rope_parameters": YARN | {"truncate": False}}, "truncate = False"),
        (
            "deepseek_v3",
            {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": None}},
            "mscale, mscale_all_dim = (0.7, None)",
        ),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        ("mixtral", {"rope_parameters": YARN}, "rope_type = 'yarn'"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
        ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config = {'quant_method': 'fp8'}"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
    ],
)
def test_what_megatron_would_compute_otherwise_is_refused(family: str, changes: dict, message: str) -> None:
    _, config_class, settings = FAMILIES[family]
    config = getattr(transformers, config_class)(**settings | changes)
    with pytest.raises(models.UnsupportedCheckpointError) as error:
        models.transformer_config(config)
    assert message in str(error.value)


def test_ranks_that_do_not_divide_are_refused() -> None:
    config = transformers.MixtralConfig(**FAMILIES["mixtral"][2])
    for sizes, message in (
        ({"tp": 3}, "num_attention_heads = 4: does not divide over 3 tensor-parallel ranks"),
        ({"ep": 3}, "number of experts = 4: does not divide over 3 expert-parallel ranks"),
    ):
        with pytest.raises(models.UnsupportedCheckpointError, match=message):
            models.transformer_config(config, **sizes)
    with pytest.raises(models.UnsupportedCheckpointError, match="model type 'gpt2' is not one of llama, mixtral"):
        models.transformer_config(transformers.GPT2Config())
    with pytest.raises(models.UnsupportedCheckpointError, match="a dense model has no experts for 2"):
        models.transformer_config(transformers.LlamaConfig(), ep=2)


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(models.UnsupportedCheckpointError, match=r"no config\.json there"):
        models.load_config(tmp_path)
    with pytest.raises(
        convert.CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        Checkpoint(tmp_path)


def test_an_incomplete_or_damaged_checkpoint_names_the_file_or_tensor(tmp_path: Path) -> None:
    folder = save(tmp_path, "mixtral")
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    last = folder / sorted(set(table["weight_map"].values()))[-1]
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(convert.CheckpointError, match=last.name):
        megatron_logits(folder, 1, 1)
    last.write_bytes(content[: len(content) // 2])
    with pytest.raises(convert.CheckpointError, match=f"{last.name}.*incomplete or damaged"):
        megatron_logits(folder, 1, 1)
    last.unlink()
    table["weight_map"] = {k: v for k, v in table["weight_map"].items() if v != last.name}
    index.write_text(json.dumps(table))
    with pytest.raises(convert.CheckpointError, match=r"the checkpoint lacks (lm_head|model)\."):
        megatron_logits(folder, 1, 1)
    index.write_text("{}")
    with pytest.raises(convert.CheckpointError, match=r"index\.json: no table of tensors and files"):
        megatron_logits(folder, 1, 1)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "qwen3_moe",
            {"num_hidden_layers": LAYERS + 1},
            rf"the checkpoint lacks model\.layers\.{LAYERS}\.input_layernorm\.weight, .* and \d+ more\. Use",
        ),
        # Megatron would run a model without its last layer
        ("mixtral", {"num_hidden_layers": 1}, r"the model has no place for model\.layers\.1\..* and \d+ more\. Use"),
        ("mixtral", {"num_local_experts": EXPERTS - 2}, rf"no place for model\.layers\.0\..*experts\.{EXPERTS - 2}\."),
        ("mixtral", {"num_local_experts": EXPERTS + 2}, rf"lacks model\.layers\.0\..*experts\.{EXPERTS}\."),
        ("mixtral", {"tie_word_embeddings": True}, r"tie_word_embeddings is true .* lm_head\.weight differs"),
    ],
)
def test_a_configuration_with_more_or_less_than_the_weights(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, family)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(convert.CheckpointError, match=message) as error:
        megatron_logits(folder, 1, 1)
    assert str(folder) in str(error.value)


def rewrite(
    folder: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor | None],
    extra: dict[str, torch.Tensor] | None = None,
) -> None:
    """Changes, drops or adds tensors of a checkpoint, and makes one file of it."""
    (folder / "model.safetensors.index.json").unlink()
    changed = dict(extra or {})
    for path in folder.glob("*.safetensors"):
        changed |= {name: change(name, tensor) for name, tensor in load_file(path).items()}
        path.unlink()
    whole = {name: x.contiguous() for name, x in changed.items() if x is not None}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})


def test_only_the_files_of_the_model_are_loaded(tmp_path: Path) -> None:
    """`consolidated.safetensors` has the same weights by other names, an adapter has others by the same."""
    folder = save(tmp_path, "mixtral")
    expected = megatron_logits(folder, 1, 1)[0]
    norm = Checkpoint(folder).read("model.norm.weight")
    for files in ("sharded", "one file"):
        save_file({"model.norm.weight": norm + 1, "output.weight": norm}, folder / "zzz.safetensors", {"format": "pt"})
        assert "output.weight" not in Checkpoint(folder)
        assert torch.equal(megatron_logits(folder, 1, 1)[0], expected), files
        (folder / "zzz.safetensors").unlink()
        if files == "sharded":
            rewrite(folder, lambda name, tensor: tensor)


def test_a_tensor_that_two_files_have_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, "mixtral")
    norm = Checkpoint(folder).read("model.norm.weight")
    save_file({"model.norm.weight": norm + 1}, folder / "zzz.safetensors", {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = "zzz.safetensors"
    index.write_text(json.dumps(table))
    with pytest.raises(convert.CheckpointError, match=r"zzz\.safetensors: has model\.norm\.weight, and so has model-"):
        megatron_logits(folder, 1, 1)


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight", "model.extra"])
def test_tensors_that_a_model_does_without(extra: str, tmp_path: Path) -> None:
    """What transformers computes itself, and a copy of tied embeddings; anything else is named."""
    folder = save(tmp_path, "mixtral-tied")
    expected = hf_logits(folder)
    embeddings = Checkpoint(folder).read("model.embed_tokens.weight")
    rewrite(folder, lambda name, tensor: tensor, {extra: embeddings})
    if extra == "model.extra":
        with pytest.raises(convert.CheckpointError, match=r"the model has no place for model\.extra\. Use"):
            megatron_logits(folder, 1, 1)
    else:
        torch.testing.assert_close(megatron_logits(folder, 1, 1)[0], expected, atol=1e-4, rtol=0)


def refusal_case(rank: int, folder: str) -> str:
    with pytest.raises(convert.CheckpointError) as error:
        megatron_logits(Path(folder), 1, 2)
    return str(error.value)


@pytest.mark.distributed
@pytest.mark.parametrize("damage", ["missing", "narrow"])
def test_an_expert_that_one_rank_lacks_is_refused_by_all(damage: str, two: Ranks, tmp_path: Path) -> None:
    folder = save(tmp_path, "mixtral")
    broken = f"model.layers.1.block_sparse_moe.experts.{EXPERTS - 1}.w2.weight"
    rewrite(folder, lambda name, x: x if name != broken else None if damage == "missing" else x[:, :-8])
    first, second = two.run(refusal_case, folder=str(folder))
    assert broken in first
    assert broken in second


def test_quantised_tensors_are_no_weights(tmp_path: Path) -> None:
    folder = save(tmp_path, "mixtral")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({k: v.to(torch.float8_e4m3fn) if "o_proj" in k else v for k, v in tensors.items()}, path)
    with pytest.raises(convert.CheckpointError, match=r"layers\.0\.self_attn\.o_proj\.weight is stored as F8_E4M3"):
        megatron_logits(folder, 1, 1)


def test_pipeline_stages_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, "mixtral")
    with megatron_groups():
        hf = models.load_config(folder)
        model = models.build_model(hf, models.transformer_config(hf))
        model.config.pipeline_model_parallel_size = 2
        with pytest.raises(convert.CheckpointError, match="pipeline_model_parallel_size = 2"):
            convert.load_hf(model, folder)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"intermediate_size": 40}, r"linear_fc1.weight has shape \[80, 32\] .* \[96, 32\]"),
        # smaller than the tensors: a slice of them would fit
        ("mixtral", {"vocab_size": 32}, r"embed_tokens\.weight has shape \[64, 32\], .* dimension 0 is 32"),
        ("mixtral", {"num_attention_heads": 2}, r"o_proj\.weight has shape \[32, 48\], .* dimension 1 is 24"),
        ("deepseek_v3", {"intermediate_size": 16}, r"gate_proj\.weight has shape \[48, 32\], .* dimension 0 is 16"),
        ("deepseek_v3", {"q_lora_rank": 40}, r"q_a_proj\.weight has shape \[20, 32\]|\[40, 32\] .* \[20, 32\]"),
    ],
)
def test_weights_of_another_model_name_the_tensor_and_both_shapes(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, family)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(convert.CheckpointError, match=message):
        megatron_logits(folder, 1, 1)
