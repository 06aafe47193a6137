"""The manifest of a sweep's Job, as far as files can be checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedexp.sweeps import description
from tests.support.kubernetes import manifests, validate

MANIFEST = Path(__file__).parent.parent.parent / "launch" / "kubernetes_sweep.yaml"


@pytest.mark.parametrize("kind", ["PersistentVolumeClaim", "Job"])
@pytest.mark.parametrize("version", ["1.31", "latest"])
def test_the_manifests_fit_kubernetes_schema(kind, version):
    validate(manifests(MANIFEST)[kind], version)


def test_the_job_is_a_sweep_in_the_volume():
    claim, job = (manifests(MANIFEST)[kind] for kind in ("PersistentVolumeClaim", "Job"))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    pod = job["spec"]["template"]["spec"]
    (container,), (volume,) = pod["containers"], pod["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert container["command"] == ["python", "-m", "fedexp.sweep"]
    given = dict(word.split("=", 1) for word in container["args"])
    assert Path(container["volumeMounts"][0]["mountPath"]) in Path(given["--workdir"]).parents
    sweep, _ = description.load(given["--sweep"])
    assert sweep.axes
    rules = job["spec"]["podFailurePolicy"]["rules"]
    by_code = {r["onExitCodes"]["values"][0]: r for r in rules if "onExitCodes" in r}
    assert {code: rule["action"] for code, rule in by_code.items()} == {2: "FailJob", 143: "Ignore"}
    assert {r["onExitCodes"]["containerName"] for r in by_code.values()} == {container["name"]}
    assert pod["restartPolicy"] == "Never"
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
