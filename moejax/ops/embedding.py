"""The embedding of tokens whose table lies in columns over devices, and is never whole on one of them.

Each device looks up its columns of the rows of all tokens; an all-to-all gives each device all columns of its own
tokens. So a device moves T x D numbers, whatever the vocabulary, and the gradient of its columns is complete without a
reduction.

T tokens of this device, D model dim, C columns of this device, V vocabulary, n devices of the axes.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def embed(
    tokens_T: Int[Array, "T"], table_VC: Float[Array, "V C"], dtype: DTypeLike, axes: tuple[str, ...]
) -> Float[Array, "T D"]:
    """The tokens' rows of the table in `dtype`; the table's gradient is float32.

    `axes`: the mesh axes over which the columns, and the tokens, are spread; none: the table is here.
    """
    if not axes:
        return table_VC[tokens_T].astype(dtype)
    all_tokens_A = lax.all_gather(tokens_T, axes, tiled=True)
    rows_AC = table_VC[all_tokens_A].astype(dtype)
    return lax.all_to_all(rows_AC, axes, split_axis=0, concat_axis=1, tiled=True)


def unembed(x_TD: Float[Array, "T D"], head_DC: Float[Array, "D C"], axes: tuple[str, ...]) -> Float[Array, "T V"]:
    """The tokens' scores of the whole vocabulary, float32, where each device of `axes` has some columns of the head.

    Not the head travels but the tokens, and their scores back.
    """
    if axes:
        x_TD = lax.all_gather(x_TD, axes, tiled=True)
    scores = jnp.dot(x_TD, head_DC.astype(x_TD.dtype), preferred_element_type=jnp.float32)
    return lax.all_to_all(scores, axes, split_axis=0, concat_axis=1, tiled=True) if axes else scores
