"""Local aggregation of the logits, LAM (METHOD section 3): one definition, several implementations.

With f_a the features and s_a the logits at position a, g_ab = f_a . f_b and D_ab = exp(-|a - b|^2 / (2 sigma^2))::

    A_ab  = softmax over a of g_ab
    out_b = sum_a s_a A_ab D_ab / (sum_a A_ab D_ab + 1e-7)

A further implementation is one function (N, C, h, w), (N, D, h, w), sigma, window -> (N, C, h, w) in
``IMPLEMENTATIONS``; its key is the value of ``MODEL.BLPSEG.LAM.IMPL``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn
from torch.autograd.function import once_differentiable

from ..utils.errors import BLPSegError

EPSILON = 1e-7  # of METHOD section 3


def local_aggregation(
    logits: torch.Tensor, features: torch.Tensor, sigma: float, impl: str = "auto", window: float = 4.0
) -> torch.Tensor:
    """Replace the logits at each position by a mean over positions that are similar and near (METHOD section 3).

    Differentiable once in ``logits`` and ``features``. Half precision is raised to float32, also under
    autocast: dot products of the features are not scaled and reach hundreds, where half precision is off by
    whole units and the softmax by factors.

    Args:
        logits: (N, C, h, w) floating point.
        features: (N, D, h', w') floating point; resized bilinearly to (h, w) where the grids differ.
        sigma: standard deviation of the distance term in grid cells, > 0.
        impl: the implementation. When traced or compiled, every exact one becomes ``"dense"``.

            * ``"auto"``: exact; the fastest exact implementation for the size. It uses float64 where the features
              are so long, or so unequal in length, that float32 would not be accurate to 1e-4.
            * ``"dense"``: the formula literally, with its (h w) x (h w) tables; plain operations, so it
              can be traced and exported with dynamic h and w.
            * ``"tiled"``: exact; tiles of the tables, each used for both of its directions and recomputed for the
              gradient. Memory linear in h w.
            * ``"sdpa"``: ``scaled_dot_product_attention`` with the distance folded into three more channels; drops the
              1e-7, so it differs where far positions outweigh all near ones. The fastest with few channels.
            * ``"window"``: a variant of the model: positions farther than ``window * sigma`` are left out, from the
              softmax as well. Time and memory linear in h w.
        window: radius of ``"window"`` in units of sigma, > 0; the others ignore it.

    Returns:
        (N, C, h, w) aggregated logits, float64 if the logits are, else float32.

    Raises:
        BLPSegError: unknown ``impl``, or shapes or numbers that do not fit.
    """
    _check(sigma, impl, window)
    if impl != "window" and (torch.jit.is_tracing() or torch.compiler.is_compiling()):
        impl = "dense"
    if logits.dim() != 4 or features.dim() != 4 or logits.shape[0] != features.shape[0]:
        raise BLPSegError(
            f"local aggregation takes (N, C, h, w) logits and (N, D, h, w) features; "
            f"got {tuple(logits.shape)} and {tuple(features.shape)}"
        )
    with torch.autocast(logits.device.type, enabled=False):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logits, features = logits.to(dtype), features.to(dtype)
        if features.shape[-2:] != logits.shape[-2:]:
            features = F.interpolate(features, size=logits.shape[-2:], mode="bilinear", align_corners=False)
        return IMPLEMENTATIONS[impl](logits, features, sigma, window)


def _check(sigma: float, impl: str, window: float) -> None:
    if impl not in IMPLEMENTATIONS:
        raise BLPSegError(f"MODEL.BLPSEG.LAM.IMPL {impl!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if not (sigma > 0 and window > 0):
        raise BLPSegError(f"MODEL.BLPSEG.LAM.SIGMA and .WINDOW must be > 0; got {sigma} and {window}")


class ShallowEmbedding(nn.Module):
    """One feature vector for each patch of the image: local aggregation compares them (METHOD section 2).

    Args:
        channels: D, the length of a feature vector.
        patch_size: side of a patch in pixels, the stride of the logits.
    """

    def __init__(self, channels: int, patch_size: int = 4):
        super().__init__()
        self.patch_size = patch_size
        self.patches = nn.Conv2d(3, channels, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(channels)
        self.projection = nn.Conv2d(channels, channels, 1)
        c2_msra_fill(self.patches)
        c2_msra_fill(self.projection)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalised images -> (N, D, ceil(H / patch_size), ceil(W / patch_size))."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        x = self.patches(images)
        x = self.norm(x.movedim(1, 3)).movedim(3, 1)
        return self.projection(x)


class LocalAggregation(nn.Module):
    """:func:`local_aggregation` and the embedding whose features it compares.

    Attributes:
        embedding: image -> features of the aggregation, see :class:`ShallowEmbedding`.
        sigma, impl, window: see :func:`local_aggregation`.
    """

    def __init__(
        self, channels: int, patch_size: int = 4, *, sigma: float = 6.0, impl: str = "auto", window: float = 4.0
    ):
        """
        Args:
            channels, patch_size: of the embedding.
            sigma, impl, window: see :func:`local_aggregation`, which also says what is raised.
        """
        super().__init__()
        _check(sigma, impl, window)
        self.embedding = ShallowEmbedding(channels, patch_size)
        self.sigma, self.impl, self.window = sigma, impl, window

    @property
    def radius(self) -> float:
        """Distance in grid cells beyond which positions are left out; infinite for all but ``"window"``."""
        return self.window * self.sigma if self.impl == "window" else math.inf

    def forward(self, logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) logits, (N, D, h', w') features of :attr:`embedding` -> (N, C, h, w) aggregated logits."""
        return local_aggregation(logits, features, self.sigma, self.impl, self.window)


def aggregation_weights(
    features: torch.Tensor, sigma: float, positions: torch.Tensor, radius: float = math.inf
) -> torch.Tensor:
    """The weights with which some positions average the logits, for pictures; without gradient.

    Args:
        features: (D, h, w) of one image.
        sigma: see :func:`local_aggregation`.
        positions: (M,) indices b into the h w positions.
        radius: distance in grid cells beyond which positions are left out; that of ``"window"`` is window * sigma.

    Returns:
        (M, h w) float64: A_ab D_ab / (sum_a A_ab D_ab + 1e-7), the weight of each a in out_b.
    """
    height, width = features.shape[-2:]
    flat = features.detach().double().flatten(1)  # (D, h w)
    scores = flat[:, positions].T @ flat
    place = torch.arange(height * width, device=flat.device)
    y, x = place // width, place % width
    squared = (y - y[positions, None]) ** 2 + (x - x[positions, None]) ** 2
    similarity = torch.softmax(scores.masked_fill(squared > radius**2, -math.inf), dim=-1)
    weight = similarity * torch.exp(squared / (-2 * sigma**2))
    return weight / (weight.sum(dim=-1, keepdim=True) + EPSILON)


# Grids up to this many positions have tables too small for tiles to pay (measured on a CPU).
DENSE_POSITIONS = 1000
# A float32 dot product of squared norm g is off by about g * 2^-23; beyond this g that is more than 1e-4.
FLOAT32_SQUARED_NORM = 1024.0
# A position whose features are this many times the mean in squared length can take all weight everywhere. The gradient
# of the features then all but vanishes, and what float32 loses in s_a - out_b shows, times the length.
FLOAT32_SQUARED_NORM_RATIO = 16.0


def _auto(logits: torch.Tensor, features: torch.Tensor, sigma: float, window: float) -> torch.Tensor:
    dtype = logits.dtype
    squared_norm = features.detach().square().sum(dim=1).flatten(1)
    bound = (FLOAT32_SQUARED_NORM_RATIO * squared_norm.mean(dim=1)).clamp(max=FLOAT32_SQUARED_NORM)
    if (squared_norm.amax(dim=1) > bound).any():
        logits, features = logits.double(), features.double()
    impl = _dense if logits.shape[-2] * logits.shape[-1] <= DENSE_POSITIONS else _tiled
    return impl(logits, features, sigma, window).to(dtype)


def _dense(logits: torch.Tensor, features: torch.Tensor, sigma: float, window: float) -> torch.Tensor:
    height, width = logits.shape[-2:]
    values = logits.flatten(2).transpose(1, 2)  # (N, h w, C)
    features = features.flatten(2)
    similarity = torch.softmax(features.transpose(1, 2) @ features, dim=-1)  # (N, b, a)
    weight = similarity * _decay(height, width, sigma, logits)
    out = weight @ values / (weight.sum(dim=-1, keepdim=True) + EPSILON)
    return out.transpose(1, 2).reshape(logits.shape)


def _decay(height: int, width: int, sigma: float, like: torch.Tensor) -> torch.Tensor:
    """exp(-|a - b|^2 / (2 sigma^2)), (h w, h w), as the product of its vertical and its horizontal part."""
    y = torch.arange(height, device=like.device, dtype=like.dtype)
    x = torch.arange(width, device=like.device, dtype=like.dtype)
    vertical = torch.exp(-((y[:, None] - y) ** 2) / (2 * sigma**2))
    horizontal = torch.exp(-((x[:, None] - x) ** 2) / (2 * sigma**2))
    table = vertical[:, None, :, None] * horizontal[None, :, None, :]
    return table.reshape(height * width, height * width)


def _sdpa(logits: torch.Tensor, features: torch.Tensor, sigma: float, window: float) -> torch.Tensor:
    """-|a - b|^2 / (2 sigma^2) = a . b / sigma^2 - |a|^2 / (2 sigma^2) + (a term in b that the softmax drops)."""
    height, width = logits.shape[-2:]
    # Centred, so that the products stay small beside the float32 precision of the sum.
    y = torch.arange(height, device=logits.device, dtype=logits.dtype) - (height - 1) / 2
    x = torch.arange(width, device=logits.device, dtype=logits.dtype) - (width - 1) / 2
    position = torch.cartesian_prod(y, x).expand(len(logits), -1, -1) / sigma
    features = features.flatten(2).transpose(1, 2)
    squared = position.square().sum(dim=-1, keepdim=True) / -2
    query = torch.cat([features, position, torch.ones_like(squared)], dim=-1)
    key = torch.cat([features, position, squared], dim=-1)
    # The fused kernels want a multiple of 8 channels, and values as wide as the keys.
    value = logits.flatten(2).transpose(1, 2)
    channels = -(-max(key.shape[-1], value.shape[-1]) // 8) * 8
    query, key, padded = (F.pad(x, (0, channels - x.shape[-1]))[:, None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, padded, scale=1.0)[:, 0, :, : value.shape[-1]]
    return out.transpose(1, 2).reshape(logits.shape)


# --- tiles ---------------------------------------------------------------------------------------------------------
#
# The grid is cut into square blocks; a tile is the table of a pair of blocks. Since g is symmetric a tile holds
# the scores of both blocks' queries, and half of the tiles suffice. The exponentials are taken in base 2, of features
# scaled by sqrt(log2 e): torch.exp of float32 is 20 times slower on a CPU where it underflows, which here is most of
# the table.

BLOCK = 16  # side of a block in grid cells on a CPU, where tiles fit the cache
BLOCK_CUDA = 32  # fewer and larger launches
CHUNK_SCORES = 1 << 19  # scores worked on at a time on a CPU: 2 MB in float32
CHUNK_SCORES_CUDA = 1 << 22  # of the size of a large GPU's cache
SQRT_LOG2E = math.sqrt(math.log2(math.e))
# Weights and decays up to 2^-62 (float32) count for nothing beside EPSILON times the greatest weight, 1: they are set
# to 0. Products of two others are then normal numbers. With subnormal ones, below 2^-126, a matrix product takes ten
# times as long on CPUs of Intel.
LOWEST_EXPONENT = {torch.float32: -62.0, torch.float64: -500.0}
# Share of the greatest weight on other positions that the gradient of a query may leave out.
NEGLIGIBLE = 1e-5


class _Grid:
    """A (height, width) grid cut into blocks of block x block positions, padded to whole blocks.

    Args:
        like: (N, K, height, width), of the dtype and on the device of the tables.
        sigma: see :func:`local_aggregation`.
        radius: distance in grid cells beyond which positions are left out.
    """

    def __init__(self, like: torch.Tensor, sigma: float, radius: float):
        self.height, self.width = like.shape[-2:]
        self.block = BLOCK_CUDA if like.is_cuda else BLOCK
        self.rows, self.columns = -(-self.height // self.block), -(-self.width // self.block)
        self.sigma, self.radius = sigma, radius
        self.like = like.new_empty(0)
        self.inside = self.split(torch.ones_like(like[:, :1]))  # 0 in the padding
        scores = CHUNK_SCORES_CUDA if like.is_cuda else CHUNK_SCORES
        self.chunk = max(1, scores // (len(like) * self.block**4))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(N, K, height, width) -> (blocks, N, block^2, K), zero in the padding."""
        x = F.pad(x, (0, self.columns * self.block - self.width, 0, self.rows * self.block - self.height))
        x = x.view(*x.shape[:2], self.rows, self.block, self.columns, self.block)
        return x.permute(2, 4, 0, 3, 5, 1).reshape(self.rows * self.columns, len(x), self.block**2, -1)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """(blocks, N, block^2, K) -> (N, K, height, width), the inverse of :meth:`split`."""
        x = x.view(self.rows, self.columns, x.shape[1], self.block, self.block, -1).permute(2, 5, 0, 3, 1, 4)
        x = x.reshape(*x.shape[:2], self.rows * self.block, self.columns * self.block)
        return x[..., : self.height, : self.width]

    def offsets(self) -> list[tuple[int, int]]:
        """Offsets (down, right) of pairs of blocks within reach, each pair of blocks at one of them; (0, 0) first."""
        offsets = [
            (down, right)
            for down in range(self.rows)
            for right in range(1 - self.columns if down else 0, self.columns)
            if self._gap(down) ** 2 + self._gap(right) ** 2 <= self.radius**2
        ]
        return sorted(offsets, key=lambda offset: offset[0] ** 2 + offset[1] ** 2)

    def _gap(self, blocks: int) -> int:
        return max(0, (abs(blocks) - 1) * self.block + 1)

    def pairs(self, down: int, right: int, keep: torch.Tensor | None = None) -> list[tuple]:
        """The pairs of blocks at an offset, in chunks; with ``keep``, (blocks,) bool on the CPU, those whose first
        block is kept.

        Each is the indices of the first blocks and of the second: slices on a CPU, where they save copies, tensors
        elsewhere, where they save launches. No block occurs twice on the same side of a chunk.
        """
        first = torch.arange(self.rows * self.columns).view(self.rows, self.columns)
        first = first[: self.rows - down, max(0, -right) : self.columns - max(0, right)].flatten()
        if keep is not None:
            first = first[keep[first]]
        if not len(first):
            return []
        shift = down * self.columns + right
        if self.like.device.type != "cpu":
            return [(i, i + shift) for i in first.to(self.like.device).split(self.chunk)]
        chunks: list[list[int]] = []
        for block in first.tolist():
            if chunks and block == chunks[-1][1] and block - chunks[-1][0] < self.chunk:
                chunks[-1][1] += 1
            else:
                chunks.append([block, block + 1])
        return [(slice(start, stop), slice(start + shift, stop + shift)) for start, stop in chunks]

    def decay(self, down: int, right: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The distance term (block^2, block^2) of two blocks, 0 beyond the radius; and 1 within, 0 beyond (None: all
        within)."""
        steps = torch.arange(self.block, device=self.like.device, dtype=self.like.dtype)
        y = (steps + down * self.block - steps[:, None]) ** 2
        x = (steps + right * self.block - steps[:, None]) ** 2
        distance = (y[:, None, :, None] + x[None, :, None, :]).reshape(self.block**2, self.block**2)
        decay = torch.exp2(distance * (-math.log2(math.e) / (2 * self.sigma**2)))
        _drop_negligible(decay)
        farthest = ((abs(down) + 1) * self.block - 1) ** 2 + ((abs(right) + 1) * self.block - 1) ** 2
        if farthest <= self.radius**2:
            return decay, None
        within = (distance <= self.radius**2).to(decay.dtype)
        return decay * within, within


def _scores(queries: torch.Tensor, keys: torch.Tensor, within: torch.Tensor | None) -> torch.Tensor:
    """Products of two blocks' features, least beyond the radius: those there must not set the scale."""
    scores = queries @ keys.transpose(-2, -1)
    return scores if within is None else scores.masked_fill_(within == 0, torch.finfo(scores.dtype).min)


def _exp2(scores: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    # Clamped first: exp2 is slow where it underflows.
    return _drop_negligible(torch.sub(scores, top[..., None]).clamp_(min=LOWEST_EXPONENT[scores.dtype]).exp2_())


def _drop_negligible(weight: torch.Tensor) -> torch.Tensor:
    """Set to 0 in place what is not above 2^LOWEST_EXPONENT."""
    return torch.threshold_(weight, 2.0 ** LOWEST_EXPONENT[weight.dtype], 0.0)


class _TiledAggregation(torch.autograd.Function):
    """(N, C, h, w), (N, D, h, w) -> (N, C, h, w)."""

    @staticmethod
    def forward(ctx, logits, features, sigma, radius):
        grid = _Grid(logits, sigma, radius)
        values = torch.cat([grid.split(logits), grid.inside], dim=-1)
        keys = grid.split(features * SQRT_LOG2E)
        # Over all keys but the query itself, per query and in units of 2^top: sum of s A D (C numbers), of A D, of A.
        sums = values.new_zeros(*values.shape[:3], values.shape[3] + 1)
        top = values.new_full(values.shape[:3], -math.inf)
        own = torch.empty_like(top)  # g_bb
        # By offset and first block: the greatest share of its weights that a query of either block has in the tile.
        shares = values.new_zeros(len(grid.offsets()), *keys.shape[:2])

        def add(queries, others, scores, decay, within, diagonal=False):
            tile_top = scores.amax(dim=-1)
            weight = _exp2(scores, tile_top)
            if within is not None:
                weight.mul_(within)
            if diagonal:
                weight.diagonal(dim1=-2, dim2=-1).zero_()
            total = weight @ grid.inside[others]
            near = _drop_negligible(weight.mul_(decay))
            part = torch.cat([near @ values[others], total], dim=-1)
            new_top = torch.maximum(top[queries], tile_top)
            part *= torch.exp2(tile_top - new_top)[..., None]
            merged = sums[queries] * torch.exp2(top[queries] - new_top)[..., None] + part
            sums[queries], top[queries] = merged, new_top
            # Sums only grow, so the final share is no greater.
            so_far = merged[..., -2] + EPSILON * merged[..., -1] + torch.exp2(own[queries] - new_top)
            share = (part[..., -2] + EPSILON * part[..., -1]) / so_far
            return (share * grid.inside[queries][..., 0]).amax(dim=-1)

        for offset, share in zip(grid.offsets(), shares, strict=True):
            decay, within = grid.decay(*offset)
            for i, j in grid.pairs(*offset):
                scores = _scores(keys[i], keys[j], within)
                if offset == (0, 0):
                    own[i] = scores.diagonal(dim1=-2, dim2=-1)
                    share[i] = add(i, j, scores, decay, within, diagonal=True)
                else:
                    there = add(i, j, scores, decay, within)
                    back = add(j, i, scores.transpose(-2, -1), decay.T, None if within is None else within.T)
                    share[i] = torch.maximum(there, back)

        weight = torch.exp2(own - top)[..., None]
        s = values[..., :-1]
        numerator, near, total = sums.split([s.shape[-1], 1, 1], dim=-1)
        denominator = near + weight + EPSILON * (total + weight)
        out = (numerator + weight * s) / denominator
        # s - out and more, of which the gradient's g_bb consists, without the cancellation.
        own_gap = (s * (near + EPSILON * total) - (1 + EPSILON) * numerator) / denominator
        norm = top + torch.log2(denominator[..., 0])
        # The share of A D and of the 1e-7 from other positions. The latter acts on the gradient by way of the output,
        # whose scale is the sum of A D: the greatest weight that the gradient of any query sees.
        near, far = grid.inside * near / denominator, grid.inside * EPSILON * total / denominator
        greatest = (near + far * (near + weight / denominator)).amax(dim=(0, 2, 3))
        shares, far = shares / greatest, far.amax(dim=(0, 2, 3)) / greatest
        ctx.save_for_backward(logits, features, out, own_gap, norm, shares, far)
        ctx.sigma, ctx.radius = sigma, radius
        return grid.join(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, features, out, own_gap, norm, shares, far = ctx.saved_tensors
        grid = _Grid(logits, ctx.sigma, ctx.radius)
        values = torch.cat([grid.split(logits), grid.inside], dim=-1)
        keys = grid.split(features * SQRT_LOG2E)
        keep = (shares > NEGLIGIBLE / len(keys)).any(dim=-1).cpu()
        keep[0] = True
        epsilon = EPSILON if (far > NEGLIGIBLE).any() else 0.0
        grad = grid.split(grad)
        mean = (grad * out).sum(dim=-1, keepdim=True)
        slope = torch.cat([grad, -mean], dim=-1)  # times values: grad . (s_a - out_b)
        grad_values = torch.zeros_like(grad)
        grad_keys = torch.zeros_like(keys)

        def differentiate(queries, others, scores, decay, within):
            weight = _exp2(scores, norm[queries])
            if within is not None:
                weight.mul_(within)
            score_grad = slope[queries] @ values[others].transpose(-2, -1)
            if epsilon:
                score_grad.mul_(decay).sub_(epsilon * mean[queries]).mul_(weight)
                _drop_negligible(weight.mul_(decay))
            else:
                score_grad.mul_(_drop_negligible(weight.mul_(decay)))
            grad_values[others] += weight.transpose(-2, -1) @ grad[queries]
            return score_grad

        for offset, kept in zip(grid.offsets(), keep, strict=True):
            chunks = grid.pairs(*offset, kept)
            if not chunks:
                continue
            decay, within = grid.decay(*offset)
            for i, j in chunks:
                scores = _scores(keys[i], keys[j], within)
                score_grad = differentiate(i, j, scores, decay, within)
                if offset == (0, 0):
                    own = torch.exp2(scores.diagonal(dim1=-2, dim2=-1) - norm[i]) * (grad[i] * own_gap[i]).sum(dim=-1)
                    score_grad.diagonal(dim1=-2, dim2=-1).copy_(own)
                    grad_keys[i] += (score_grad + score_grad.transpose(-2, -1)) @ keys[i]
                else:
                    transposed = scores.transpose(-2, -1), decay.T, None if within is None else within.T
                    score_grad += differentiate(j, i, *transposed).transpose(-2, -1)
                    grad_keys[i] += score_grad @ keys[j]
                    grad_keys[j] += score_grad.transpose(-2, -1) @ keys[i]
        return grid.join(grad_values), grid.join(grad_keys) / SQRT_LOG2E, None, None


def _tiled(logits: torch.Tensor, features: torch.Tensor, sigma: float, window: float) -> torch.Tensor:
    return _TiledAggregation.apply(logits, features, sigma, math.inf)


def _window(logits: torch.Tensor, features: torch.Tensor, sigma: float, window: float) -> torch.Tensor:
    return _TiledAggregation.apply(logits, features, sigma, window * sigma)


IMPLEMENTATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]] = {
    "auto": _auto,
    "dense": _dense,
    "tiled": _tiled,
    "sdpa": _sdpa,
    "window": _window,
}
