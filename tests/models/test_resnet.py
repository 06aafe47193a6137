from __future__ import annotations

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedexp.errors import UserError
from fedexp.models import resnet
from fedexp.models.resnet import ResidualBlock, ResNet18GroupNorm


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shapes(model, *image):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image)))["params"]


@pytest.mark.parametrize("num_classes", [100, 10])
def test_the_parameter_count_is_that_of_the_published_code(num_classes):
    """Counted from create_resnet18 in google-research/federated, utils/models/resnet_models.py."""
    norm = lambda channels: 2 * channels  # noqa: E731
    expected = 7 * 7 * 3 * 64 + norm(64)
    channels = 64
    for stage, features in enumerate((64, 128, 256, 512)):
        for block in range(2):
            expected += norm(channels) if stage or block else 0  # The stem's output is normalised.
            expected += 3 * 3 * channels * features + norm(features) + 3 * 3 * features * features
            expected += channels * features + norm(features) if channels != features else 0
            channels = features
    expected += norm(channels) + channels * num_classes + num_classes
    params = shapes(ResNet18GroupNorm(num_classes), 24, 24, 3)
    assert sum(p.size for p in jax.tree.leaves(params)) == expected
    assert num_classes != 100 or expected == 11_227_812


def group_norm(x, layer, groups=2, eps=1e-3):
    grouped = x.reshape(*x.shape[:3], groups, -1)
    axes = (1, 2, 4)
    x = (grouped - grouped.mean(axes, keepdims=True)) / jnp.sqrt(
        grouped.var(axes, keepdims=True) + eps
    )
    return x.reshape(*x.shape[:3], -1) * layer["scale"] + layer["bias"]


def convolution(x, layer, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=numbers
    )


def reference_block(x, p, stride, activate, project):
    """A pre-activated basic block, its shortcut normalised, as published."""
    norms, convs = iter(range(4)), iter(range(3))
    y = jax.nn.relu(group_norm(x, p[f"GroupNorm_{next(norms)}"])) if activate else x
    y = convolution(y, p[f"Conv_{next(convs)}"], stride)
    y = jax.nn.relu(group_norm(y, p[f"GroupNorm_{next(norms)}"]))
    y = convolution(y, p[f"Conv_{next(convs)}"])
    if project:
        x = convolution(x, p[f"Conv_{next(convs)}"], stride)
        x = group_norm(x, p[f"GroupNorm_{next(norms)}"])
    return x + y


def noisy(params):
    """Parameters of these shapes, all of them random."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), jnp.float32), params)


def test_the_network_is_the_published_one():
    """Layer by layer in lax and NumPy's terms: stem, pooling, blocks, last activation, classifier."""
    model = ResNet18GroupNorm(5, stages=(2, 1, 1), strides=(1, 1, 2), width=4)
    x = normal(0, 3, 12, 12, 3)
    p = noisy(shapes(model, 12, 12, 3))

    @jax.jit
    def reference(p):
        y = jax.nn.relu(group_norm(convolution(x, p["Conv_0"], 2), p["GroupNorm_0"]))
        padded = jnp.pad(y, ((0, 0), (0, 1), (0, 1), (0, 0)))
        y = jnp.stack([padded[:, i::2, j::2][:, :3, :3] for i in range(3) for j in range(3)])
        y = reference_block(y.max(0), p["ResidualBlock_0"], 1, activate=False, project=False)
        y = reference_block(y, p["ResidualBlock_1"], 1, activate=True, project=False)
        y = reference_block(y, p["ResidualBlock_2"], 1, activate=True, project=True)
        assert y.shape == (3, 3, 3, 8)
        y = reference_block(y, p["ResidualBlock_3"], 2, activate=True, project=True)
        assert y.shape == (3, 2, 2, 16)
        y = jax.nn.relu(group_norm(y, p["GroupNorm_1"])).mean((1, 2))
        return y @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]

    found = jax.jit(model.apply)({"params": p}, x)
    np.testing.assert_allclose(found, reference(p), rtol=1e-4, atol=1e-4)


def test_the_default_keeps_six_by_six_after_the_stem(monkeypatch):
    seen = []

    class Spy(ResidualBlock):
        def __call__(self, x):
            y = ResidualBlock.__call__(self, x)
            seen.append(y.shape[1:])
            return y

    monkeypatch.setattr(resnet, "ResidualBlock", Spy)
    shapes(ResNet18GroupNorm(), 24, 24, 3)
    assert seen == [(6, 6, c) for c in (64, 128, 256, 512) for _ in range(2)]


def test_the_start_is_he_normal_with_a_small_classifier():
    model = ResNet18GroupNorm(stages=(1,), strides=(1,), width=16)
    params = jax.jit(model.init)(jax.random.key(0), normal(0, 1, 8, 8, 3))["params"]
    kernel = np.asarray(params["ResidualBlock_0"]["Conv_1"]["kernel"])
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 16)), rel=0.06)
    assert np.asarray(params["Dense_0"]["kernel"]).std() == pytest.approx(0.01, rel=0.08)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key in ("scale", "bias"):
            assert (leaf == (path[-1].key == "scale")).all()


def test_every_stage_needs_a_stride():
    with pytest.raises(UserError, match=r"one number for each of the 4 stages, got \(1, 2\)"):
        shapes(ResNet18GroupNorm(strides=(1, 2)), 24, 24, 3)


def test_gin_sets_the_network():
    gin.clear_config()
    try:
        gin.parse_config(
            "ResNet18GroupNorm.num_classes = 7\nResNet18GroupNorm.strides = (1, 2, 2, 2)"
        )
        model = ResNet18GroupNorm()
        logits = jax.eval_shape(
            model.init_with_output, jax.random.key(0), jnp.zeros((2, 24, 24, 3))
        )[0]
        assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    finally:
        gin.clear_config()
