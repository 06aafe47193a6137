"""FedJAX with its own models, its federated averaging and its jit backend."""

from __future__ import annotations

import fedjax
import haiku
import jax
import jax.numpy as jnp
import numpy as np
from protocol import Job, Trainee, serve


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
    return fedjax.ClientDataset({"x": job.ink(index)[..., None], "y": np.array(examples["y"])})


def set_up(job: Job) -> Trainee:
    fedjax.set_for_each_client_backend("jit")
    model = build_model(job)
    params = model.init(jax.random.PRNGKey(job.seed))
    if job.workload == "emnist_logistic":
        params = jax.tree_util.tree_map(jnp.zeros_like, params)
    batching = fedjax.ShuffleRepeatBatchHParams(batch_size=job.batch_size, skip_shuffle=True)
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(job.learning_rate),
        fedjax.optimizers.sgd(1.0),
        batching,
    )
    state = algorithm.init(params)
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

    notes = ["fills a client's last batch with its first examples again"]
    if job.workload == "shakespeare_lstm":
        notes.append("its recurrence in a loop; unrolled as it comes, it compiles for many minutes")
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
        lambda: float(fedjax.tree_util.tree_l2_norm(state.params)),
        tuple(notes),
    )


if __name__ == "__main__":
    serve(set_up, ("fedjax", "jax", "jaxlib", "dm-haiku", "numpy"))
