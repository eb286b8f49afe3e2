"""Triton kernels, one file per family of ops; `pikv_ds.ops.triton_ops` launches them."""
