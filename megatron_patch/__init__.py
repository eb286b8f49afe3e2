"""PiKV under Megatron-Core: attention, model conversion, engines and the inference server."""
