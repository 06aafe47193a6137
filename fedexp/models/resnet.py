"""Residual networks with group and with batch normalisation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import gin
import jax
from flax import linen as nn

from fedexp.errors import UserError, check
from fedexp.models.layers import Conv

# As in the published code; Flax's defaults differ.
_GroupNorm = functools.partial(nn.GroupNorm, epsilon=1e-3)
_Conv = functools.partial(Conv, use_bias=False, kernel_init=nn.initializers.he_normal())


@gin.configurable
class ResNet18GroupNorm(nn.Module):
    """ResNet-18 with group instead of batch normalisation, for CIFAR-100 (Reddi et al. 2021).

    11 227 812 parameters for 100 classes. As in the code behind the published results, blocks are
    pre-activated (He et al. 2016, arXiv:1603.05027), each normalisation has two groups (Hsieh et al.
    2020, arXiv:1910.00189), and only the stem reduces the resolution: 24 x 24 images are 6 x 6 in
    every stage, 0.64 GFLOP an example forward. `strides=(1, 2, 2, 2)` halves it at each later stage as
    He et al. do, for a twentieth of the operations and as many parameters. The L2 penalty of that
    code, 1e-4, which TensorFlow Federated ignored when it was published, is left out.

    Attributes:
      num_classes: number of logits.
      stages: residual blocks per stage.
      strides: of the first block of each stage.
      width: channels of the stem and the first stage; every later stage has twice as many.
      groups: groups per normalisation.
    """

    num_classes: int = 100
    stages: Sequence[int] = (2, 2, 2, 2)
    strides: Sequence[int] = (1, 1, 1, 1)
    width: int = 64
    groups: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float images (B, H, W, C) to logits (B, num_classes).

        Raises:
          UserError: not one stride per stage.
        """
        _check_strides("ResNet18GroupNorm", self.stages, self.strides)
        x = nn.relu(_GroupNorm(self.groups)(_Conv(self.width, (7, 7), 2)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, (blocks, stride) in enumerate(zip(self.stages, self.strides, strict=True)):
            for block in range(blocks):
                x = ResidualBlock(
                    features=self.width * 2**stage,
                    stride=1 if block else stride,
                    groups=self.groups,
                    activate=bool(stage or block),
                )(x)
        x = nn.relu(_GroupNorm(self.groups)(x)).mean((1, 2))
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))(x)


class ResidualBlock(nn.Module):
    """Twice normalisation, ReLU and convolution, added to the input.

    Attributes:
      features: channels of the output; the input is projected where its shape differs.
      stride: of the first convolution.
      groups: groups per normalisation.
      activate: whether the first convolution's input is still to be normalised and rectified.
    """

    features: int
    stride: int = 1
    groups: int = 2
    activate: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), features)."""
        y = nn.relu(_GroupNorm(self.groups)(x)) if self.activate else x
        y = _Conv(self.features, (3, 3), self.stride)(y)
        y = nn.relu(_GroupNorm(self.groups)(y))
        y = _Conv(self.features, (3, 3))(y)
        if x.shape != y.shape:
            x = _GroupNorm(self.groups)(_Conv(self.features, (1, 1), self.stride)(x))
        return x + y


@gin.configurable
class ResNet18BatchNorm(nn.Module):
    """ResNet-18 with batch normalisation (He et al. 2016, arXiv:1512.03385) for images of CIFAR's size.

    11 220 132 parameters for 100 classes, 11 173 962 for 10, and 9 600 running means and variances. A stem of
    3 x 3 without pooling takes the place of ImageNet's of 7 x 7. The statistics are averaged over clients as
    parameters are, stay with each client by `fedper.local = 'BatchNorm'` (FedBN), or remain as they are with
    `use_running_average`.

    Attributes:
      num_classes: number of logits.
      stages: residual blocks per stage.
      strides: of the first block of each stage.
      width: channels of the stem and the first stage; every later stage has twice as many.
      momentum: of the running statistics, what they keep in a step.
      use_running_average: whether training, too, normalises with them and leaves them as they are.
    """

    num_classes: int = 100
    stages: Sequence[int] = (2, 2, 2, 2)
    strides: Sequence[int] = (1, 2, 2, 2)
    width: int = 64
    momentum: float = 0.9
    use_running_average: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, mask: jax.Array | None = None
    ) -> jax.Array:
        """Maps float images (B, H, W, C) to logits (B, num_classes).

        Args:
          x: the images.
          train: whether to normalise with the batch's statistics.
          mask: (B,) bool, the images that count in these; all if None.

        Raises:
          UserError: not one stride per stage, or a momentum outside [0, 1].
        """
        _check_strides("ResNet18BatchNorm", self.stages, self.strides)
        check(
            0 <= self.momentum <= 1,
            f"ResNet18BatchNorm.momentum must be in [0, 1], got {self.momentum}",
        )
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=self.use_running_average or not train,
            momentum=self.momentum,
            epsilon=1e-5,
        )
        mask = None if mask is None else mask[:, None, None, None]
        x = nn.relu(norm()(_Conv(self.width, (3, 3))(x), mask=mask))
        for stage, (blocks, stride) in enumerate(zip(self.stages, self.strides, strict=True)):
            for block in range(blocks):
                x = BasicBlock(self.width * 2**stage, norm, 1 if block else stride)(x, mask)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))(x)


class BasicBlock(nn.Module):
    """Twice convolution and normalisation, a ReLU between them, and another after the input is added.

    Attributes:
      features: channels of the output; the input is projected where its shape differs.
      norm: makes a normalisation.
      stride: of the first convolution.
    """

    features: int
    norm: Callable[[], nn.Module]
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), features); `mask` is (B, 1, 1, 1)."""
        y = nn.relu(self.norm()(_Conv(self.features, (3, 3), self.stride)(x), mask=mask))
        y = self.norm()(_Conv(self.features, (3, 3))(y), mask=mask)
        if x.shape != y.shape:
            x = self.norm()(_Conv(self.features, (1, 1), self.stride)(x), mask=mask)
        return nn.relu(x + y)


def _check_strides(model: str, stages: Sequence[int], strides: Sequence[int]) -> None:
    if len(stages) != len(strides):
        raise UserError(
            f"{model}.strides needs one number for each of the {len(stages)} stages, got {strides}"
        )
