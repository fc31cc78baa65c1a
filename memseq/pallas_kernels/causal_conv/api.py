"""`causal_conv`: arguments, checks and dispatch."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.causal_conv.activations import ACTIVATIONS
from memseq.pallas_kernels.causal_conv.chunked import chunked
from memseq.pallas_kernels.causal_conv.mosaic_tpu import MOSAIC_TPU
from memseq.pallas_kernels.causal_conv.reference import reference
from memseq.pallas_kernels.common import checks
from memseq.pallas_kernels.common.context import splits_time
from memseq.pallas_kernels.common.dispatch import Forms, run
from memseq.pallas_kernels.common.segments import hide_padding, segments

FORMS = Forms(
    "causal_conv",
    reference,
    chunked,
    MOSAIC_TPU,
    axes=("bth", "wh", "h", "bwh", "bt", "bt"),
    out_axes=("bth", "bwh"),
)


def _silent(arguments, size):
    """The tail alone: `size` places move along it as that many channels."""
    x, kernel = arguments["x"], arguments["kernel"]
    return {
        "x": jnp.zeros((*x.shape[:2], size), x.dtype),
        "kernel": jnp.zeros((kernel.shape[0], size), kernel.dtype),
        "segment_ids": arguments.get("segment_ids"),
    }


@splits_time(("x",), _silent, matrix=True, whole=("kernel", "bias"))
def causal_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Each channel's weighted sum of its last `width` inputs: y_t = sum_w kernel_w x_{t-width+1+w}.

    The short convolution in front of a memory (H3: Fu et al. 2023, arXiv:2212.14052; Mamba: Gu and
    Dao 2023, arXiv:2312.00752, section 3.4). Inputs from before a segment's start count as zeros.

    Args:
        x: [batch, time, channels], floating.
        kernel: [width, channels]; the last tap multiplies the present input.
        bias: [channels], added to every valid output.
        activation: applied to the outputs: None, "silu", "gelu" (its tanh form) or "relu".
        initial_state: [batch, width - 1, channels], the inputs before the first one, oldest first;
            None is zeros.
        segment_ids: int32 [batch, time]. No tap reaches across a change of the id; the initial
            state continues the first segment. Negative ids are padding: taps skip them, their
            output is 0.
        implementation: "auto", or one of `FORMS.available`.

    Returns:
        y as x, summed in float32 (float64 if an input is), and the state after the last step
        [batch, width - 1, channels] in x's dtype: the last valid inputs of the last segment,
        zeros where it has fewer.

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, at trace time.
    """
    checks.check_array("x", x, (None,) * 3, "[batch, time, channels]")
    x = jnp.asarray(x)
    batch, time, channels = x.shape
    checks.check_array("kernel", kernel, (None, channels), "[width, channels]")
    width = kernel.shape[0]
    if width == 0:
        raise ValueError("kernel: expected at least one tap, got width 0")
    if bias is not None:
        checks.check_array("bias", bias, (channels,), "[channels]")
    checks.check_choice("activation", activation, ACTIVATIONS)
    checks.check_segment_ids(segment_ids, batch, time)
    dtype = checks.state_dtype(x, kernel, bias, initial_state)
    state = checks.check_state(
        initial_state, (batch, width - 1, channels), x.dtype, "[batch, width - 1, channels]"
    )

    valid = index = None
    if segment_ids is not None:
        valid, index = segments(segment_ids)
        x = hide_padding(x, valid)
    bias = None if bias is None else bias.astype(dtype)
    arrays = (x, kernel.astype(dtype), bias, state, valid, index)
    return run(FORMS, implementation, time, arrays, activation=activation)
