"""Flax (linen) modules, with nothing federated in them."""

from fedexp.models.celeba import CelebaCNN as CelebaCNN
from fedexp.models.emnist import EmnistAutoencoder as EmnistAutoencoder
from fedexp.models.emnist import EmnistCNN as EmnistCNN
from fedexp.models.emnist import EmnistDense as EmnistDense
from fedexp.models.emnist import EmnistLogistic as EmnistLogistic
from fedexp.models.language import LSTMLanguageModel as LSTMLanguageModel
from fedexp.models.language import TransformerLanguageModel as TransformerLanguageModel
from fedexp.models.layers import Conv as Conv
from fedexp.models.layers import Dropout as Dropout
from fedexp.models.layers import max_pool_2x2 as max_pool_2x2
from fedexp.models.resnet import ResNet18BatchNorm as ResNet18BatchNorm
from fedexp.models.resnet import ResNet18GroupNorm as ResNet18GroupNorm
from fedexp.models.tabular import BinaryLogistic as BinaryLogistic
from fedexp.models.tabular import DenseClassifier as DenseClassifier
from fedexp.models.tags import TagLogistic as TagLogistic
from fedexp.models.text import LSTMClassifier as LSTMClassifier
from fedexp.models.text import word_vectors as word_vectors
