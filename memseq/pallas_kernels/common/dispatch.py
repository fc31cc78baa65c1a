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
import numpy as np

from memseq.pallas_kernels.common.checks import check_choice
from memseq.pallas_kernels.common.sharded import over_mesh, vary_together
from memseq.partitioning import with_split_from_here

IMPLEMENTATIONS = ("auto", "reference", "chunked", "mosaic_tpu", "mosaic_gpu")
SHORT = 16  # calls of fewer time steps take the recurrent form: there is nothing to parallelise


@dataclasses.dataclass(frozen=True)
class KernelForm:
    """A form with its own backward pass.

    forward(*arrays, **options) -> outputs; backward(arrays, cotangents, **options) -> one cotangent
    per array (None for integers and for None, as in `cotangents`); limit(*arrays, **options) -> why
    it cannot run, or None.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    limit: Callable[..., str | None]


@dataclasses.dataclass(frozen=True)
class Forms:
    """The forms of one operation. All take the same arrays and options and return the same.

    axes, out_axes: of each array and output its dimensions, a letter each, for kernels under a mesh
    of devices: see `sharded.over_mesh`.
    """

    name: str
    reference: Callable[..., Any]
    chunked: Callable[..., Any]
    mosaic_tpu: KernelForm | None = None
    mosaic_gpu: KernelForm | None = None
    axes: tuple[str, ...] = ()
    out_axes: tuple[str, ...] = ()

    @property
    def available(self) -> tuple[str, ...]:
        """The names of the forms that exist."""
        return tuple(f for f in IMPLEMENTATIONS[1:] if getattr(self, f) is not None)


def run(forms: Forms, implementation: str, time: int, arrays: tuple, **options) -> Any:
    """Runs the form asked for. `arrays` is a tuple of arrays or None, `options` are static."""
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    arrays = vary_together(tuple(None if x is None else jnp.asarray(x) for x in arrays))
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
        return _with_backward(forms, form, arrays, options)
    return form(*arrays, **options)


def _automatic(forms: Forms, plain_name: str, arrays: tuple, options: dict) -> Any:
    plain = functools.partial(getattr(forms, plain_name), **options)

    def plain_backward(arrays, cotangents):
        return pulled(plain, arrays, cotangents)

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
    @with_split_from_here
    def call(*arrays):
        branches = {p: _forward(forms, k, arrays, options) for p, k in kernels.items()}
        return by_platform(lambda *xs: plain(*xs), branches, *arrays)

    def forward_rule(*arrays):
        return call(*arrays), arrays

    @with_split_from_here
    def backward_rule(arrays, cotangents):
        cotangents = _floating(cotangents)
        branches = {p: _backward(forms, k, arrays, cotangents, options) for p, k in kernels.items()}
        return by_platform(plain_backward, branches, arrays, cotangents)

    call.defvjp(forward_rule, backward_rule)
    return call(*arrays)


def _with_backward(forms: Forms, form: KernelForm, arrays: tuple, options: dict) -> Any:
    @jax.custom_vjp
    @with_split_from_here
    def call(*arrays):
        return _forward(forms, form, arrays, options)(*arrays)

    @with_split_from_here
    def backward_rule(arrays, cotangents):
        function = _backward(forms, form, arrays, cotangents, options)
        return function(arrays, _floating(cotangents))

    call.defvjp(lambda *xs: (call(*xs), xs), backward_rule)
    return call(*arrays)


def pulled(function: Callable, arrays: tuple, cotangents: Any) -> tuple:
    """One cotangent for each of `arrays` by JAX's derivative, as a kernel's backward pass gives it.

    None stands for integers here and in `cotangents`: a conditional has no place for float0. It
    also stands for an output that is None.
    """

    def is_none(x):
        return x is None

    outputs, pull = jax.vjp(function, *arrays)
    outputs, tree = jax.tree.flatten(outputs, is_leaf=is_none)
    given = jax.tree.leaves(cotangents, is_leaf=is_none)
    given = [
        np.zeros(y.shape, jax.dtypes.float0) if c is None and y is not None else c
        for y, c in zip(outputs, given, strict=True)
    ]
    found = pull(jax.tree.unflatten(tree, given))
    return tuple(
        c if x is not None and jnp.issubdtype(x.dtype, jnp.inexact) else None
        for x, c in zip(arrays, found, strict=True)
    )


def _floating(cotangents: Any) -> Any:
    """None in place of what has no derivative."""
    return jax.tree.map(lambda c: None if c.dtype == jax.dtypes.float0 else c, cotangents)


def _forward(forms: Forms, form: KernelForm, arrays: tuple, options: dict) -> Callable:
    """A kernel's forward(*arrays) on each device's part."""
    function = functools.partial(form.forward, **options)
    return over_mesh(function, forms.axes, forms.out_axes, arrays) if forms.axes else function


def _backward(
    forms: Forms, form: KernelForm, arrays: tuple, cotangents: tuple, options: dict
) -> Callable:
    """A kernel's backward(arrays, cotangents) on each device's part."""
    if not forms.axes:
        return functools.partial(form.backward, **options)

    def flat(*both):
        return form.backward(both[: len(arrays)], both[len(arrays) :], **options)

    axes = (*forms.axes, *forms.out_axes)
    on_each_device = over_mesh(flat, axes, forms.axes, (*arrays, *cotangents))
    return lambda arrays, cotangents: on_each_device(*arrays, *cotangents)


@functools.cache
def _warn_once(operation: str, form: str, reason: str) -> None:
    warnings.warn(
        f"memseq: {operation} has no {form} kernel for this call ({reason}); "
        "it takes the chunked form",
        stacklevel=4,
    )
