"""PiKV under Megatron-Core: attention, model conversion, engines and the inference server."""

from megatron_patch import compat

__all__ = ["compat"]
