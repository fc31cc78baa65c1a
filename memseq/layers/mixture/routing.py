"""Which tokens go to which memory, packed into pages of one memory each.

A page is `page_size` tokens of one row that go to one memory, in their order in time. Pages have
static shapes whatever the router does, and there are about top_k * time / page_size of them: the
work of a mixture grows with the memories that a token goes to, not with those that there are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Pages(NamedTuple):
    """A packing of N pages of P places each.

    Attributes:
        memory: int32 [N, batch], the memory of each page.
        token: int32 [N, batch, P], the time of the token at each place; `time` where it is empty.
        place: int32 [batch, time, top_k], where in [N x P] a token's choice lies; N x P for none.
    """

    memory: jax.Array
    token: jax.Array
    place: jax.Array


def number_of_pages(time: int, top_k: int, memories: int, page_size: int) -> int:
    """The most pages that any routing of `time` tokens needs: the last of a memory may be short."""
    alone = memories * -(-time // page_size)
    return min(alone, (top_k * time + memories * (page_size - 1)) // page_size)


def pack(chosen: jax.Array, valid: jax.Array, memories: int, page_size: int) -> Pages:
    """Packs the tokens of each row by memory.

    Args:
        chosen: int32 [batch, time, top_k], distinct memories of each token.
        valid: bool [batch, time]; padding goes to no memory.
    """
    time, top_k = chosen.shape[1:]
    pages = number_of_pages(time, top_k, memories, page_size)

    def row(chosen, valid):
        # from indices alone: a weight of zero is still a token that the memory reads and writes
        memory = jnp.where(valid[:, None], chosen, memories).reshape(-1)
        order = jnp.argsort(memory, stable=True)  # stable: each memory sees its tokens in time
        count = jnp.sum(memory[:, None] == jnp.arange(memories + 1), axis=0, dtype=jnp.int32)
        start = jnp.cumsum(count) - count
        own_pages = (count[:-1] + page_size - 1) // page_size
        last_page = jnp.cumsum(own_pages)
        shift = (last_page - own_pages) * page_size - start[:-1]
        place = jnp.arange(memory.size) + jnp.append(shift, 0)[memory[order]]
        place = jnp.where(memory[order] < memories, place, pages * page_size)
        token = jnp.full(pages * page_size, time).at[place].set(order // top_k, mode="drop")
        of_page = jnp.sum(jnp.arange(pages)[:, None] >= last_page, axis=1)
        return (
            jnp.minimum(of_page, memories - 1),
            token.reshape(pages, page_size),
            jnp.zeros_like(place).at[order].set(place).reshape(time, top_k),
        )

    memory, token, place = jax.vmap(row, out_axes=(1, 1, 0))(chosen, valid)
    return Pages(memory, token, place)
