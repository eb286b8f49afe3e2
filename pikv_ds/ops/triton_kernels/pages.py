"""Kernels that move pages and encode them, and how all kernels find a page.

Shape letters as in `pikv_ds.ops.reference`: N any number, K KV heads, S page size, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_address(pointers, slot, slab_rows, row_bytes):
    """Address of a slot's row as an int64; garbage where the slot is 0, so mask what is read there."""
    slab = tl.load(pointers + slot // slab_rows)
    return slab + (slot % slab_rows).to(tl.int64) * row_bytes


@triton.jit
def channel_of(column, D: tl.constexpr, PARTS: tl.constexpr):
    """Channel of a column when packed rows are unpacked by interleaving: 0, D/2, 1, D/2 + 1, ... for int4.

    Interleaving leaves every element in the thread that unpacked it. Queries, scales and outputs are
    loaded and stored in this order instead.
    """
    return (column % PARTS) * (D // PARTS) + column // PARTS


# -- moving ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["slab_rows"])
def gather_kernel(pointers, slots, out, slab_rows, ROW_BYTES: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """Copies ``BLOCK`` words of one row; grid (N, blocks of a row)."""
    n = tl.program_id(0)
    word_bytes: tl.constexpr = WORD.primitive_bitwidth // 8
    source = row_address(pointers, tl.load(slots + n), slab_rows, ROW_BYTES)
    words = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    addresses = source.to(tl.pointer_type(WORD)) + words
    if ROW_BYTES % 16 == 0:  # an address from an integer has no known alignment: without this, loads are scalar
        addresses = tl.max_contiguous(tl.multiple_of(addresses, 16), BLOCK)
    mask = words < ROW_BYTES // word_bytes
    tl.store(out + n.to(tl.int64) * (ROW_BYTES // word_bytes) + words, tl.load(addresses, mask=mask), mask=mask)


# -- encoding ----------------------------------------------------------------------------------


@triton.jit
def _next_below(half):
    """nextafter(half, -inf), by its bits."""
    bits = half.to(tl.uint16, bitcast=True)
    step = tl.where(bits < 0x8000, bits - 1, bits + 1)  # magnitudes count up on both sides of zero
    step = tl.where(bits & 0x7FFF == 0, 0x8001, step)  # below either zero: the smallest negative number
    return tl.where(bits == 0xFC00, bits, step).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _next_above(half):
    """nextafter(half, inf) of a half that is not negative."""
    bits = half.to(tl.uint16, bitcast=True)
    return tl.where(bits < 0x7C00, bits + 1, bits).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _to_e4m3(x):
    """e4m3 bits of x, |x| <= 448, rounded half to even: the same on chips without fp8 as on those with it."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: round the mantissa to 3 bits (a carry moves on into the exponent), then move the exponent's bias.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 e4m3 counts in steps of 2^-9, which are the units in the last place of 2^14: adding rounds.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _codes_of(x, low, high, BITS: tl.constexpr, FP8: tl.constexpr):
    """Codes of x, and float16 scale and minimum; low and high are x's over the reduced axes, broadcastable.

    Divisions are IEEE divisions, as the reference's are: the bytes are the same. fp8 has no minimum
    (high comes back in its place).
    """
    if FP8:
        peak = tl.maximum(tl.abs(low), tl.abs(high))
        half = tl.div_rn(peak, 448.0).to(tl.float16)
        half = tl.where(half.to(tl.float32) * 448.0 < peak, _next_above(half), half)
        scale = half.to(tl.float32)
        scaled = tl.div_rn(x, tl.where(scale > 0, scale, 1.0))
        scaled = tl.where(scale > 0, tl.minimum(tl.maximum(scaled, -448.0), 448.0), 0.0)
        return _to_e4m3(scaled), half, half
    else:
        levels: tl.constexpr = 2**BITS - 1
        half = low.to(tl.float16)
        half = tl.where(half.to(tl.float32) > low, _next_below(half), half)
        minimum = half.to(tl.float32)
        spread = tl.maximum(high - minimum, 0.0)
        step = tl.div_rn(spread, levels * 1.0).to(tl.float16)
        scale = step.to(tl.float32)
        ratio = tl.div_rn(x - minimum, tl.where(scale > 0, scale, 1.0))
        ratio = tl.where(scale > 0, tl.minimum(tl.maximum(ratio, 0.0), levels), 0.0)
        # Adding 2^23 rounds to an integer, half to even, and leaves it in the low bits.
        return (ratio + 8388608.0).to(tl.uint32, bitcast=True) & 0xFF, step, half


@triton.jit
def _is_bad(x):
    """1 where x is NaN or infinite."""
    return (tl.abs(x) < float("inf")).to(tl.int32) ^ 1


@triton.jit
def _store_codes(section, codes, rows, columns, mask, ROW: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr):
    """Packs codes ``[rows, PARTS, columns]`` into bytes ``[rows, columns]`` and stores them, ROW bytes per row."""
    if PARTS > 1:
        part = tl.arange(0, PARTS)[None, :, None]
        packed = tl.sum(codes.to(tl.int32) << (BITS * part), 1)  # parts share no bit: the sum joins them
    else:
        packed = tl.reshape(codes, (codes.shape[0], codes.shape[2]))
    tl.store(section + rows[:, None] * ROW + columns[None, :], packed.to(tl.uint8), mask=mask)


@triton.jit
def seal_kernel(
    keys,  # [N, K, S, D] by strides, channels contiguous
    values,
    out,  # uint8 [N, page_bytes], rows out_stride bytes apart
    bounds,  # the keys' dtype, [N, 2, K, D], rows bounds_stride elements apart; or None
    flags,  # int32, one for every pages_per_flag
    key_stride_n,
    key_stride_k,
    key_stride_s,
    value_stride_n,
    value_stride_k,
    value_stride_s,
    out_stride,
    bounds_stride,
    pages_per_flag,
    K: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    KEY_SCALES: tl.constexpr,  # offsets in bytes, see PageLayout
    VALUES: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a part that are encoded at a time, keys
    TOKENS: tl.constexpr,  # that are encoded at a time, values
    NON_FINITE: tl.constexpr,  # see SealFlag
    BEYOND_RANGE: tl.constexpr,
):
    """Encodes the keys or the values of one page and KV head; grid (N, K, 2).

    Tiles have the axes tokens, PARTS and channels of a part: the elements that share a byte differ
    in their part alone. Keys go by channels (their scales are over all tokens), values by tokens.
    """
    n, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    PARTS: tl.constexpr = 8 // BITS if BITS < 8 else 1
    PART: tl.constexpr = D // PARTS
    PART_PADDED: tl.constexpr = triton.next_power_of_2(PART)
    ROW: tl.constexpr = D * BITS // 8
    page = out + n * out_stride
    part = tl.arange(0, PARTS)
    bad, beyond = 0, 0
    if tl.program_id(2) == 0:
        source = keys + n * key_stride_n + k * key_stride_k
        section, scales = page + k * S * ROW, (page + KEY_SCALES).to(tl.pointer_type(tl.float16)) + k * D
        token = tl.arange(0, S)
        for start in range(0, PART, CHANNELS):
            column = start + tl.arange(0, CHANNELS)
            channel = part[:, None] * PART + column[None, :]  # [PARTS, CHANNELS]
            inside = tl.broadcast_to(column[None, :] < PART, (PARTS, CHANNELS))
            mask = tl.broadcast_to(inside[None], (S, PARTS, CHANNELS))
            stored = tl.load(source + token[:, None, None] * key_stride_s + channel[None], mask=mask, other=0.0)
            x = stored.to(tl.float32)
            bad = tl.maximum(bad, tl.max(_is_bad(x)))
            low, high = tl.min(x, 0) + 0.0, tl.max(x, 0) + 0.0  # which of -0 and 0 is smaller is nobody's business
            if bounds is not None:
                edge = bounds + n * bounds_stride + k * D + channel
                tl.store(edge, low.to(stored.dtype), mask=inside)
                tl.store(edge + K * D, high.to(stored.dtype), mask=inside)
            if SCALE_ROWS == 0:
                at = section.to(tl.pointer_type(stored.dtype)) + token[:, None, None] * D + channel[None]
                tl.store(at, stored, mask=mask)
            else:
                codes, scale, minimum = _codes_of(x, low[None], high[None], BITS, FP8)
                _store_codes(section, codes, token, column, column[None, :] < PART, ROW, BITS, PARTS)
                beyond = tl.maximum(beyond, tl.max(_is_bad(scale)))
                tl.store(scales + channel[None], scale, mask=inside[None])
                if SCALE_ROWS == 2:
                    beyond = tl.maximum(beyond, tl.max(_is_bad(minimum)))
                    tl.store(scales + K * D + channel[None], minimum, mask=inside[None])
    else:
        source = values + n * value_stride_n + k * value_stride_k
        section = page + VALUES + k * S * ROW
        scales = (page + VALUE_SCALES).to(tl.pointer_type(tl.float16)) + k * S
        column = tl.arange(0, PART_PADDED)
        channel = part[:, None] * PART + column[None, :]
        inside = tl.broadcast_to(column[None, :] < PART, (PARTS, PART_PADDED))
        mask = tl.broadcast_to(inside[None], (TOKENS, PARTS, PART_PADDED))
        for start in range(0, S, TOKENS):
            token = start + tl.arange(0, TOKENS)
            stored = tl.load(source + token[:, None, None] * value_stride_s + channel[None], mask=mask, other=0.0)
            x = stored.to(tl.float32)
            bad = tl.maximum(bad, tl.max(_is_bad(x)))
            if SCALE_ROWS == 0:
                at = section.to(tl.pointer_type(stored.dtype)) + token[:, None, None] * D + channel[None]
                tl.store(at, stored, mask=mask)
            else:
                low = tl.min(tl.min(tl.where(mask, x, float("inf")), 2), 1)[:, None, None] + 0.0
                high = tl.max(tl.max(tl.where(mask, x, float("-inf")), 2), 1)[:, None, None] + 0.0
                codes, scale, minimum = _codes_of(x, low, high, BITS, FP8)
                _store_codes(section, codes, token, column, column[None, :] < PART, ROW, BITS, PARTS)
                beyond = tl.maximum(beyond, tl.max(_is_bad(scale)))
                tl.store(scales + token[:, None, None], scale)
                if SCALE_ROWS == 2:
                    beyond = tl.maximum(beyond, tl.max(_is_bad(minimum)))
                    tl.store(scales + K * S + token[:, None, None], minimum)
    if k == 0:  # padding between sections: pages are compared and logged byte by byte
        gap = tl.arange(0, 16)
        if tl.program_id(2) == 0:
            end: tl.constexpr = K * S * ROW
            tl.store(page + end + gap, tl.zeros((16,), tl.uint8), mask=gap < KEY_SCALES - end)
            end_scales: tl.constexpr = KEY_SCALES + 2 * SCALE_ROWS * K * D
            tl.store(page + end_scales + gap, tl.zeros((16,), tl.uint8), mask=gap < VALUES - end_scales)
        else:
            end_values: tl.constexpr = VALUES + K * S * ROW
            tl.store(page + end_values + gap, tl.zeros((16,), tl.uint8), mask=gap < VALUE_SCALES - end_values)
            end_page: tl.constexpr = VALUE_SCALES + 2 * SCALE_ROWS * K * S
            tl.store(page + end_page + gap, tl.zeros((16,), tl.uint8), mask=gap < PAGE_BYTES - end_page)
    noted = tl.where(bad > 0, NON_FINITE, beyond * BEYOND_RANGE)
    tl.atomic_or(flags + tl.program_id(0) // pages_per_flag, noted, mask=noted > 0)
