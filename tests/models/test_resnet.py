from __future__ import annotations

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedexp.errors import UserError
from fedexp.models import resnet
from fedexp.models.resnet import ResidualBlock, ResNet18BatchNorm, ResNet18GroupNorm


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
    with pytest.raises(UserError, match=r"ResNet18BatchNorm.strides needs one number for each"):
        shapes(ResNet18BatchNorm(strides=(1, 2)), 24, 24, 3)
    with pytest.raises(UserError, match=r"momentum must be in \[0, 1\], got 1.5"):
        shapes(ResNet18BatchNorm(momentum=1.5), 24, 24, 3)


@pytest.mark.parametrize(("num_classes", "published"), [(10, 11_173_962), (100, 11_220_132)])
def test_batch_normalised_parameters_are_as_many_as_published(num_classes, published):
    """11 173 962 as of ResNet18 in github.com/kuangliu/pytorch-cifar; the formula is of its code."""
    norms = [64]
    expected = 3 * 3 * 3 * 64
    channels = 64
    for features in (64, 128, 256, 512):
        for _ in range(2):
            expected += 9 * channels * features + 9 * features * features
            norms += [features, features]
            if channels != features:
                expected += channels * features
                norms.append(features)
            channels = features
    expected += 2 * sum(norms) + channels * num_classes + num_classes
    model = ResNet18BatchNorm(num_classes)
    found = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(p.size for p in jax.tree.leaves(found["params"])) == expected == published
    assert sum(p.size for p in jax.tree.leaves(found["batch_stats"])) == 2 * sum(norms) == 9600


@pytest.mark.parametrize("train", [False, True])
def test_the_batch_normalised_network_is_the_published_one(train):
    """With running statistics, and in training with those of the examples that count."""
    model = ResNet18BatchNorm(5, stages=(1, 2), strides=(1, 2), width=4, momentum=0.7)
    x, mask = normal(0, 6, 8, 8, 3), np.array([1, 1, 0, 1, 1, 0], bool)
    given = jax.eval_shape(model.init, jax.random.key(0), x)
    given = jax.tree.map(abs, noisy(given))

    @jax.jit
    def reference(y, p, old):
        new = {}

        def norm(y, path):
            layer, kept = p, old
            for name in path:
                layer, kept = layer[name], kept[name]
            real = y[mask]
            mean, var = real.mean((0, 1, 2)), real.var((0, 1, 2))
            new["/".join(path)] = 0.7 * kept["mean"] + 0.3 * mean, 0.7 * kept["var"] + 0.3 * var
            if not train:
                mean, var = kept["mean"], kept["var"]
            return (y - mean) / jnp.sqrt(var + 1e-5) * layer["scale"] + layer["bias"]

        def block(y, name, stride):
            q = p[name]
            z = jax.nn.relu(norm(convolution(y, q["Conv_0"], stride), (name, "BatchNorm_0")))
            z = norm(convolution(z, q["Conv_1"]), (name, "BatchNorm_1"))
            if "Conv_2" in q:
                y = norm(convolution(y, q["Conv_2"], stride), (name, "BatchNorm_2"))
            return jax.nn.relu(y + z)

        y = jax.nn.relu(norm(convolution(y, p["Conv_0"]), ("BatchNorm_0",)))
        y = block(y, "BasicBlock_0", 1)
        y = block(y, "BasicBlock_1", 2)
        y = block(y, "BasicBlock_2", 1)
        assert y.shape == (6, 4, 4, 8)
        return y.mean((1, 2)) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], new

    expected, new = reference(x, given["params"], given["batch_stats"])
    apply = jax.jit(lambda *args: model.apply(*args, train, mask, mutable=["batch_stats"]))
    found, changed = apply(given, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for path, statistics in new.items() if train else ():
        layer = changed["batch_stats"]
        for name in path.split("/"):
            layer = layer[name]
        np.testing.assert_allclose((layer["mean"], layer["var"]), statistics, rtol=1e-4, atol=1e-5)
    if not train:
        jax.tree.map(np.testing.assert_array_equal, changed["batch_stats"], given["batch_stats"])


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
