"""The part of a config that says which text to use: `config.data`."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MEGABYTE = 10**6


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `config.data` that this package reads. Every one may be left out."""

    path: str = ""  # file or directory of text; "" is the standard library of the running Python
    glob: str = ""  # shell pattern for file names ("" is *.py in the standard library, else all)
    data_dir: str = ""  # prepared corpora; "" is $MEMSEQ_DATA, else memseq in the user's cache
    limit_mb: float = 0.0  # millions of bytes taken of the corpus, all splits together; 0 is all
    held_out_mb: float = 0.0  # millions of bytes scored of a held-out split; 0 is all

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Settings":
        """Reads the keys above from `config`, a ConfigDict or a dict; others are not looked at.

        Raises ValueError naming the key for a value of the wrong kind.
        """
        given = {}
        for field in dataclasses.fields(cls):
            value = config.get(field.name, field.default)
            if field.type is float:
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not number or not math.isfinite(value) or value < 0:
                    raise ValueError(
                        f"data.{field.name}: got {value!r}, expected a number of megabytes, "
                        "0 (all) or more"
                    )
                value = float(value)
            else:
                if not isinstance(value, str | os.PathLike):
                    raise ValueError(f"data.{field.name}: got {value!r}, expected a string")
                value = os.fspath(value)
            given[field.name] = value
        return cls(**given)

    def folder(self) -> Path:
        """Where prepared corpora live."""
        chosen = self.data_dir or os.environ.get("MEMSEQ_DATA", "")
        if chosen:
            return Path(chosen).expanduser().absolute()
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(cache).expanduser().absolute() / "memseq"
