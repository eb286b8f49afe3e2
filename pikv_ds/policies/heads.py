"""The classes of KV heads (DuoAttention, Xiao et al. 2024), as ``pikv heads`` writes them.

``{"retrieval": [[true, false, ...] per layer]}``
"""

from __future__ import annotations

from pikv_ds import checks
from pikv_ds.errors import UsageError

HEADS_REMEDY = "name the file that `pikv heads` has written"


def read_heads(path: str) -> list[list[bool]]:
    """Whether a head is a retrieval head, ``[num_layers][num_heads]``, from the file of ``pikv heads``.

    Raises:
        ValueError: there is no such file, or it is another one.
    """
    try:
        content = checks.read_json(path)
    except UsageError as error:
        raise UsageError(f"heads = {checks.shown(path)}: {error}; {HEADS_REMEDY}") from None
    table = content.get("retrieval") if isinstance(content, dict) else None
    rows = table if isinstance(table, list) else []
    if not rows or not all(isinstance(row, list) and row and all(isinstance(x, bool) for x in row) for row in rows):
        raise UsageError(f'heads = {checks.shown(path)}: has no table "retrieval" of true and false; {HEADS_REMEDY}')
    return rows


def check_heads(table: list[list[bool]], path: str, num_layers: int, num_heads: int, key: str = "heads") -> None:
    """Raises ValueError where `read_heads` has read another model's."""
    sizes = {len(row) for row in table}
    if len(table) != num_layers or sizes != {num_heads}:
        raise UsageError(
            f"{key} = {path!r}: is of {len(table)} layers with {', '.join(map(str, sorted(sizes)))} KV heads, "
            f"the model has {num_layers} with {num_heads}; calibrate it for this model"
        )
