"""Federated Shakespeare: the lines of the plays, partitioned by the role that speaks them."""

from __future__ import annotations

import gin
import numpy as np

from fedexp.data import tff_hdf5
from fedexp.data.dataset import FederatedDataset, FederatedSplits
from fedexp.data.features import Feature
from fedexp.errors import UserError

# The 86 characters in the order of TensorFlow Federated's text generation tutorial.
CHARACTERS = (
    b"dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquyAEIMQUY]!%)-159\r"
)
PAD = 0
OOV, BOS, EOS = (len(CHARACTERS) + i for i in (1, 2, 3))

# As published in TensorFlow Federated's simulation/datasets/shakespeare.py.
_SHA256 = "0285be9906cb5f268092eee4edeeacfc2af4574f2941f7cc2f08a321d7f5c707"


@gin.configurable
def shakespeare(
    data_dir: str | None = None, sequence_length: int = 80, drop_empty: bool = False
) -> FederatedSplits:
    """Next-character prediction on Shakespeare's plays (McMahan et al. 2017, arXiv:1602.05629).

    Every speaking role of every play is a client in both partitions, as TensorFlow Federated
    publishes them: 715 clients, 16,068 training and 2,356 test snippets. A snippet is what the role
    says at a stretch. It becomes BOS, its bytes, EOS, cut into pieces of sequence_length + 1 that do
    not overlap, the last one padded. This is the preprocessing of Reddi et al. (2021); FedJAX joins a
    client's snippets, and lets the pieces share one token so that none is lost as a target.

    Feature: `tokens` (sequence_length + 1,) uint8; the input is all but the last, the target all but
    the first. Ids as in Reddi et al.: 0 is padding, 1 to 86 the characters, 87 any other byte (OOV),
    88 the beginning (BOS) and 89 the end of a snippet (EOS), 90 ids in all. FedJAX has them at 0,
    3 to 88, 89, 1 and 2.

    The first call packs the files into the cache; later ones memory-map the result.

    Args:
      data_dir: folder with shakespeare_train.h5 and shakespeare_test.h5; None downloads them.
      sequence_length: characters that the model sees at once.
      drop_empty: leave clients without snippets out instead of raising.

    Raises:
      UserError: the files are not there, cannot be downloaded, or are not Shakespeare; or a
        sequence_length below 1.
    """
    if not isinstance(sequence_length, int) or sequence_length < 1:
        raise UserError(
            "shakespeare.sequence_length must be a whole number above 0, got "
            f"{sequence_length!r}; published results use 80"
        )
    return tff_hdf5.load_splits(
        "shakespeare",
        {"snippets": Feature("snippets", (), object)},
        version=1,
        sha256=_SHA256,
        data_dir=data_dir,
        drop_empty=drop_empty,
        transform=lambda dataset: _to_sequences(dataset, sequence_length + 1),
        arguments={"sequence_length": sequence_length},
    )


def _to_sequences(dataset: FederatedDataset, length: int) -> FederatedDataset:
    """Turns the feature `snippets`, bytes, into `tokens` (length,); a snippet fills whole rows."""
    snippets = dataset.features["snippets"]
    sizes = np.array([len(snippet) for snippet in snippets])
    rows = -(-(sizes + 2) // length)
    first_row = np.concatenate([[0], np.cumsum(rows)])
    begin = first_row[:-1] * length

    text = np.frombuffer(b"".join(snippets), np.uint8)
    shift = begin + 1 - (np.cumsum(sizes) - sizes)
    tokens = np.full(first_row[-1] * length, PAD, np.uint8)
    tokens[np.arange(len(text)) + np.repeat(shift, sizes)] = _ids()[text]
    tokens[begin] = BOS
    tokens[begin + 1 + sizes] = EOS
    return FederatedDataset(
        {"tokens": tokens.reshape(-1, length)}, first_row[dataset.offsets], dataset.client_ids
    )


def _ids() -> np.ndarray:
    """The id of every byte, (256,) uint8."""
    ids = np.full(256, OOV, np.uint8)
    ids[list(CHARACTERS)] = np.arange(1, len(CHARACTERS) + 1)
    return ids
