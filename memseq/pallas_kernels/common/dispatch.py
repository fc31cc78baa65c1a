"""Which form of an operation runs.

An operation is one mathematical function with several forms. `implementation="auto"` takes the
form made for the platform that the program is lowered for, inside the forward and the backward
rule of one custom_vjp whose residuals are the operation's inputs: a program compiled for a TPU on
a machine without one gets the TPU kernel, and memory does not depend on the form.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.checks import check_choice

IMPLEMENTATIONS = ("auto", "reference", "chunked", "mosaic_tpu", "mosaic_gpu")
SHORT = 16  # calls of fewer time steps take the recurrent form: there is nothing to parallelise


@dataclasses.dataclass(frozen=True)
class KernelForm:
    """A form with its own backward pass.

    forward(*arrays, **options) -> outputs; backward(arrays, cotangents, **options) -> one cotangent
    per array (None for integers and for None); limit(*arrays, **options) -> why it cannot run, or
    None.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    limit: Callable[..., str | None]


@dataclasses.dataclass(frozen=True)
class Forms:
    """The forms of one operation. All take the same arrays and options and return the same."""

    name: str
    reference: Callable[..., Any]
    chunked: Callable[..., Any]
    mosaic_tpu: KernelForm | None = None
    mosaic_gpu: KernelForm | None = None

    @property
    def available(self) -> tuple[str, ...]:
        """The names of the forms that exist."""
        return tuple(f for f in IMPLEMENTATIONS[1:] if getattr(self, f) is not None)


def run(forms: Forms, implementation: str, time: int, arrays: tuple, **options) -> Any:
    """Runs the form asked for. `arrays` is a tuple of arrays or None, `options` are static."""
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    arrays = _varying_together(tuple(None if x is None else jnp.asarray(x) for x in arrays))
    if implementation == "auto":
        return _automatic(forms, "reference" if time < SHORT else "chunked", arrays, options)
    form = getattr(forms, implementation)
    if form is None:
        raise ValueError(
            f"implementation: {forms.name} has no form {implementation!r} yet; "
            f"it has {', '.join(forms.available)}"
        )
    if isinstance(form, KernelForm):
        if reason := form.limit(*arrays, **options):
            raise ValueError(
                f"implementation: {implementation!r} of {forms.name} cannot run: {reason}"
            )
        return _with_backward(form, arrays, options)
    return form(*arrays, **options)


def _varying_together(arrays: tuple) -> tuple:
    """Inside shard_map: marks all arrays as differing over every mesh axis that one of them does.

    A scan's carry must be marked like what is added to it, and a backward rule may then treat all
    arrays alike: the sum over devices for an array that they share comes from this mark.
    """
    axes = [frozenset() if x is None else jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*axes)
    return tuple(
        x if x is None or own == every else jax.lax.pcast(x, tuple(every - own), to="varying")
        for x, own in zip(arrays, axes, strict=True)
    )


def _automatic(forms: Forms, plain_name: str, arrays: tuple, options: dict) -> Any:
    plain = functools.partial(getattr(forms, plain_name), **options)

    def plain_backward(arrays, cotangents):
        # as kernels do: branches of one program must return the same, so no float0 for integers
        return tuple(
            c if x is not None and jnp.issubdtype(x.dtype, jnp.inexact) else None
            for x, c in zip(arrays, jax.vjp(plain, *arrays)[1](cotangents), strict=True)
        )

    kernels = {}
    if plain_name == "chunked":
        for platform, name in (("tpu", "mosaic_tpu"), ("cuda", "mosaic_gpu")):
            form = getattr(forms, name)
            reason = "not written yet" if form is None else form.limit(*arrays, **options)
            if reason is None:
                kernels[platform] = form
            elif jax.default_backend() in (platform, "gpu" if platform == "cuda" else platform):
                _warn_once(forms.name, name, reason)

    def by_platform(default, branches, *operands):
        if not branches:
            return default(*operands)
        return jax.lax.platform_dependent(*operands, default=default, **branches)

    @jax.custom_vjp
    def call(*arrays):
        forward = {p: functools.partial(k.forward, **options) for p, k in kernels.items()}
        return by_platform(lambda *xs: plain(*xs), forward, *arrays)

    def forward_rule(*arrays):
        return call(*arrays), arrays

    def backward_rule(arrays, cotangents):
        backward = {p: functools.partial(k.backward, **options) for p, k in kernels.items()}
        return by_platform(plain_backward, backward, arrays, cotangents)

    call.defvjp(forward_rule, backward_rule)
    return call(*arrays)


def _with_backward(form: KernelForm, arrays: tuple, options: dict) -> Any:
    @jax.custom_vjp
    def call(*arrays):
        return form.forward(*arrays, **options)

    call.defvjp(lambda *xs: (call(*xs), xs), lambda xs, ct: form.backward(xs, ct, **options))
    return call(*arrays)


@functools.cache
def _warn_once(operation: str, form: str, reason: str) -> None:
    warnings.warn(
        f"memseq: {operation} has no {form} kernel for this call ({reason}); "
        "it takes the chunked form",
        stacklevel=4,
    )
