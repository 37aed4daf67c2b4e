"""Modularization methods behind one interface: ways to get one module per class out of a network.

MODA            activations of a class alike and few, those of others different (arXiv 2411.01074)
MwT             gates of a class alike, those of others different (arXiv 2306.09376)
NeMo            gates on convolutions or a Transformer's linear layers, with a contrastive loss
GradSplitter    masks and heads learnt over a trained, frozen network (arXiv 2311.04438)
CNNSplitter     a genetic search over a trained, frozen network (arXiv 2209.06116)

modularize      network, method and data -> modules
union_module    the network of several classes' modules, with a head to be fine-tuned
HeadedModule    a module of some classes with a head of its own; CutTransformer, of a vision transformer
fine_tune       trains a module on its classes, as MwT and NeMo do
Method          the interface, for a method of your own
"""

from moda.methods.base import EpochSummary, Method, Phase, Prepared
from moda.methods.cnnsplitter import CNNSplitter
from moda.methods.finetune import FineTuning, HeadedModule, fine_tune
from moda.methods.gradsplitter import GradSplitter
from moda.methods.moda import MODA
from moda.methods.mwt import MwT
from moda.methods.nemo import NeMo
from moda.methods.running import Modularized, modularize
from moda.methods.transformers import CutTransformer
from moda.methods.union import union_module

__all__ = [
    "MODA",
    "CNNSplitter",
    "CutTransformer",
    "EpochSummary",
    "FineTuning",
    "GradSplitter",
    "HeadedModule",
    "Method",
    "Modularized",
    "MwT",
    "NeMo",
    "Phase",
    "Prepared",
    "fine_tune",
    "modularize",
    "union_module",
]
