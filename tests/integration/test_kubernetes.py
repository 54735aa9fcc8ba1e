# SPDX-License-Identifier: Apache-2.0
"""infra/kubernetes: valid for Kubernetes and KEDA, consistent in itself, and true to the worker that it runs."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]  # it has none
import pytest
import yaml

from acestep_consumer.broker.topology import GENERATE, tier_queue
from acestep_consumer.config.settings import known_variables, load
from acestep_consumer.policy.tiers import BUILT_IN
from tests.support.keda import SCHEMAS, autoscaler_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra/kubernetes"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
VERSIONS = ("1.33.0", "1.35.0", "1.37.0")
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
DOCUMENTS: dict[str, dict[str, Any]] = {
    f"{path.stem}: {document['kind']}": document for path in FILES for document in yaml.safe_load_all(path.read_text())
}
DEPLOYMENT = DOCUMENTS["deployment: Deployment"]
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]
(WORKER,) = POD["containers"]
SCALED = DOCUMENTS["scaledobject: ScaledObject"]
CONFIGURATION = dict(line.split("=", 1) for line in KUSTOMIZATION["configMapGenerator"][0]["literals"])


def check(document: dict[str, Any], version: str) -> None:
    """Raise when the document is not what this Kubernetes, or KEDA, takes; unknown fields are errors."""
    if document["kind"] in SCHEMAS:
        jsonschema.validate(document, SCHEMAS[document["kind"]])
    else:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_follows_its_schema(name: str, version: str) -> None:
    check(DOCUMENTS[name], version)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("deployment: Deployment", ("spec", "template", "spec", "terminationGracePeriod")),
        ("poddisruptionbudget: PodDisruptionBudget", ("spec", "maxUnavailble")),
        ("scaledobject: ScaledObject", ("spec", "minReplicas")),
        ("scaledobject: TriggerAuthentication", ("spec", "secretTargetRefs")),
    ],
)
def test_a_misspelt_field_is_noticed(name: str, path: tuple[str, ...]) -> None:
    broken = copy.deepcopy(DOCUMENTS[name])
    place = broken
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = 1
    with pytest.raises(jsonschema.ValidationError, match=path[-1]):
        check(broken, VERSIONS[-1])


@pytest.mark.parametrize("version", VERSIONS)
def test_the_autoscaler_that_keda_makes_is_one_that_kubernetes_takes(version: str) -> None:
    kubernetes_validate.validate(autoscaler_of(SCALED), version, strict=True)


def test_the_kustomization_names_every_file_but_those_that_are_applied_by_hand() -> None:
    by_hand = {"secrets.example.yaml", "fill-checkpoints.yaml", "gateway.yaml"}
    assert set(KUSTOMIZATION["resources"]) == {path.name for path in FILES} - by_hand
    assert WORKER["image"] in {image["name"] for image in KUSTOMIZATION["images"]}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders kustomizations, is not installed")
def test_what_kustomize_makes_of_it_is_valid_and_keeps_the_names_together() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rendered = {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}
    for document in rendered.values():
        check(document, VERSIONS[-1])
    (worker,) = rendered["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert worker["envFrom"][0]["configMapRef"]["name"] == rendered["ConfigMap"]["metadata"]["name"]
    assert worker["image"] == "registry.example.com/acestep-consumer:0.2.0"


def test_whatever_refers_to_a_pod_a_claim_or_a_secret_finds_it() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    budget = DOCUMENTS["poddisruptionbudget: PodDisruptionBudget"]
    for selector in (DEPLOYMENT["spec"]["selector"], budget["spec"]["selector"]):
        assert selector["matchLabels"].items() <= labels.items()
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert {mount["name"] for mount in WORKER["volumeMounts"]} == set(volumes)
    claim = DOCUMENTS["checkpoints: PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["checkpoints"]["persistentVolumeClaim"]["claimName"] == claim
    assert SCALED["spec"]["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]
    assert WORKER["envFrom"][0]["configMapRef"]["name"] == KUSTOMIZATION["configMapGenerator"][0]["name"]


def test_the_claim_of_the_checkpoints_can_be_filled() -> None:
    """A claim that is mounted read-only everywhere stays empty; a job writes what the workers read."""
    claim = DOCUMENTS["checkpoints: PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    pod = DOCUMENTS["fill-checkpoints: Job"]["spec"]["template"]["spec"]
    (filler,) = pod["containers"]
    volume = next(volume for volume in pod["volumes"] if volume["name"] == "checkpoints")
    assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    mount = next(mount for mount in filler["volumeMounts"] if mount["name"] == "checkpoints")
    assert "readOnly" not in mount
    target = Path(filler["args"][filler["args"].index("--local-dir") + 1])
    assert target.parent == Path(CONFIGURATION["ACESTEP_CHECKPOINT_DIR"]) == Path(mount["mountPath"])
    assert pod["securityContext"] == POD["securityContext"]


def test_the_secrets_of_the_example_have_the_keys_that_are_read() -> None:
    text = (FOLDER / "secrets.example.yaml").read_text()
    secrets = {document["metadata"]["name"]: set(document["stringData"]) for document in yaml.safe_load_all(text)}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    folder = next(mount["mountPath"] for mount in WORKER["volumeMounts"] if mount["name"] == "secrets")
    read = {entry["value"] for entry in WORKER["env"] if str(entry.get("value")).startswith(folder)}
    assert read == {f"{folder}/{key}" for key in secrets[volumes["secrets"]["secret"]["secretName"]]}
    (reference,) = DOCUMENTS["scaledobject: TriggerAuthentication"]["spec"]["secretTargetRef"]
    assert reference["key"] in secrets[reference["name"]]


def test_the_settings_are_ones_that_the_worker_takes() -> None:
    plain = {entry["name"]: entry["value"] for entry in WORKER["env"] if "value" in entry}
    names = {name for name in (*CONFIGURATION, *plain) if name.startswith("ACESTEP_")}
    assert names <= known_variables()
    settings = load({**CONFIGURATION, "ACESTEP_HTTP_PORT": plain["ACESTEP_HTTP_PORT"]}, env_file=None)
    assert settings.worker.http_port == WORKER["ports"][0]["containerPort"]


def test_the_gateway_is_found_scaled_and_given_its_secrets() -> None:
    deployment = DOCUMENTS["gateway: Deployment"]
    pod, labels = deployment["spec"]["template"]["spec"], deployment["spec"]["template"]["metadata"]["labels"]
    (container,) = pod["containers"]
    selectors = (
        DOCUMENTS["gateway: Service"]["spec"]["selector"],
        DOCUMENTS["gateway: PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        deployment["spec"]["selector"]["matchLabels"],
    )
    assert all(selector.items() <= labels.items() for selector in selectors)
    scaled = DOCUMENTS["gateway: HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
    assert scaled == deployment["metadata"]["name"]
    plain = {entry["name"]: entry["value"] for entry in container["env"]}
    assert {name for name in plain if name.startswith("ACESTEP_")} <= known_variables()
    text = (FOLDER / "secrets.example.yaml").read_text()
    secrets = {document["metadata"]["name"]: set(document["stringData"]) for document in yaml.safe_load_all(text)}
    read = {value.rpartition("/")[2] for value in plain.values() if value.startswith("/run/secrets")}
    assert read == secrets[pod["volumes"][0]["secret"]["secretName"]]
    assert container["ports"][0]["containerPort"] == load({}, env_file=None).gateway.port
    assert pod["securityContext"] == POD["securityContext"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_second_trigger_of_the_readme_watches_the_queue_of_a_tier_as_the_first_one_watches_its_own(
    version: str,
) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    (second,) = yaml.safe_load(block)
    scaled = copy.deepcopy(SCALED)
    (first,) = scaled["spec"]["triggers"]
    scaled["spec"]["triggers"].append(second)
    check(scaled, version)
    kubernetes_validate.validate(autoscaler_of(scaled), version, strict=True)
    queue = second["metadata"]["queueName"]
    assert queue in {tier_queue(tier.name) for tier in BUILT_IN.tiers}
    assert second == {**first, "metadata": {**first["metadata"], "queueName": queue}}


def test_a_worker_has_longer_to_leave_than_its_longest_job_takes() -> None:
    settings = load(CONFIGURATION, env_file=None)
    grace_s = float(WORKER["args"][WORKER["args"].index("--grace") + 1])
    longest_s = settings.worker.execution_timeout_s
    assert longest_s is not None
    assert longest_s < grace_s < POD["terminationGracePeriodSeconds"]
    assert DEPLOYMENT["spec"]["progressDeadlineSeconds"] > POD["terminationGracePeriodSeconds"]
    readme = (FOLDER / "README.md").read_text()
    for seconds in (longest_s, grace_s, POD["terminationGracePeriodSeconds"]):
        assert f"({seconds:g})" in readme


def test_a_worker_is_an_ordinary_user_with_a_read_only_root_and_no_privileges() -> None:
    image = (ROOT / "infra/Dockerfile").read_text()
    user = re.search(r"^USER (\d+):(\d+)$", image, re.MULTILINE)
    assert user is not None
    context = POD["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["runAsGroup"]) == (True, *map(int, user.groups()))
    own = WORKER["securityContext"]
    assert own["readOnlyRootFilesystem"]
    assert not own["allowPrivilegeEscalation"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert POD["automountServiceAccountToken"] is False


def test_settings_cannot_come_from_the_names_of_services() -> None:
    """A service called `acestep` would otherwise set `ACESTEP_PORT`, which is no setting and stops the start."""
    assert POD["enableServiceLinks"] is False


def test_probes_ask_the_pages_that_the_worker_has() -> None:
    probes = {name: WORKER[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/healthz",
        "livenessProbe": "/healthz",
        "readinessProbe": "/readyz",
    }
    assert {probe["port"] for probe in probes.values()} == {port["name"] for port in WORKER["ports"]}


def test_scaling_counts_unacknowledged_requests_and_removes_one_worker_at_a_time() -> None:
    (trigger,) = SCALED["spec"]["triggers"]
    assert trigger["metadata"]["queueName"] == GENERATE
    assert trigger["metadata"]["protocol"] == "http"
    assert trigger["metadata"]["excludeUnacknowledged"] == "false"
    down = SCALED["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    assert [(policy["type"], policy["value"]) for policy in down["policies"]] == [("Pods", 1)]
    assert DOCUMENTS["poddisruptionbudget: PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
