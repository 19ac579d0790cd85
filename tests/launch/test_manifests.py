"""What GKE and SkyPilot are given has the form that they document, and exit statuses have their meaning there."""

import re

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.launch.scripts import LAUNCH, RUN, WAYS, call

TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}


def record(required=(), **fields):
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def several(items, **more):
    return {"type": "array", "items": items, **more}


# JobSet's own fields, of jobset.x-k8s.io/v1alpha2 as of JobSet 0.10 (api/jobset/v1alpha2/jobset_types.go), as far as
# a training can want them. The templates inside are Kubernetes' own and are validated by its schemas.
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
RULE = record(
    ["action", "name"],
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ACTIONS},
    onJobFailureReasons=several({"enum": REASONS}, uniqueItems=True),
    onJobFailureMessagePatterns=several(TEXT, uniqueItems=True),
    targetReplicatedJobs=several(TEXT),
)
JOBSET = record(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata={"type": "object"},
    spec=record(
        ["replicatedJobs"],
        network=record(enableDNSHostnames=FLAG, subdomain=TEXT, publishNotReadyAddresses=FLAG),
        failurePolicy=record(
            maxRestarts=NUMBER, restartStrategy={"enum": ["Recreate", "BlockingRecreate"]}, rules=several(RULE)
        ),
        successPolicy=record(["operator"], operator={"enum": ["All", "Any"]}, targetReplicatedJobs=several(TEXT)),
        replicatedJobs=several(record(["name", "template"], name=TEXT, replicas=NUMBER, template={"type": "object"})),
        ttlSecondsAfterFinished=NUMBER,
        suspend=FLAG,
    ),
)

# The fields of a SkyPilot task (docs.skypilot.co, YAML reference; checked against the schemas of SkyPilot 0.14.1).
TASK = record(
    ["run"],
    name=TEXT,
    num_nodes=NUMBER,
    workdir=TEXT,
    resources=record(
        infra=TEXT,
        accelerators=TEXT,
        use_spot=FLAG,
        disk_size=NUMBER,
        job_recovery=record(strategy=TEXT, max_restarts_on_errors=NUMBER, recover_on_exit_codes=several(NUMBER)),
    ),
    envs={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    file_mounts={
        "type": "object",
        "additionalProperties": record(["source"], source=TEXT, mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]}),
    },
    setup=TEXT,
    run=TEXT,
)


@pytest.fixture
def jobset(clone, environment, request):
    more = getattr(request, "param", [])
    shown = call("gke.sh", *WAYS["gke.sh"], *RUN, *more, "--dry_run", clone=clone, environment=environment)
    return yaml.safe_load(shown.stdout)


@pytest.mark.parametrize("jobset", [[], ["--spot", "--slices=2"]], indirect=True)
def test_the_jobset_and_the_job_and_pod_in_it_have_documented_fields_only(jobset):
    jsonschema.validate(jobset, JOBSET)
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **replicated["template"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": job["spec"]["template"]["spec"]}
        for resource in (job, pod):
            kubernetes_validate.validate(resource, "1.31", strict=True)
            kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_a_misspelt_field_of_the_pod_would_be_noticed(jobset):
    template = jobset["spec"]["replicatedJobs"][0]["template"]
    template["spec"]["template"]["spec"]["terminationGracePeriod"] = 3
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **template}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


@pytest.mark.parametrize("jobset", [["--spot", "--slices=2", "--chips=8"]], indirect=True)
def test_a_slice_gets_a_pod_for_each_host_on_the_nodes_asked_for(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (2, 8, 8)  # 8x8 chips, 8 a host
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 8}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "8x8",
        "cloud.google.com/gke-spot": "true",
    }


def action_of_the_jobset(jobset, status: int | None) -> str:
    """What JobSet does when the first container ends with a status, or (None) when its pod is disrupted.

    Follows the Job controller (pkg/controller/job/pod_failure_policy.go: the first rule that matches, and its message)
    and JobSet's (the first rule whose reasons and patterns both match; RestartJobSet if none does).
    """
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    assert job["backoffLimit"] == 0
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        if codes and codes["operator"] == "In" and status in codes["values"]:
            message = (
                f"Container train for pod default/emo-0 failed with exit code {status} matching FailJob rule at index"
            )
        elif conditions and status is None and conditions[0]["type"] == "DisruptionTarget":
            message = "Pod default/emo-0 has condition DisruptionTarget matching FailJob rule at index"
        else:
            continue
        assert rule["action"] == "FailJob"
        reason, message = "PodFailurePolicy", f"{message} {index}"
        break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_statuses_have_their_meaning_on_gke(jobset):
    found = {status: action_of_the_jobset(jobset, status) for status in (2, 75, None, 76, 1, 20, 137)}
    assert found == {
        2: "FailJobSet",
        75: "RestartJobSetAndIgnoreMaxRestarts",
        None: "RestartJobSetAndIgnoreMaxRestarts",
        **dict.fromkeys((76, 1, 20, 137), "RestartJobSet"),
    }
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_the_skypilot_task_has_documented_fields_only():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    jsonschema.validate(task, TASK)
    recovery = task["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75, 76]}


def test_what_skypilot_runs_tells_jax_about_the_others(clone, environment, tmp_path):
    """Its `run`, with the training replaced by one that shows what it was given."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nenv | grep ^JAX_ >"$HOME/found"; for word; do echo "$word" >>"$HOME/found"; done\n')
    python.chmod(0o755)
    (tmp_path / "home" / "tools" / "head").symlink_to("/usr/bin/head")
    script = clone / "launch" / "run_of_skypilot.sh"
    script.write_text(task["run"])
    environment |= {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "EMO_CACHE": "/bucket/compiled",
        "EMO_OPTIONS": "--config=a '--workdir=b c'",
    }
    ran = call(script.name, clone=clone, environment=environment, shell="bash", cwd=clone)
    assert ran.returncode == 0, ran.stderr
    assert set((tmp_path / "home" / "found").read_text().splitlines()) >= {
        "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476",
        "JAX_NUM_PROCESSES=2",
        "JAX_PROCESS_ID=1",
        "--config=a",
        "--workdir=b c",
    }
