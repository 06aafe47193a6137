"""Flax (linen) modules, with nothing federated in them."""

from fedexp.models.emnist import EmnistCNN as EmnistCNN
from fedexp.models.emnist import EmnistDense as EmnistDense
from fedexp.models.emnist import EmnistLogistic as EmnistLogistic
from fedexp.models.layers import Conv as Conv
from fedexp.models.layers import Dropout as Dropout
from fedexp.models.layers import max_pool_2x2 as max_pool_2x2
