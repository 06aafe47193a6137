"""Federated data sets, their readers and client samplers."""

from fedexp.data.arrow import parquet as parquet
from fedexp.data.attackers import flipped_labels as flipped_labels
from fedexp.data.batching import ClientBatching as ClientBatching
from fedexp.data.cifar100 import cifar100 as cifar100
from fedexp.data.clock import Clock as Clock
from fedexp.data.clock import Distribution as Distribution
from fedexp.data.converts import image_files as image_files
from fedexp.data.converts import label_ids as label_ids
from fedexp.data.cornell import cornell_movie_dialogs as cornell_movie_dialogs
from fedexp.data.csv_files import csv as csv
from fedexp.data.dataset import Batch as Batch
from fedexp.data.dataset import FederatedDataset as FederatedDataset
from fedexp.data.dataset import FederatedSplits as FederatedSplits
from fedexp.data.emnist import emnist as emnist
from fedexp.data.glyphs import glyphs as glyphs
from fedexp.data.huggingface import huggingface as huggingface
from fedexp.data.leaf import leaf as leaf
from fedexp.data.noise import noisy_features as noisy_features
from fedexp.data.partition import arrays as arrays
from fedexp.data.partition import by_client as by_client
from fedexp.data.partition import dirichlet as dirichlet
from fedexp.data.partition import from_arrays as from_arrays
from fedexp.data.partition import iid as iid
from fedexp.data.partition import label_dirichlet as label_dirichlet
from fedexp.data.partition import pachinko as pachinko
from fedexp.data.partition import power_law as power_law
from fedexp.data.partition import quantiles as quantiles
from fedexp.data.partition import shards as shards
from fedexp.data.reddit import reddit as reddit
from fedexp.data.samplers import SECONDS as SECONDS
from fedexp.data.samplers import Sample as Sample
from fedexp.data.samplers import Sampler as Sampler
from fedexp.data.samplers import cyclic as cyclic
from fedexp.data.samplers import fixed as fixed
from fedexp.data.samplers import hold_out as hold_out
from fedexp.data.samplers import poisson as poisson
from fedexp.data.samplers import uniform as uniform
from fedexp.data.shakespeare import shakespeare as shakespeare
from fedexp.data.simulation import asynchronous as asynchronous
from fedexp.data.simulation import synchronous as synchronous
from fedexp.data.sqlite import fedjax_sqlite as fedjax_sqlite
from fedexp.data.sqlite import tff_sqlite as tff_sqlite
from fedexp.data.stackoverflow import stackoverflow_nwp as stackoverflow_nwp
from fedexp.data.stackoverflow import stackoverflow_tags as stackoverflow_tags
from fedexp.data.stackoverflow_synthetic import (
    stackoverflow_synthetic as stackoverflow_synthetic,
)
from fedexp.data.standardizing import standardized_features as standardized_features
from fedexp.data.synthetic import synthetic as synthetic
from fedexp.data.tfrecord import tfrecord as tfrecord
from fedexp.data.tfrecord import write_tfrecord as write_tfrecord
from fedexp.data.validation import split_validation as split_validation
from fedexp.data.words import word_ids as word_ids
