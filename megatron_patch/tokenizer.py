"""A Hugging Face tokenizer as Megatron's engines and servers expect one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pikv_ds.errors import UsageError
from pikv_ds.integrations.hf.checkpoints import load_tokenizer


class HFTokenizer:
    """The tokenizer of a checkpoint, with the names that Megatron calls.

    It can be pickled: the coordinator, a process of its own, has a copy.

    Args:
        tokenizer: from `transformers.AutoTokenizer`.
        vocab_size: logits of the model, where it has more (padding) or fewer than the tokenizer.

    Attributes:
        eod, bos: ids of special tokens; where the tokenizer has none: eod -1, which no token equals, bos None.
        longest_token: most characters that one token stands for.
    """

    def __init__(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        self.hf = tokenizer
        self.vocab_size = vocab_size or len(tokenizer)
        self.eod = -1 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
        self.bos = tokenizer.bos_token_id
        # Where tokens are of bytes, they are written with a letter for each: at least one to a character.
        self.longest_token = max((len(token) for token in tokenizer.get_vocab()), default=1)

    @classmethod
    def load(cls, directory: str, vocab_size: int | None = None) -> HFTokenizer:
        """Of a checkpoint folder.

        Raises:
            CheckpointError: there is none, or its files cannot be read.
        """
        return cls(load_tokenizer(directory), vocab_size)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer itself adds."""
        return [int(i) for i in self.hf(text, verbose=False).input_ids]

    def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return str(self.hf.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Where in `text`, their text, each token begins: as many entries as ids.

        Several tokens can make one character; those begin where it does.
        """
        starts, end = [], 0
        for i in range(len(ids)):
            starts.append(end)
            so_far = self.detokenize(ids[: i + 1], skip_special_tokens=False)
            if text.startswith(so_far):
                end = len(so_far)
        return starts

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.hf, "chat_template", None))

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **kwargs: Any) -> Any:
        """Token ids (or text, with ``tokenize=False``) of a conversation, as the model was taught it.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if not self.has_chat_template:
            raise UsageError("the model's tokenizer has no chat template: use /v1/completions")
        if kwargs.get("tokenize", True):
            kwargs["return_dict"] = False  # ids, not a dictionary of them
        return self.hf.apply_chat_template(list(messages), **kwargs)
