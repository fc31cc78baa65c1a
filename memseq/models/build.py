"""Models from configs."""

import dataclasses

import jax.numpy as jnp
from ml_collections import ConfigDict

from memseq.models.language_model import LanguageModel
from memseq.pallas_kernels.common.checks import check_choice


def language_model(config: ConfigDict) -> LanguageModel:
    """The model that `config.model` describes; its keys are the fields of `LanguageModel`.

    `dtype` and `param_dtype` are names such as "bfloat16" (an empty dtype follows the parameters);
    an empty `channel` is none; `mixers` maps a layer's name to its options.

    Raises:
        ValueError: for a key that is unknown or missing, and for the name of no floating dtype.
    """
    options = config.to_dict()
    fields = [f for f in dataclasses.fields(LanguageModel) if f.name not in ("name", "parent")]
    for name in options:
        check_choice("config.model", name, [field.name for field in fields])
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in options:
            raise ValueError(f"config.model.{field.name}: expected a value, got none")
    if "dtype" in options:
        options["dtype"] = _dtype("dtype", options["dtype"]) if options["dtype"] else None
    if "param_dtype" in options:
        options["param_dtype"] = _dtype("param_dtype", options["param_dtype"])
    if "channel" in options:
        options["channel"] = options["channel"] or None
    return LanguageModel(**options)


def _dtype(name: str, value: str):
    try:
        dtype = jnp.dtype(value or "none")
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}: expected the name of a floating-point dtype, got {value!r}")
    return dtype
