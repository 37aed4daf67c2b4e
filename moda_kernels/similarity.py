"""Similarity between classes: the mean cosine of their samples' pooled activations, from class sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moda_kernels import closed_form
from moda_kernels.backends import check_backend
from moda_kernels.means import summing_backend
from moda_kernels.pooling import pool
from moda_kernels.validation import check_batch, check_label_range, check_num_classes


class ClassSimilarity:
    """Mean cosine similarity between the samples of every two classes, over any number of batches.

    Per layer, entry (a, b) is the mean of n_i . n_j over samples i of class a and j of class b; on the diagonal over
    pairs i < j, so that no sample is compared with itself. From class sums s, sizes m and q = sum of |n_i|^2:

        s_a . s_b / (m_a m_b),    and    (|s_a|^2 - q_a) / (m_a (m_a - 1))    on the diagonal

    An entry without a pair is 0. Nothing of the size of the data is kept.

    Args:
        num_classes: K, at least 1.
        backend: see `moda_kernels.backends`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Examples:
        >>> similarity = ClassSimilarity(num_classes=2)
        >>> similarity.update([torch.tensor([[1.0, 0.0], [3.0, 0.0]])], torch.tensor([0, 0]))
        >>> similarity.update([torch.tensor([[0.0, 2.0]])], torch.tensor([1]))
        >>> similarity.result()[0].tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """

    def __init__(self, num_classes: int, *, backend: str = "auto") -> None:
        check_num_classes(num_classes)
        check_backend(backend)
        self.num_classes = num_classes
        self.backend = backend
        self._sums: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._sizes: Tensor | None = None

    @torch.no_grad()
    def update(self, activations: Sequence[Tensor], labels: Tensor) -> None:
        """Add one batch.

        Args:
            activations: one tensor per layer, (N, C) or (N, C, *spatial), floating point; the same layers every time.
            labels: (N,) int64 or int32, in [0, num_classes); read on the host to check this.

        Raises:
            TypeError, ValueError: an argument is not as above; nothing is added.
        """
        layers = check_batch(activations, labels)
        check_label_range(labels, self.num_classes)
        seen = [sums.shape[1] for sums in self._sums]
        if seen and seen != [layer.shape[1] for layer in layers]:
            raise ValueError(
                f"activations: expected layers of {seen} neurons as before, got {[layer.shape[1] for layer in layers]}"
            )
        pooled = pool(layers, backend=self.backend)
        index = labels.long()
        sums = summing_backend(self.backend, pooled, labels).class_sums(pooled, index, self.num_classes)
        squares = [self._per_class(closed_form.normalized_rows(rows).square().sum(1), index) for rows in pooled]
        sizes = self._per_class(torch.ones_like(index), index)
        if self._sizes is not None:
            sums = [old + new for old, new in zip(self._sums, sums, strict=True)]
            squares = [old + new for old, new in zip(self._squares, squares, strict=True)]
            sizes = self._sizes + sizes
        self._sums, self._squares, self._sizes = sums, squares, sizes

    def result(self) -> list[Tensor]:
        """One (K, K) symmetric tensor per layer, float64 for float64 layers and float32 otherwise.

        Raises:
            RuntimeError: no batch was added.
        """
        if self._sizes is None:
            raise RuntimeError("no batch was added: call update(activations, labels) first")
        pairs = torch.outer(self._sizes, self._sizes) - torch.diag(self._sizes)
        return [
            (sums @ sums.T - torch.diag(squares)) / pairs.clamp_min(1)
            for sums, squares in zip(self._sums, self._squares, strict=True)
        ]

    def _per_class(self, values: Tensor, index: Tensor) -> Tensor:
        return values.new_zeros(self.num_classes).index_add(0, index, values)


def class_similarity(
    activations: Sequence[Tensor], labels: Tensor, num_classes: int, *, backend: str = "auto"
) -> list[Tensor]:
    """`ClassSimilarity` of one batch: per layer the (K, K) mean cosine similarity between classes.

    Args:
        activations: one tensor per layer, (N, C) or (N, C, *spatial), floating point.
        labels: (N,) int64 or int32, in [0, num_classes); read on the host to check this.
        num_classes: K, at least 1.
        backend: see `moda_kernels.backends`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Examples:
        >>> layer = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> class_similarity([layer], torch.tensor([0, 0, 1]), num_classes=2)[0].tolist()
        [[0.0, 0.5], [0.5, 0.0]]
    """
    similarity = ClassSimilarity(num_classes, backend=backend)
    similarity.update(activations, labels)
    return similarity.result()
