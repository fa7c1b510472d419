"""Attention within packed documents by accelerators' kernels: splash attention on TPUs, cuDNN's on NVIDIA GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxspec.base import Array
from jaxspec.parallel.mesh import AXIS_RULES, splits

Pairs = tuple[tuple[Array, Array], ...]
"""Keys `[B, K, C, L]` and values `[B, K, L, C]` that one query sees alone, as in `attention.PerQueryKeys`."""
Kernel = Literal["xla", "splash", "cudnn"]
"""How training rows attend: by XLA in blocks of queries (`attention.attend_causal`), or by a kernel of this module."""
LANES = 128
"""The rows of a splash block are a multiple of this."""
BLOCKS = (512, 256, LANES)
"""Queries, and keys, that splash takes at once; larger blocks read the keys less often."""


def choose_kernel(asked: Literal["auto"] | Kernel, device: Any, dtype: Any) -> Kernel:
    """Returns the kernel for devices like this one, with activations in `dtype`; `auto` asks for the best one.

    Raises ValueError where the kernel that is asked for does not run there.
    """
    nvidia, narrow = device.platform == "gpu" and "NVIDIA" in device.device_kind, jnp.dtype(dtype).itemsize == 2
    # cuDNN attends in 16 bits only.
    if asked == "auto":
        return "splash" if device.platform == "tpu" else "cudnn" if nvidia and narrow else "xla"
    if asked == "splash" and device.platform != "tpu":
        raise ValueError(f"attention=splash is for TPUs, and the mesh has {device.device_kind}: set attention=auto")
    if asked == "cudnn" and not nvidia:
        raise ValueError(
            f"attention=cudnn is for NVIDIA's GPUs, and the mesh has {device.device_kind}: set attention=auto"
        )
    if asked == "cudnn" and not narrow:
        raise ValueError(f"attention=cudnn takes no {jnp.dtype(dtype).name}: set dtype=bfloat16, or attention=auto")
    return asked


def takes(kernel: Kernel, length: int, channels: int, per_query: Pairs = ()) -> bool:
    """Returns whether a kernel takes rows of this length, heads with so many channels, and these per-query keys."""
    # cuDNN alone has limits.
    return kernel != "cudnn" or (length % 2 == 0 and channels % 8 == 0 and channels <= LANES and not per_query)


def lone_padding(segments_BL: Array) -> Array:
    """Returns segments in which every token of padding (0) has a number of its own, so that it sees only itself."""
    return jnp.where(segments_BL > 0, segments_BL, -1 - jnp.arange(segments_BL.shape[1], dtype=segments_BL.dtype))


@functools.cache  # equal masks are one object: splash prepares each once
def _splash_mask(length: int, parts: int) -> Any:
    """Returns a causal mask over the first `length` keys; of each of `parts` such lengths behind, a query sees one."""
    from jax.experimental.pallas.ops.tpu.splash_attention import CausalMask, Mask

    if parts == 0:
        return CausalMask((length, length))

    class CausalAndPerQuery(Mask):
        @property
        def shape(self) -> tuple[int, int]:
            return length, (1 + parts) * length

        def __getitem__(self, at: Any) -> np.ndarray:
            query, key = (np.arange(size)[part] for size, part in zip(self.shape, at, strict=True))
            query, key = query[:, None], key[None]
            return np.where(key < length, key <= query, key % length == query)

    return CausalAndPerQuery()


def attend_splash(
    q_BLKGC: Array, k_BKCL: Array, v_BKLC: Array, segments_BL: Array, per_query: Pairs = (), *, interpret: bool = False
) -> Array:
    """Returns `attention.attend` under `attention.segment_mask`, by splash attention: `[B, L, K, G, C]`.

    No scores are kept in memory. Rows are padded to whole blocks. Per-query keys (`attention.PerQueryKeys`) stand
    behind the others as further columns; of their blocks only those on the diagonal are read. `interpret` runs the
    kernel's program on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import

    batch, length, kv_heads, group, channels = q_BLKGC.shape
    # The largest block whose padding costs an eighth of the row at most. Of a block of per-query keys the diagonal
    # alone is used, so smaller blocks waste less.
    blocks = BLOCKS[1:] if per_query else BLOCKS
    block = next(b for b in blocks if b == LANES or -length % b <= length // 8)
    extra, whole = -length % block, length + -length % block
    q_BHLC = jnp.transpose(q_BLKGC * jnp.asarray(channels**-0.5, q_BLKGC.dtype), (0, 2, 3, 1, 4))
    q_BHLC = q_BHLC.reshape(batch, kv_heads * group, length, channels)

    def padded(x_BHLC: Array) -> Array:
        return jnp.pad(x_BHLC, ((0, 0), (0, 0), (0, extra), (0, 0)))

    k_BKMC = jnp.concatenate([padded(jnp.swapaxes(k, 2, 3)) for k in (k_BKCL, *(k for k, _ in per_query))], axis=2)
    v_BKMC = jnp.concatenate([padded(v) for v in (v_BKLC, *(v for _, v in per_query))], axis=2)
    place_BL = lone_padding(jnp.pad(segments_BL, ((0, 0), (0, extra))))
    segments = splash.SegmentIds(place_BL, jnp.tile(place_BL, (1, 1 + len(per_query))))
    # The fused backward kernel keeps a gradient of the queries for each block of keys, and per-query keys are many.
    apart = {"block_q_dq": block, "block_kv_dq": block}
    backward: dict[str, Any] = apart if per_query else {"use_fused_bwd_kernel": True}
    sizes = splash.BlockSizes(block, block, block, block, block, block, **backward)
    mask = splash.MultiHeadMask([_splash_mask(whole, len(per_query))] * (kv_heads * group))
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    mixed_BHLC: Any = jax.vmap(kernel)(padded(q_BHLC), k_BKMC, v_BKMC, segments)
    mixed_BKGLC = mixed_BHLC[:, :, :length].reshape(batch, kv_heads, group, length, channels)
    return jnp.transpose(mixed_BKGLC, (0, 3, 1, 2, 4)).astype(q_BLKGC.dtype)


def attend_cudnn(q_BLKGC: Array, k_BKCL: Array, v_BKLC: Array, segments_BL: Array) -> Array:
    """Returns the same by cuDNN's fused attention, in bf16 or fp16; it reads a mask `[B, L, L]` too."""
    batch, length, kv_heads, group, channels = q_BLKGC.shape
    segments_BL = lone_padding(segments_BL)
    mixed_BLHC = jax.nn.dot_product_attention(
        q_BLKGC.reshape(batch, length, kv_heads * group, channels),
        jnp.transpose(k_BKCL, (0, 3, 1, 2)),
        jnp.transpose(v_BKLC, (0, 2, 1, 3)),
        mask=(segments_BL[:, :, None] == segments_BL[:, None, :])[:, None],
        is_causal=True,
        implementation="cudnn",
    )
    return mixed_BLHC.reshape(q_BLKGC.shape)


KERNELS: dict[str, Callable[..., Array]] = {"splash": attend_splash, "cudnn": attend_cudnn}


def attend_packed(
    kernel: Kernel, q_BLKGC: Array, k_BKCL: Array, v_BKLC: Array, segments_BL: Array, per_query: Pairs = ()
) -> Array:
    """Returns `attention.attend` under `attention.segment_mask`, by a kernel that `takes` it: `[B, L, K, G, C]`.

    In a program traced under `jax.set_mesh` each device takes its own rows and key-value heads, as
    `jaxspec.parallel.mesh` spreads them.
    """
    attend, mesh = KERNELS[kernel], jax.sharding.get_abstract_mesh()
    arguments = (q_BLKGC, k_BKCL, v_BKLC, segments_BL, *((per_query,) if per_query else ()))
    if mesh.empty or mesh.manual_axes:
        return attend(*arguments)
    # XLA cannot partition a kernel, so a `shard_map` does. What the mesh does not divide evenly is whole everywhere.
    rows = None if q_BLKGC.shape[0] % splits("batch") else AXIS_RULES["batch"]
    heads = None if q_BLKGC.shape[2] % splits("kv_heads") else AXIS_RULES["kv_heads"]
    by_row, by_head = P(rows, None, heads), P(rows, heads)
    given = (by_row, by_head, by_head, P(rows), by_head)[: len(arguments)]
    return jax.shard_map(attend, in_specs=given, out_specs=by_row, check_vma=False)(*arguments)
