"""PiKV-DS: a distributed, expert-sharded KV cache for DeepSpeed and Megatron MoE inference."""

from pikv_ds.api import attach, detach, initialize, new_cache, serve_metrics, stats
from pikv_ds.config import ConfigError, PiKVConfig
from pikv_ds.core.cache import ExpertShardedKVCache
from pikv_ds.errors import NonFiniteError, OutOfRangeError, PeerError, PiKVError, PoolFullError
from pikv_ds.version import __version__

__all__ = [
    "ConfigError",
    "ExpertShardedKVCache",
    "NonFiniteError",
    "OutOfRangeError",
    "PeerError",
    "PiKVConfig",
    "PiKVError",
    "PoolFullError",
    "__version__",
    "attach",
    "detach",
    "initialize",
    "new_cache",
    "serve_metrics",
    "stats",
]
