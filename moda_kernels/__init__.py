"""Kernels and losses for modular training of neural networks (MODA, arXiv 2411.01074)."""

from moda_kernels import closed_form, distributed, native, reference
from moda_kernels._version import __version__
from moda_kernels.attribution import AttributionSums
from moda_kernels.backends import BackendUnavailableError, Status, backends
from moda_kernels.firing import FiringCounter
from moda_kernels.losses import ModularLoss, ModularLosses, modular_losses
from moda_kernels.means import class_means
from moda_kernels.norm import norm_relu_pool
from moda_kernels.pooling import pool, relu_pool
from moda_kernels.similarity import ClassSimilarity, class_similarity

__all__ = [
    "AttributionSums",
    "BackendUnavailableError",
    "ClassSimilarity",
    "FiringCounter",
    "ModularLoss",
    "ModularLosses",
    "Status",
    "__version__",
    "backends",
    "class_means",
    "class_similarity",
    "closed_form",
    "distributed",
    "modular_losses",
    "native",
    "norm_relu_pool",
    "pool",
    "reference",
    "relu_pool",
]
