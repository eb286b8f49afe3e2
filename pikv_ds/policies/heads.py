"""The classes of KV heads (DuoAttention, Xiao et al. 2024), as ``pikv heads`` writes them.

``{"retrieval": [[true, false, ...] per layer]}``
"""

from __future__ import annotations

import json
from pathlib import Path


def read_heads(path: str) -> list[list[bool]]:
    """Whether a head is a retrieval head, ``[num_layers][num_heads]``, from the file of ``pikv heads``.

    Raises:
        ValueError: there is no such file, or it is another one.
    """
    if not path:
        raise ValueError("heads = '': name the file that `pikv heads` has written")
    try:
        table = json.loads(Path(path).read_text())["retrieval"]
        return [[bool(x) for x in row] for row in table]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"heads = {path!r}: {error}; name a file that `pikv heads` has written") from None


def check_heads(table: list[list[bool]], path: str, num_layers: int, num_heads: int, key: str = "heads") -> None:
    """Raises ValueError where `read_heads` has read another model's."""
    sizes = {len(row) for row in table}
    if len(table) != num_layers or sizes != {num_heads}:
        raise ValueError(
            f"{key} = {path!r}: is of {len(table)} layers with {', '.join(map(str, sorted(sizes)))} KV heads, "
            f"the model has {num_layers} with {num_heads}; calibrate it for this model"
        )
