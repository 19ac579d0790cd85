"""`document_attention`: in chunks of queries, or by the kernel that JAX brings along for TPU or GPU.

Letters: B rows, S sequence, H query heads, K key/value heads, N head width, Q queries of a chunk.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from emo_jax.errors import require_choice
from emo_jax.kernels.attention.reference import reference

IMPLEMENTATIONS = ("chunked", "splash", "pallas_gpu", "reference")

QUERY_CHUNK = 1024
"""Most queries whose scores exist at once; longer rows go through in chunks, recomputed for the backward pass."""

SPLASH_BLOCK = 1024
"""Most queries, and most keys, of a block on TPU: half as many keep more of what `SPLASH_SHARES` is about."""
SPLASH_STEP = 512
"""Keys of a block that are multiplied at once; their scores must fit beside the blocks in fast memory."""
SPLASH_BLOCK_BYTES = 2**19
"""Most bytes of a head's queries in a block: 1024 of 256 float32 do not fit a TPU v4."""
SPLASH_SHARES = 8
"""Most blocks of keys for one backward kernel, which computes five products where two kernels compute seven but writes
a gradient of all queries for each block of keys; longer rows go through the two."""


def default_implementation(platform: str) -> str:
    """The leanest formulation on a "cpu", "gpu" or "tpu"; measured reasons in BUILD_NOTES.md."""
    return {"tpu": "splash", "gpu": "pallas_gpu"}.get(platform, "chunked")


def document_attention(
    query_BSHN: jax.Array,
    key_BSKN: jax.Array,
    value_BSKN: jax.Array,
    document_ids_BS: jax.Array,
    *,
    implementation: str | None = None,
    part: tuple[jax.Array | int, int] = (0, 1),
    causal: bool = True,
) -> jax.Array:
    """Softmax attention of each token to its own document's tokens up to itself, or to all of them.

    Tokens of document 0 attend to one another, so that no softmax is empty; nothing reads their result.

    Args:
      query_BSHN: scaled by N^(−1/2) here; [B, S / parts, H, N] with a `part`.
      key_BSKN, value_BSKN: of the query's dtype; H is a multiple of K, and H / K query heads in a row share a key head.
      document_ids_BS: int32, of all S.
      implementation: `chunked` (chunks of queries that meet only the keys up to their end: half the work of a full
        product, and memory of one chunk), `splash` (JAX's kernel for TPU; bfloat16 or float32, N of 64, 128 or 256),
        `pallas_gpu` (its kernel for GPU; bfloat16 or float16, N of 64 or 128), `reference`; None: the best on the
        default backend. Both kernels need S to be a multiple of 128, and hand arrays that they do not take to
        `chunked`. A kernel sees its arguments whole: on several devices call this within `parallel.map_tokens`.
      part: which of how many equal parts of the row the queries are; the first may be an array.
      causal: False: to what follows a token too.

    Returns:
      The query's shape and dtype, from softmaxes in float32 or wider; differentiable in all but the ids.

    Raises:
      UserError: on an unknown implementation.
    """
    implementation = implementation or default_implementation(jax.default_backend())
    require_choice("implementation", implementation, IMPLEMENTATIONS)
    compute: Callable[..., jax.Array]
    if implementation == "reference":
        compute = reference
    elif implementation == "splash" and _fits(query_BSHN, ("bfloat16", "float32"), (64, 128, 256)):
        compute = _splash
    elif implementation == "pallas_gpu" and part[1] == 1 and _fits(query_BSHN, ("bfloat16", "float16"), (64, 128)):
        compute = _pallas_gpu
    else:
        compute = _chunked
    options: dict[str, Any] = {} if part[1] == 1 else {"part": part}
    return compute(query_BSHN, key_BSKN, value_BSKN, document_ids_BS, causal=causal, **options)


def _fits(query_BSHN: jax.Array, dtypes: tuple[str, ...], widths: tuple[int, ...]) -> bool:
    _, length, _, width = query_BSHN.shape
    return length % 128 == 0 and width in widths and query_BSHN.dtype in dtypes


def _chunked(
    query_BSHN: jax.Array,
    key_BSKN: jax.Array,
    value_BSKN: jax.Array,
    document_ids_BS: jax.Array,
    part: tuple[jax.Array | int, int] = (0, 1),
    causal: bool = True,
) -> jax.Array:
    _, length, heads, width = query_BSHN.shape
    groups = heads // key_BSKN.shape[2]
    if groups > 1:
        key_BSKN, value_BSKN = (jnp.repeat(x, groups, axis=2) for x in (key_BSKN, value_BSKN))
    chunk = min(QUERY_CHUNK, max(length // 2, 1))
    first, whole = part[0] * length, key_BSKN.shape[1]
    query_ids_BS = jax.lax.dynamic_slice_in_dim(document_ids_BS, first, length, axis=1)

    def attend(start: int) -> jax.Array:
        end = min(start + chunk, length)
        # Where the part is known only as it runs, masked keys are computed too.
        seen = end if causal and part[1] == 1 else whole
        queries = query_BSHN[:, start:end]
        dtype = jnp.promote_types(queries.dtype, jnp.float32)
        scores_BHQS = jnp.einsum("bqhn,bshn->bhqs", queries, key_BSKN[:, :seen], preferred_element_type=dtype)
        same_BQS = query_ids_BS[:, start:end, None] == document_ids_BS[:, None, :seen]
        past_1QS = first + jnp.arange(start, end).reshape(1, -1, 1) >= jnp.arange(seen).reshape(1, 1, -1)
        visible_BQS = same_BQS & past_1QS if causal else same_BQS
        probs_BHQS = jax.nn.softmax(jnp.where(visible_BQS[:, None], scores_BHQS * width**-0.5, -jnp.inf))
        return jnp.einsum("bhqs,bshn->bqhn", probs_BHQS.astype(value_BSKN.dtype), value_BSKN[:, :seen])

    if whole > 2 * chunk:
        attend = jax.checkpoint(attend, static_argnums=0)
    return jnp.concatenate([attend(start) for start in range(0, length, chunk)], axis=1)


def _splash(
    query_BSHN: jax.Array,
    key_BSKN: jax.Array,
    value_BSKN: jax.Array,
    document_ids_BS: jax.Array,
    part: tuple[jax.Array | int, int] = (0, 1),
    interpret: bool = False,
    causal: bool = True,
) -> jax.Array:
    _, length, heads, width = query_BSHN.shape
    index, parts = part
    most = min(SPLASH_BLOCK, SPLASH_BLOCK_BYTES // (width * query_BSHN.dtype.itemsize))
    block = next(size for size in range(most, 0, -128) if length % size == 0)
    step = SPLASH_STEP if block % SPLASH_STEP == 0 else block
    fused = length * parts <= SPLASH_SHARES * block
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=step,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=step,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    # A full mask is the same for every part of a row, and JAX cannot make its tables of blocks for several (0.12).
    shards, kind = (parts, splash.CausalMask) if causal else (1, splash.FullMask)
    mask = splash.MultiHeadMask([kind((length * shards, length * parts))] * heads)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=shards, interpret=interpret)
    if shards > 1:
        # Its tables of blocks cover all queries; this device's are cut out where `shard_map` would split them.
        abstract = AbstractMesh((parts,), ("part",))
        specs = kernel.manual_sharding_spec(NamedSharding(abstract, PartitionSpec(None, "part")))

        def cut(table: jax.Array, spec: PartitionSpec) -> jax.Array:
            if "part" not in spec:
                return table
            axis = spec.index("part")
            size = table.shape[axis] // parts
            return jax.lax.dynamic_slice_in_dim(table, index * size, size, axis)

        kernel = jax.tree.map(cut, kernel, specs)
    query_ids_BS = jax.lax.dynamic_slice_in_dim(document_ids_BS, index * length, length, axis=1)

    def attend(
        query_HSN: jax.Array, key_KSN: jax.Array, value_KSN: jax.Array, query_ids_S: jax.Array, key_ids_S: jax.Array
    ) -> jax.Array:
        documents = splash.SegmentIds(q=query_ids_S, kv=key_ids_S)
        return kernel(query_HSN, key_KSN, value_KSN, segment_ids=documents)

    query, key, value = (x.swapaxes(1, 2) for x in (query_BSHN * width**-0.5, key_BSKN, value_BSKN))
    return jax.vmap(attend)(query, key, value, query_ids_BS, document_ids_BS).swapaxes(1, 2)


def _pallas_gpu(
    query_BSHN: jax.Array,
    key_BSKN: jax.Array,
    value_BSKN: jax.Array,
    document_ids_BS: jax.Array,
    interpret: bool = False,
    causal: bool = True,
) -> jax.Array:
    # Deprecated, and so imported only where it is used: what JAX names as its successor is a package of its own.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import mha
    _, _, heads, width = query_BSHN.shape
    key_BSHN, value_BSHN = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key_BSKN, value_BSKN))
    scale = width**-0.5
    return mha(query_BSHN, key_BSHN, value_BSHN, document_ids_BS, sm_scale=scale, causal=causal, interpret=interpret)
