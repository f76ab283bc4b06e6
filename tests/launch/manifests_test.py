"""Tests of launch/gke/*.yaml against the schemas of Kubernetes and JobSet."""

import math
from pathlib import Path
from typing import Any

import pytest

MANIFESTS = ("v6e", "tpu7x", "gpu")
KUBERNETES = "1.37"
_NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}
_COUNT = {"type": "integer", "minimum": 0}


def _record(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


# The part of jobset.x-k8s.io/v1alpha2 that is used here, after the definition in
# kubernetes-sigs/jobset; what is inside a Job is checked by Kubernetes' own schema.
JOBSET = _record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_record("name", name=_NAME, annotations={"additionalProperties": {"type": "string"}}),
    spec=_record(
        "replicatedJobs",
        failurePolicy=_record(
            "",
            maxRestarts=_COUNT,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
            rules={
                "items": _record(
                    "name action",
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={
                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                    },
                    onJobFailureReasons={
                        "items": {
                            "enum": [
                                "BackoffLimitExceeded",
                                "DeadlineExceeded",
                                "FailedIndexes",
                                "MaxFailedIndexesExceeded",
                                "PodFailurePolicy",
                            ]
                        }
                    },
                )
            },
        ),
        replicatedJobs={
            "minItems": 1,
            "items": _record(
                "name template",
                name=_NAME,
                replicas=_COUNT,
                template=_record("spec", spec={"type": "object"}),
            ),
        },
    ),
)


def read(name: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(Path(f"launch/gke/{name}.yaml").read_text())


def job_of(manifest: Any) -> Any:
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container_of(manifest: Any) -> Any:
    (container,) = job_of(manifest)["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_schemas_of_jobset_and_kubernetes_hold(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip has no kubernetes-validate")
    jsonschema = pytest.importorskip("jsonschema")
    manifest = read(name)
    jsonschema.validate(manifest, JOBSET)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "mixer"}}
    validate.validate(job | {"spec": job_of(manifest)}, KUBERNETES, strict=True)
    # Both would have told.
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest | {"spec": manifest["spec"] | {"replicas": 2}}, JOBSET)
    wrong = job_of(manifest) | {"restartPolicy": "Never"}
    with pytest.raises(validate.ValidationError):
        validate.validate(job | {"spec": wrong}, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_may_end_otherwise_is_started_again_and_only_that(name: str) -> None:
    manifest = read(name)
    policy, job = manifest["spec"]["failurePolicy"], job_of(manifest)
    assert policy["maxRestarts"] > 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    codes = rule["onExitCodes"]
    # A user's mistake; not 1, which a lost host may be, nor 143, a stop by SIGTERM.
    assert (codes["containerName"], codes["operator"], codes["values"]) == ("train", "In", [2])
    (fail,) = policy["rules"]
    assert (fail["action"], fail["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    # Kubernetes takes a policy on codes with no other one; a pod alone is never started again,
    # for the others could not go on with it.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
    assert any(
        argument.startswith("--workdir=gs://") for argument in container_of(manifest)["args"]
    )


@pytest.mark.parametrize("name", ["v6e", "tpu7x"])
def test_hosts_and_chips_of_a_slice_fit_its_topology(name: str) -> None:
    manifest = read(name)
    job = job_of(manifest)
    pod = job["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container_of(manifest)["resources"]["limits"]["google.com/tpu"]
    assert container_of(manifest)["resources"]["requests"]["google.com/tpu"] == chips == 4
    hosts = math.prod(map(int, topology.split("x"))) // chips
    assert job["parallelism"] == job["completions"] == hosts


def test_the_tpu_manifests_differ_in_the_tpu_alone() -> None:
    v6e, tpu7x = (Path(f"launch/gke/{name}.yaml").read_text() for name in ("v6e", "tpu7x"))
    for old, new in (("tpu-v6e-slice", "tpu7x"), ("8x8", "4x4x4"), ("v6e.yaml", "tpu7x.yaml")):
        assert old in v6e
        v6e = v6e.replace(old, new)
    assert v6e.replace("TPU v6e (Trillium)", "TPU7x (Ironwood)") == tpu7x


def test_gpu_hosts_meet_at_the_first_of_them() -> None:
    manifest = read("gpu")
    job = job_of(manifest)
    env = {entry["name"]: entry for entry in container_of(manifest)["env"]}
    (replicated,) = manifest["spec"]["replicatedJobs"]
    name = manifest["metadata"]["name"]
    first = f"{name}-{replicated['name']}-0-0.{name}"
    assert env["JAX_COORDINATOR_ADDRESS"]["value"].split(":")[0] == first
    assert int(env["JAX_NUM_PROCESSES"]["value"]) == job["parallelism"] == job["completions"]
    place = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert place == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert job["completionMode"] == "Indexed"
