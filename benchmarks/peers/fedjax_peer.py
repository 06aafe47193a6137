"""FedJAX with its own models, its own algorithms and its jit backend."""

from __future__ import annotations

from typing import Any

import fedjax
import haiku
import jax
import jax.numpy as jnp
import numpy as np
from fedjax.algorithms import apfl, hyp_cluster
from protocol import Job, Trainee, serve

WINDOW = 10  # Rounds of agnostic averaging: a class that none of them meets weighs infinitely.


def build_model(job: Job) -> fedjax.Model:
    only_digits = job.num_classes == 10
    special_tokens = 4  # FedJAX adds padding, begin, end and out-of-vocabulary.
    if job.workload == "emnist_cnn":
        return fedjax.models.emnist.create_conv_model(only_digits)
    if job.workload == "emnist_logistic":
        return fedjax.models.emnist.create_logistic_model(only_digits)
    if job.workload == "stackoverflow_lstm":
        return fedjax.models.stackoverflow.create_lstm_model(
            job.num_classes - special_tokens, expected_length=13.3
        )
    # The same steps in a loop: the 80 unrolled ones compile for many minutes on a CPU.
    haiku.static_unroll = haiku.dynamic_unroll
    return fedjax.models.shakespeare.create_lstm_model(job.num_classes - special_tokens)


def client_dataset(job: Job, index: int) -> fedjax.ClientDataset:
    examples = job.client(index)
    if "tokens" in examples:
        tokens = examples["tokens"].astype(np.int32)
        return fedjax.ClientDataset({"x": tokens[:, :-1], "y": tokens[:, 1:]})
    labels = np.array(examples["y"])
    domains = {"domain_id": labels} if job.algorithm == "agnostic" else {}
    return fedjax.ClientDataset({"x": job.ink(index)[..., None], "y": labels, **domains})


def build_algorithm(job: Job, model: fedjax.Model, batching: Any) -> fedjax.FederatedAlgorithm:
    """FedJAX's own; its numbers are the same with all peers."""
    algorithms, whole = fedjax.algorithms, fedjax.PaddedBatchHParams(batch_size=128)
    losses, grad = fedjax.model_per_example_loss(model), fedjax.model_grad(model)
    client, server = fedjax.optimizers.sgd(job.learning_rate), fedjax.optimizers.sgd(1.0)
    base = fedjax.optimizers.sgd(job.learning_rate / 10, momentum=0.9)
    equal = np.full(job.num_classes, 1 / job.num_classes, np.float32)
    averaging = algorithms.fed_avg.federated_averaging
    agnostic = algorithms.agnostic_fed_avg.agnostic_federated_averaging
    mixtures = apfl.adaptive_personalized_federated_learning
    made = {
        "fedavg": lambda: averaging(grad, client, server, batching),
        "fedprox": lambda: algorithms.fed_prox.fed_prox(losses, client, server, batching, 0.1),
        "mime": lambda: algorithms.mime.mime(losses, base, batching, whole, 1.0),
        "mimelite": lambda: algorithms.mime_lite.mime_lite(losses, base, batching, whole, 1.0),
        "agnostic": lambda: agnostic(
            losses, client, server, batching, whole, equal, 0.01, domain_window_size=WINDOW
        ),
        "hypcluster": lambda: hyp_cluster.hyp_cluster(losses, client, server, whole, batching),
        "apfl": lambda: mixtures(grad, client, server, batching, 0.5),
    }
    return made[job.algorithm]()


def keep_clip_as_it_was() -> None:
    """FedJAX's APFL calls `jnp.clip` by names of its arguments that JAX has no longer."""
    clip = jnp.clip

    def clip_as_before(x: Any, a_min: Any = None, a_max: Any = None, **kwargs: Any) -> Any:
        return clip(x, a_min, a_max, **kwargs)

    jnp.clip = clip_as_before


def set_up(job: Job) -> Trainee:
    fedjax.set_for_each_client_backend("jit")
    model = build_model(job)
    key = jax.random.PRNGKey(job.seed)
    params = model.init(key)
    if job.workload == "emnist_logistic":
        params = jax.tree_util.tree_map(jnp.zeros_like, params)
    batching = fedjax.ShuffleRepeatBatchHParams(batch_size=job.batch_size, skip_shuffle=True)
    if job.algorithm == "apfl":
        keep_clip_as_it_was()
    algorithm = build_algorithm(job, model, batching)
    clusters = job.algorithm == "hypcluster"
    state = algorithm.init(hyp_cluster.random_init(2, model.init, key) if clusters else params)
    members = sorted({client for cohort in job.cohorts for client in cohort})
    datasets = {client: client_dataset(job, client) for client in members}
    trained = {
        client: sum(len(batch["y"]) for batch in dataset.shuffle_repeat_batch(batching))
        for client, dataset in datasets.items()
    }

    def train(rounds: range) -> int:
        nonlocal state
        for round_ in rounds:
            cohort = job.cohorts[round_]
            keys = jax.random.split(jax.random.PRNGKey(round_), len(cohort))
            clients = [
                (str(client).encode(), datasets[client], key)
                for client, key in zip(cohort, keys, strict=True)
            ]
            state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state)
        return sum(trained[client] for round_ in rounds for client in job.cohorts[round_])

    def norm() -> float:
        return float(
            fedjax.tree_util.tree_l2_norm(state.cluster_params[0] if clusters else state.params)
        )

    notes = ["fills a client's last batch with its first examples again"]
    if job.workload == "shakespeare_lstm":
        notes.append("its recurrence in a loop; unrolled as it comes, it compiles for many minutes")
    if job.algorithm == "apfl":
        notes.append("jnp.clip made to take the arguments that its APFL calls it with")
    if not hasattr(jax, "device_put_replicated"):
        notes.append(
            f"jit backend only: its pmap backend fails on JAX {jax.__version__}, which has no "
            "jax.device_put_replicated any more"
        )
    num_parameters = sum(leaf.size for leaf in jax.tree_util.tree_leaves(params))
    return Trainee(
        num_parameters,
        str(jax.devices()[0]),
        train,
        norm,
        tuple(notes),
    )


if __name__ == "__main__":
    serve(set_up, ("fedjax", "jax", "jaxlib", "dm-haiku", "numpy"))
