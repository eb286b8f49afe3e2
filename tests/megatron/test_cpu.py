"""Megatron without a GPU: what is replaced, where, and that it is nothing where a GPU is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("megatron.core")

import tiny_megatron
from torch.nn.functional import scaled_dot_product_attention

from megatron_patch import cpu

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced where a GPU is")


def test_nothing_is_replaced_where_cuda_is() -> None:
    code = """
import importlib, torch
torch.cuda.is_available = lambda: True
from megatron_patch import cpu
owners = []
for module, path, value, _ in cpu.REPLACEMENTS:
    owner = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    owners.append((owner, name, getattr(owner, name)))
cuda = torch.Tensor.cuda
assert cpu.install() is False
assert torch.Tensor.cuda is cuda
assert all(getattr(owner, name) is before for owner, name, before in owners)
for name in cpu.TORCH_USERS:
    try:
        assert importlib.import_module(name).torch is torch, name
    except ModuleNotFoundError:
        pass
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@without_gpu
def test_install_can_be_repeated() -> None:
    from megatron.core.transformer.attention import Attention

    assert cpu.install()
    before = Attention.flash_decode_and_prefill, torch.Tensor.cuda
    assert cpu.install()
    assert (Attention.flash_decode_and_prefill, torch.Tensor.cuda) == before


@without_gpu
def test_only_megatron_is_deceived() -> None:
    from megatron.core.transformer import attention

    cpu.install()
    assert attention.torch.cuda.current_device() == torch.device("cpu")
    assert attention.torch.nn is torch.nn
    assert attention.torch.Tensor is torch.Tensor
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(1).cuda()


def test_every_replacement_names_a_reason() -> None:
    assert all(entry.reason for entry in cpu.REPLACEMENTS)
    assert len({entry[:2] for entry in cpu.REPLACEMENTS}) == len(cpu.REPLACEMENTS)


def test_events_measure_time() -> None:
    start, end = cpu.Event(enable_timing=True), cpu.Event(enable_timing=True)
    start.record()
    end.record()
    assert start.elapsed_time(end) >= 0


def test_the_paged_reference_is_dense_attention(rng: torch.Generator) -> None:
    """A prefill, a decode and a chunk in one batch; unused blocks and slots hold NaN."""
    heads, groups, dim, block = 4, 2, 8, 4
    queries, lengths = [5, 1, 3], [5, 9, 10]
    cache = torch.full((2, 16, block, groups, dim), float("nan"))
    table = torch.full((4, 4), 10**6, dtype=torch.int32)
    free = iter(torch.randperm(16, generator=rng).tolist())
    q = torch.randn(sum(queries) + 3, 1, heads, dim, generator=rng)  # 3 of padding
    expected = torch.zeros_like(q)
    start = 0
    for i, (count, length) in enumerate(zip(queries, lengths, strict=True)):
        k, v = torch.randn(2, length, groups, dim, generator=rng)
        for position in range(length):
            if position % block == 0:
                table[i, position // block] = next(free)
            cache[:, int(table[i, position // block]), position % block] = torch.stack([k[position], v[position]])
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        rows = q[start : start + count, 0].transpose(0, 1)
        dense = scaled_dot_product_attention(
            rows, *(x.transpose(0, 1).repeat_interleave(heads // groups, 0) for x in (k, v)), attn_mask=mask
        )
        expected[start : start + count, 0] = dense.transpose(0, 1)
        start += count
    starts = torch.tensor([0, 5, 6, 9, 9])  # the last sequence has nothing to do
    got = cpu.flash_decode_and_prefill(
        object(), q, *cache, 5, 10, starts, None, torch.tensor([*lengths, 0]), table, False
    )
    torch.testing.assert_close(got, expected)


@without_gpu
def test_a_cached_forward_pass_equals_one_without_cache() -> None:
    from megatron.core.inference.contexts import StaticInferenceContext

    tiny_megatron.initialize()
    model = tiny_megatron.build()
    prompt = torch.arange(2, 26)[None]
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=32)
    tokens = []
    with torch.inference_mode():
        ids, start = prompt, 0
        for _ in range(6):
            position = torch.arange(start, start + ids.shape[1])[None]
            logits = model(ids, position, None, inference_context=context, runtime_gather_output=True)
            context.increment_sequence_len_offset(ids.shape[1])
            start += ids.shape[1]
            ids = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(ids))
    assert tokens == tiny_megatron.greedy(model, prompt[0].tolist(), 6)
