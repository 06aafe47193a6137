"""Federated data sets, their readers and client samplers."""

from fedexp.data.batching import ClientBatching as ClientBatching
from fedexp.data.dataset import Batch as Batch
from fedexp.data.dataset import FederatedDataset as FederatedDataset
from fedexp.data.dataset import FederatedSplits as FederatedSplits
from fedexp.data.emnist import emnist as emnist
from fedexp.data.glyphs import glyphs as glyphs
from fedexp.data.samplers import Sampler as Sampler
from fedexp.data.samplers import fixed as fixed
from fedexp.data.samplers import poisson as poisson
from fedexp.data.samplers import uniform as uniform
