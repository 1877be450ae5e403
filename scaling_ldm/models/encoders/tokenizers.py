"""Captions to ids, with the tokenizers that come with checkpoints.

transformers is imported when a tokenizer is loaded, not before.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer; `load` makes one."""

    theirs: Any

    @classmethod
    def load(cls, directory: str | pathlib.Path) -> Tokenizer:
        """Reads the tokenizer of a directory; nothing is downloaded, no code is run.

        Raises:
          ValueError: no tokenizer there, or one that cannot pad.
        """
        # Without this, every import warns that its networks need torch; ours do not.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        import transformers

        directory = pathlib.Path(directory)
        if not directory.is_dir():
            raise ValueError(f"{directory}: no such directory")
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as e:  # of many types, by what is missing
            raise ValueError(
                f"no tokenizer can be loaded from {directory}: {type(e).__name__}: "
                f"{e}. It needs tokenizer.json and tokenizer_config.json, or the "
                "vocabulary files that config.json's model_type asks for."
            ) from e
        if theirs is None or theirs.pad_token_id is None:
            raise ValueError(f"the tokenizer of {directory} has no token for padding")
        return cls(theirs)

    @property
    def vocab_size(self) -> int:
        """All ids are below this."""
        return len(self.theirs)

    def encode(
        self, captions: Sequence[str], length: int
    ) -> tuple[Int32[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
        """Ids and mask, [B, length]; the mask is true where there is text.

        Longer captions are cut, but keep their last special token.
        """
        found = self.theirs(
            list(captions),
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=length,
            return_attention_mask=True,
            return_tensors="np",
        )
        ids_BS = found["input_ids"].astype(np.int32)
        return ids_BS, found["attention_mask"].astype(bool)
