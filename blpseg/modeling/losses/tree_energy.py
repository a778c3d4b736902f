"""Predictions against their means over minimum spanning trees of colours and of features."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable

from ..outputs import Outputs, Targets
from ..registry import keywords
from .loss import LOSS_REGISTRY, Loss
from .potts import colors_of, grid_of, ratio

if TYPE_CHECKING:  # scipy takes a while to load, which a training without this loss need not wait for
    from scipy import sparse


@LOSS_REGISTRY.register()
class TreeEnergy(Loss):
    """Distance of the predictions from what trees make of them, where nothing is annotated::

        F(D, p)_i = sum_j exp(-D_ij) p_j / sum_j exp(-D_ij)
        loss = 1/|U| sum_{i in U} |p_i - F(D_features, F(D_colours / sigma, p))_i|_1

    D_ij is the length of the path from i to j in the minimum spanning tree of the 4-connected grid, whose edges are as
    long as the squared distance of the normalised colours, or of the decoder's features, at their ends. U are the
    unannotated pixels, each with the prediction of its grid cell. The mean is over images; padding takes no part.
    No gradient goes through the lengths, so the decoder's features are shaped by the predictions alone.

    Time is linear in the grid's cells but for the sorting of the edges: exp(-D) of a tree is the product of two
    triangular matrices with one entry a node beside the diagonal. Trees are made on the CPU. A customary weight is 0.4.

    Source: Liang et al., "Tree Energy Loss: Towards Sparsely Annotated Semantic Segmentation", CVPR 2022; sigma 0.002
    is one of the two values (0.02 is the other) that public implementations use.
    """

    @configurable
    def __init__(self, *, sigma: float):
        """
        Args:
            sigma: length that colours count in, of squared distances of normalised colours.
        """
        super().__init__()
        self.sigma = sigma

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return keywords(cfg.MODEL.BLPSEG.TREE_ENERGY)

    def forward(self, outputs: Outputs, targets: Targets, images: torch.Tensor) -> torch.Tensor:
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))
        p, grid = logits.softmax(dim=1), grid_of(logits)
        free = F.adaptive_avg_pool2d((targets.scribble == logits.shape[1]).to(p)[:, None], grid)[:, 0]
        colors, inside = colors_of(images.to(p), targets.scribble, grid)
        losses = []
        for i in range(len(p)):
            label = tree_filter(p[i], colors[i] / self.sigma**0.5, inside[i, 0] > 0)
            label = tree_filter(label, outputs.features[i], inside[i, 0] > 0)
            losses.append(ratio((free[i] * (p[i] - label).abs().sum(dim=0)).sum(), free[i].sum()))
        return torch.stack(losses).mean()


class _Tree(NamedTuple):
    """exp(-D) = inverse(I - W) diagonal(own) inverse(I - W)', with the nodes in an order in which parents come first.

    W has exp(-length) of the edge to its parent in a node's row; own is 1 - exp(-length)^2.
    """

    order: np.ndarray
    lower: sparse.csr_array  # I - W
    own: np.ndarray


def _tree(features: np.ndarray, inside: np.ndarray) -> _Tree:
    """Of the grid of (D, h, w) features; nodes outside share an edge with nobody."""
    from scipy import sparse
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

    height, width = inside.shape
    node = np.arange(height * width).reshape(height, width)
    first = np.concatenate([node[:, :-1].ravel(), node[:-1].ravel()])
    second = np.concatenate([node[:, 1:].ravel(), node[1:].ravel()])
    flat, within = features.reshape(len(features), -1).astype(np.float64), inside.ravel()
    length = np.square(flat[:, first] - flat[:, second]).sum(axis=0)
    # Edges to the outside come last and carry nothing. scipy takes a 0 for no edge, hence the 1.
    length = np.where(within[first] & within[second], length, np.inf)
    finite = np.where(np.isfinite(length), length, 2 * length[np.isfinite(length)].max(initial=0) + 1)
    graph = sparse.csr_array((1 + finite, (first, second)), shape=(node.size, node.size))
    order, parent = breadth_first_order(minimum_spanning_tree(graph), 0, directed=False)
    children = order[1:]
    parents = parent[children]
    gap = np.square(flat[:, children] - flat[:, parents]).sum(axis=0)
    weight = np.where(within[children] & within[parents], np.exp(-gap), 0.0)
    position = np.empty(node.size, np.int64)
    position[order] = np.arange(node.size)
    edges = sparse.csr_array((weight, (position[children], position[parents])), shape=(node.size, node.size))
    own = np.concatenate([[1.0], 1 - weight**2])
    return _Tree(order, sparse.csr_array(sparse.eye_array(node.size) - edges), own)


def _apply(tree: _Tree, values: np.ndarray) -> np.ndarray:
    """exp(-D) times (nodes, K) values."""
    from scipy.sparse.linalg import spsolve_triangular

    upper = tree.lower.T.tocsr()
    up = spsolve_triangular(upper, values[tree.order], lower=False, unit_diagonal=True)  # leaves to root
    down = spsolve_triangular(tree.lower, tree.own[:, None] * up, lower=True, unit_diagonal=True)
    out = np.empty_like(down)
    out[tree.order] = down
    return out


class _TreeFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, maps, features, inside):
        ctx.tree = _tree(features.cpu().double().numpy(), inside.cpu().numpy())
        values = maps.detach().flatten(1).T.cpu().double().numpy()
        sums = _apply(ctx.tree, np.column_stack([values, np.ones(len(values))]))
        ctx.total = sums[:, -1:]
        return torch.from_numpy((sums[:, :-1] / ctx.total).T.copy()).to(maps).view_as(maps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values = grad.flatten(1).T.cpu().double().numpy()
        back = _apply(ctx.tree, values / ctx.total)  # exp(-D) is symmetric
        return torch.from_numpy(back.T.copy()).to(grad).view_as(grad), None, None


def tree_filter(maps: torch.Tensor, features: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """F(D, maps) of :class:`TreeEnergy` on one grid, differentiable in ``maps``.

    Args:
        maps: (K, h, w).
        features: (D, h, w); an edge of the grid is as long as the squared distance of those at its ends.
        inside: (h, w) bool; other cells keep their values.
    """
    return _TreeFilter.apply(maps, features.detach(), inside)
