"""Tests of launch/gke/*.yaml: Kubernetes' schema, restarts, and sizes that must agree."""

import math
from pathlib import Path
from typing import Any

import pytest

MANIFESTS = ("v6e", "tpu7x", "gpu")
KUBERNETES = "1.37"


def read_manifest(name: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(Path(f"launch/gke/{name}.yaml").read_text())


def job_spec(manifest: Any) -> Any:
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container_spec(manifest: Any) -> Any:
    (container,) = job_spec(manifest)["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_job_follows_the_kubernetes_schema(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip has no kubernetes-validate")
    spec = job_spec(read_manifest(name))
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "mixer"}}
    validate.validate(job | {"spec": spec}, KUBERNETES, strict=True)
    # Strict validation finds a misplaced key.
    misplaced = spec | {"restartPolicy": "Never"}
    with pytest.raises(validate.ValidationError):
        validate.validate(job | {"spec": misplaced}, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_restarts_all_pods_except_after_a_usage_error(name: str) -> None:
    manifest = read_manifest(name)
    policy, job = manifest["spec"]["failurePolicy"], job_spec(manifest)
    assert policy["maxRestarts"] > 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    codes = rule["onExitCodes"]
    # Only usage errors; not 1 and 134, which follow the loss of a host, nor 143, after SIGTERM.
    container = container_spec(manifest)["name"]
    assert (codes["containerName"], codes["operator"]) == (container, "In")
    assert codes["values"] == [2]
    (fail,) = policy["rules"]
    assert (fail["action"], fail["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    # Kubernetes requires this restart policy for exit code rules. A single pod is never restarted,
    # because the others cannot continue with it.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
    command, *arguments = container_spec(manifest)["args"]
    assert command == "train"
    assert any(argument.startswith("--workdir=gs://") for argument in arguments)


@pytest.mark.parametrize("name", ["v6e", "tpu7x"])
def test_tpu_manifest_has_one_pod_per_host_of_its_topology(name: str) -> None:
    manifest = read_manifest(name)
    job = job_spec(manifest)
    topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    resources = container_spec(manifest)["resources"]
    chips = resources["limits"]["google.com/tpu"]
    assert resources["requests"]["google.com/tpu"] == chips == 4
    num_hosts = math.prod(map(int, topology.split("x"))) // chips
    assert job["parallelism"] == job["completions"] == num_hosts


def test_tpu_manifests_differ_only_in_the_tpu() -> None:
    v6e, tpu7x = (Path(f"launch/gke/{name}.yaml").read_text() for name in ("v6e", "tpu7x"))
    for old, new in (("tpu-v6e-slice", "tpu7x"), ("8x8", "4x4x4"), ("v6e.yaml", "tpu7x.yaml")):
        assert old in v6e
        v6e = v6e.replace(old, new)
    assert v6e.replace("TPU v6e (Trillium)", "TPU7x (Ironwood)") == tpu7x


def test_gpu_manifest_uses_its_first_pod_as_coordinator() -> None:
    manifest = read_manifest("gpu")
    job = job_spec(manifest)
    env = {entry["name"]: entry for entry in container_spec(manifest)["env"]}
    (replicated,) = manifest["spec"]["replicatedJobs"]
    name = manifest["metadata"]["name"]
    first_pod = f"{name}-{replicated['name']}-0-0.{name}"
    assert env["JAX_COORDINATOR_ADDRESS"]["value"].split(":")[0] == first_pod
    assert int(env["JAX_NUM_PROCESSES"]["value"]) == job["parallelism"] == job["completions"]
    field_path = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field_path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert job["completionMode"] == "Indexed"
