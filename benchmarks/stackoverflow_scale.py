"""Measures Stack Overflow at scale: converting it, and using all 342,477 clients.

    python -m benchmarks.stackoverflow_scale [--fraction 0.005] [--folder /tmp]

Conversion is measured on a generated file in TFF's layout with `fraction` of the published clients and
examples: sentences of 15 Zipf-distributed words on average, all six features. It is converted without
workers, with one and with two, and once by a process that is killed halfway and by another that
goes on; all results have to be identical. Opening and sampling are measured on packed folders of the
full number of clients and examples, whose token file is sparse: a hole on the disk that reads as
zeros, from which whatever is gathered has the true size. Every figure is of a fresh process. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CLIENTS, EXAMPLES = 342_477, 135_818_730
LENGTH, VOCAB_SIZE = 20, 10_000
SIZE_SIGMA = 1.1  # Of the clients' log-normal sizes; only their mean is published.
POPULATIONS = (1_000, 10_000, 100_000, CLIENTS)
COHORT, ROUNDS = 50, 40
RESULTS = Path(__file__).parent / "results" / "stackoverflow_scale.json"
MIB = 1 << 20


def client_sizes(clients: int, examples: int):
    """Log-normal sizes of at least 1 that sum to `examples` exactly."""
    import numpy as np

    draws = np.random.default_rng(0).lognormal(sigma=SIZE_SIGMA, size=clients)
    bounds = np.rint(np.cumsum(draws) / draws.sum() * (examples - clients)).astype(np.int64)
    return np.diff(bounds, prepend=0) + 1


def client_ids(clients: int):
    import numpy as np

    numbers = np.random.default_rng(1).choice(9_000_000, clients, replace=False) + 1_000_000
    return np.sort(numbers).astype("U8")


def generate(folder: Path, fraction: float) -> None:
    """Writes the two files that a conversion needs."""
    import h5py
    import numpy as np

    rng = np.random.default_rng(2)
    words = np.array([f"word{i:x}" for i in range(100_000)], object)
    counts = [f"{word} {len(words) - i}\n" for i, word in enumerate(words)]
    (folder / "stackoverflow.word_count").write_text("".join(counts))
    zipf = np.cumsum(1 / np.arange(1, len(words) + 1))
    clients = round(CLIENTS * fraction)
    sizes = client_sizes(clients, round(EXAMPLES * fraction))
    text = h5py.string_dtype()
    with h5py.File(folder / "stackoverflow_train.h5", "w") as file:
        for client_id, size in zip(client_ids(clients), sizes, strict=True):
            lengths = np.maximum(rng.lognormal(math.log(12), 0.7, size).astype(int), 1)
            ends = np.cumsum(lengths)
            drawn = words[np.searchsorted(zipf, rng.random(ends[-1]) * zipf[-1])].tolist()
            tokens = [" ".join(drawn[b - n : b]) for b, n in zip(ends, lengths, strict=True)]
            group = file.create_group(f"examples/{client_id}")
            group.create_dataset("tokens", data=tokens, dtype=text)
            for name, value in (
                ("title", "how do i append a row to a table without a copy"),
                ("tags", "python|numpy|performance"),
                ("creation_date", "2012-02-28 19:06:18.34 UTC"),
                ("type", "question"),
            ):
                group.create_dataset(name, data=[value] * size, dtype=text)
            group.create_dataset("score", data=rng.integers(0, 100, size))


def convert(folder: str, target: str, workers: str) -> dict:
    """Converts the generated file; --kill_after makes this process kill itself on the way."""
    from fedexp.data import conversion, stackoverflow, tff_hdf5, vocabulary

    words = vocabulary.read_word_counts(Path(folder) / "stackoverflow.word_count", VOCAB_SIZE)
    source = tff_hdf5.Source(
        Path(folder) / "stackoverflow_train.h5",
        {"tokens": tff_hdf5.Feature("tokens", (), object)},
        stackoverflow._Sentences(vocabulary.Vocabulary(words), LENGTH),
    )
    peaks: dict[int, int] = {}
    threading.Thread(target=watch_children, args=(peaks,), daemon=True).start()
    begin = time.perf_counter()
    conversion.convert(source, Path(target), num_workers=int(workers))
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": sum(os.times()[:4]),
        "parent_peak_mib": peak(os.getpid()) / MIB,
        "worker_peak_mib": max(peaks.values(), default=0) / MIB,
        "jax_imported": "jax" in sys.modules,
    }


class OneRow:
    """As many clients as are published, of one sentence each."""

    def client_ids(self) -> list[str]:
        return client_ids(CLIENTS).tolist()

    def read(self, ids: list[str]):
        import numpy as np

        for _ in ids:
            yield {"tokens": np.zeros((1, LENGTH + 1), np.uint16)}


def convert_many(target: str) -> dict:
    """What the number of clients alone costs a conversion."""
    from benchmarks import stackoverflow_scale as module
    from fedexp.data import conversion

    begin = time.perf_counter()
    conversion.convert(module.OneRow(), Path(target), num_workers=1)
    return {
        "clients": CLIENTS,
        "seconds": time.perf_counter() - begin,
        "parent_peak_mib": peak(os.getpid()) / MIB,
    }


def watch_children(peaks: dict[int, int]) -> None:
    """Keeps the highest resident memory of every child process up to date."""
    while True:
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            with_memory = peak(int(pid))
            peaks[int(pid)] = max(peaks.get(int(pid), 0), with_memory)
        time.sleep(0.05)


def peak(pid: int) -> int:
    """The most bytes that a process has held since it began; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def make_sparse(target: str, clients: str) -> dict:
    """Writes a packed folder of `clients` clients of the published mean size; its tokens are a hole."""
    import numpy as np

    folder, clients = Path(target), int(clients)
    examples = round(EXAMPLES * clients / CLIENTS)
    offsets = np.concatenate([[0], np.cumsum(client_sizes(clients, examples))])
    folder.mkdir()
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "client_ids.npy", client_ids(clients))
    with (folder / "feature_0.npy").open("wb") as file:
        shape = (examples, LENGTH + 1)
        header = {"descr": "<u2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2 * math.prod(shape))
    # No checksums of what is not there: opening compares sizes.
    files = {path.name: {"bytes": path.stat().st_size} for path in folder.glob("*.npy")}
    index = {"format": 2, "features": ["tokens"], "files": files}
    (folder / "index.json").write_text(json.dumps(index))
    return {"examples": examples}


def use(target: str) -> dict:
    """Opens a packed folder, and samples and gathers cohorts."""
    begin = time.perf_counter()
    from fedexp.data import packed, uniform

    imported, before = time.perf_counter() - begin, resident()
    begin = time.perf_counter()
    dataset = packed.read_dataset(Path(target))
    opened, after = time.perf_counter() - begin, resident()
    sampler = uniform(COHORT)
    sampler.sample(dataset.client_ids, 0, ROUNDS)
    sampling, gathering, again = [], [], []
    for round_ in range(ROUNDS):
        begin = time.perf_counter()
        cohort = sampler.sample(dataset.client_ids, 0, round_).clients
        sampling.append(time.perf_counter() - begin)
        gathering.append(gather(dataset, cohort))
        again.append(gather(dataset, cohort))
    return {
        "clients": dataset.num_clients,
        "examples": dataset.num_examples,
        "import_s": imported,
        "open_ms": opened * 1e3,
        "resident_before_mib": before / MIB,
        "resident_open_mib": after / MIB,
        "sample_ms": median(sampling) * 1e3,
        "gather_ms": median(gathering) * 1e3,
        "gather_again_ms": median(again) * 1e3,
        "resident_end_mib": resident() / MIB,
    }


def gather(dataset, cohort) -> float:
    """Copies the cohort's examples as the strategies do, and says how many seconds it took."""
    begin = time.perf_counter()
    dataset.prefetch(cohort)
    for client in cohort:
        dataset.client(client)["tokens"].copy()
    return time.perf_counter() - begin


def list_clients(folder: str) -> dict:
    """How long it takes to list all clients of a file that has the published number of them."""
    import h5py

    from fedexp.data import tff_hdf5

    path = Path(folder) / "links.h5"
    with h5py.File(path, "w") as file:
        root = file.create_group("examples")
        one = root.create_group("0")
        for client_id in client_ids(CLIENTS):
            root[client_id] = one
        del root["0"]
    begin = time.perf_counter()
    found = len(tff_hdf5.Source(path, {}, dict).client_ids())
    seconds = time.perf_counter() - begin
    return {"clients": found, "seconds": seconds, "peak_mib": peak(os.getpid()) / MIB}


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def command(step: str, *arguments: object) -> list[str]:
    return [
        sys.executable,
        "-m",
        "benchmarks.stackoverflow_scale",
        "--step",
        step,
        *map(str, arguments),
    ]


def in_fresh_process(step: str, *arguments: object) -> dict:
    output = subprocess.run(
        command(step, *arguments), check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def interrupt_and_resume(folder: Path, workers: int, expected: dict[str, str]) -> dict:
    """Kills a conversion once a third of the rows are there; the next one has to go on from them."""
    target = folder / "interrupted"
    part = folder / ".interrupted.part" / "feature_0.npy"
    wanted = (folder / "converted_0" / "feature_0.npy").stat().st_size // 3
    process = subprocess.Popen(command("convert", folder, target, workers))
    while not part.exists() or part.stat().st_size < wanted:
        if process.poll() is not None:
            raise RuntimeError("the conversion ended before it could be interrupted")
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = part.stat().st_size
    row = in_fresh_process("convert", folder, target, workers)
    if checksums(target) != expected:
        raise RuntimeError("the resumed conversion differs")
    size = (target / "feature_0.npy").stat().st_size
    return {"killed_at": kept / size, "resumed_seconds": row["seconds"], "identical": True}


def checksums(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def measure_conversion(folder: Path, fraction: float) -> dict:
    begin = time.perf_counter()
    generate(folder, fraction)
    source = folder / "stackoverflow_train.h5"
    result = {
        "fraction": fraction,
        "clients": round(CLIENTS * fraction),
        "examples": round(EXAMPLES * fraction),
        "source_mib": source.stat().st_size / MIB,
        "generated_in_s": time.perf_counter() - begin,
        "rows": [],
    }
    for workers in (0, 1, 2):
        target = folder / f"converted_{workers}"
        row = in_fresh_process("convert", folder, target, workers)
        row = {
            "workers": workers,
            **row,
            "examples_per_s": result["examples"] / row["seconds"],
            "cpu_us_per_example": row["cpu_seconds"] / result["examples"] * 1e6,
            "ms_per_client": row["seconds"] / result["clients"] * 1e3,
        }
        if workers == 0:
            expected = checksums(target)
        elif checksums(target) != expected:
            raise RuntimeError("the result depends on the number of workers")
        print(row, flush=True)
        result["rows"].append(row)
    result["interrupted"] = interrupt_and_resume(folder, 2, expected)
    result["packed_mib"] = sum(p.stat().st_size for p in target.iterdir()) / MIB
    return result


def main() -> None:
    from benchmarks.machine import machine  # Not in the processes whose memory is measured.

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fraction", type=float, default=0.005)
    parser.add_argument("--folder", help="where to put the files, by default among temporary ones")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        steps = {
            "convert": convert,
            "list": list_clients,
            "many": convert_many,
            "sparse": make_sparse,
            "use": use,
        }
        name, *values = arguments.step
        print(json.dumps(steps[name](*values)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        results = {
            "machine": machine(("numpy", "h5py")),
            "conversion": measure_conversion(folder, arguments.fraction),
        }
        print(results["conversion"]["interrupted"], flush=True)
        results["listing"] = in_fresh_process("list", folder)
        print(results["listing"], flush=True)
        results["many_clients"] = in_fresh_process("many", folder / "many")
        print(results["many_clients"], flush=True)
        results["use"] = []
        for clients in POPULATIONS:
            in_fresh_process("sparse", folder / f"packed_{clients}", clients)
            row = in_fresh_process("use", folder / f"packed_{clients}")
            print(row, flush=True)
            results["use"].append(row)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
