"""Hugging Face weights in Megatron: the same logits for every family, and each rank reads only what it owns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

import transformers
from harness import Ranks, ranks_fixture

from megatron_patch import convert, models

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny models live on a CPU")
two, four = ranks_fixture(2), ranks_fixture(4)

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
}


def save(folder: Path, family: str, **changes: Any) -> Path:
    """A tiny random checkpoint, its norms and biases random, too."""
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
    model.eval().float().save_pretrained(folder, max_shard_size="60KB")  # several files
    return folder


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def megatron_logits(folder: Path, tp: int, ep: int) -> tuple[torch.Tensor, convert.Report]:
    """Logits ``[2, LENGTH, VOCAB]`` of the checkpoint in Megatron over this job's ranks."""
    from megatron.core import parallel_state

    from megatron_patch import cpu

    cpu.install()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1
    )
    cpu.seed(1)
    hf = models.load_config(folder)
    model = models.build_model(hf, models.transformer_config(hf, tp=tp, ep=ep))
    for parameter in model.parameters():
        parameter.fill_(torch.nan)  # whatever is not loaded shows
    report = convert.load_hf(model, folder)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(LENGTH)[None].expand(2, -1)
    with torch.inference_mode():
        logits = model(tokens(), positions, mask, runtime_gather_output=True)
    parallel_state.destroy_model_parallel()
    return logits, report


def hf_logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()(tokens()).logits


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
@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_ranks_read_only_what_they_own(family: str, tp: int, ep: int, two: Ranks, tmp_path: Path) -> None:
    folder = save(tmp_path, family)
    expected, config = hf_logits(folder), json.loads((folder / "config.json").read_text())
    size = config.get("moe_intermediate_size", config["intermediate_size"])
    sparse = LAYERS - len(config.get("mlp_only_layers", []))
    expert_bytes = sparse * EXPERTS * 3 * size * config["hidden_size"] * 4
    for logits, report in two.run(case, folder=str(folder), tp=tp, ep=ep):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        most = report.checkpoint_bytes - expert_bytes + expert_bytes // ep
        assert report.read_bytes <= most
        assert (report.read_bytes == most) is (tp == 1)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_four_ranks(family: str, four: Ranks, tmp_path: Path) -> None:
    folder = save(tmp_path, family)
    expected = hf_logits(folder)
    tp = 1 if family.startswith("deepseek") else 2
    for logits, _ in four.run(case, folder=str(folder), tp=tp, ep=4):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


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
        ("mixtral", {"rope_parameters": YARN}, "rope_type = 'yarn'"),
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
    with pytest.raises(models.UnsupportedCheckpointError, match="model type 'llama' is not one of mixtral"):
        models.transformer_config(transformers.LlamaConfig())


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(models.UnsupportedCheckpointError, match=r"no config\.json there"):
        models.load_config(tmp_path)
    with pytest.raises(
        convert.CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        convert.Checkpoint(tmp_path)


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
    with pytest.raises(convert.CheckpointError, match=r"no tensor 'model\."):
        megatron_logits(folder, 1, 1)


def test_weights_of_another_model_name_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    folder = save(tmp_path, "mixtral")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 40}))
    with pytest.raises(convert.CheckpointError, match=r"linear_fc1.weight has shape \[80, 32\] .* \[96, 32\]"):
        megatron_logits(folder, 1, 1)
