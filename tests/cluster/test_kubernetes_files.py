"""The manifests of cluster/kuberay and rendered RayJobs: against published schemas, and hardened."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from genrec_dist import __version__
from genrec_dist.config import load_config
from launcher.cli import app
from launcher.submit_render import kubernetes_name

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
SCHEMA = json.loads((ROOT / "tests" / "data" / "kuberay.schema.json").read_text())
FILES = sorted(KUBERAY.glob("*.yaml"))


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def cluster_spec(document: dict) -> dict:
    return document["spec"].get("rayClusterSpec", document["spec"])


def pods(document: dict) -> list[dict]:
    """Pod templates of a RayCluster or RayJob."""
    spec = cluster_spec(document)
    found = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    return found + ([document["spec"]["submitterPodTemplate"]] if document["kind"] == "RayJob" else [])


def check(document: dict) -> None:
    """Validate against published schemas; unknown fields are errors."""
    if document["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(document, "1.34", strict=True)
        return
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    for pod in pods(document):
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **pod}, "1.34", strict=True)
    scaler = cluster_spec(document)["autoscalerOptions"]
    container = {"name": "autoscaler"} | {
        k: scaler[k] for k in ("env", "resources", "securityContext", "volumeMounts") if k in scaler
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [container]}}
    kubernetes_validate.validate(pod, "1.34", strict=True)


def render(folder: Path, *words: str) -> list[dict]:
    places = ["--store", "/shared/store", "--runs", "/shared/runs"]
    command = [
        "submit",
        str(ROOT / "configs" / "quickstart.yaml"),
        *places,
        "--render",
        "kuberay",
        "--out",
        str(folder),
    ]
    done = CliRunner().invoke(app, [*command, *words])
    assert done.exit_code == 0, done.output
    return documents(folder / "rayjob.yaml")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_document_is_valid(file):
    for document in documents(file):
        check(document)


@pytest.mark.parametrize("file", [KUBERAY / "raycluster.yaml", KUBERAY / "rayjob.yaml"], ids=lambda file: file.name)
def test_rays_object_store_fits_into_its_volume(file):
    *_, document = documents(file)
    spec = cluster_spec(document)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (volume,) = [one for one in group["template"]["spec"]["volumes"] if one["name"] == "shm"]
        assert volume["emptyDir"]["sizeLimit"] == "4Gi"
        assert int(group["rayStartParams"]["object-store-memory"]) < 4 << 30


def test_the_schemas_find_what_is_wrong():
    cluster = documents(KUBERAY / "raycluster.yaml")[1]
    for change in (
        lambda c: c["spec"].update(autoscaling=True),
        lambda c: c["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda c: c["spec"]["workerGroupSpecs"][0].update(minReplicas="1"),
        lambda c: c["spec"]["headGroupSpec"]["template"]["spec"].update(runAsNonRoot=True),
        lambda c: c["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0].pop("name"),
        lambda c: c["spec"]["autoscalerOptions"]["securityContext"].update(dropped=["ALL"]),
    ):
        wrong = json.loads(json.dumps(cluster))
        change(wrong)
        with pytest.raises(jsonschema.ValidationError):
            check(wrong)


@pytest.mark.parametrize("file", [KUBERAY / "raycluster.yaml", KUBERAY / "rayjob.yaml"], ids=lambda file: file.name)
def test_pods_have_no_more_rights_than_they_need(file):
    *_, document = documents(file)
    for pod in pods(document):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
            if container["name"] != "ray-job-submitter":
                assert {"name": "GENREC_CACHE", "value": "/shared/cache"} in container["env"]  # on the shared volume
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    spec = cluster_spec(document)
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not spec["headGroupSpec"].get("enableIngress")
    tokenless = [pod["spec"].get("automountServiceAccountToken") for pod in pods(document)[1:]]
    assert tokenless == [False] * len(tokenless)  # the head's autoscaler alone speaks to Kubernetes
    assert spec["authOptions"] == {"mode": "token", "secretName": "genrec-ray-token"}


@pytest.mark.parametrize("file", [KUBERAY / "raycluster.yaml", KUBERAY / "rayjob.yaml"], ids=lambda file: file.name)
def test_only_the_clusters_pods_and_the_operator_get_in(file):
    *_, policy, document = documents(file)
    own = policy["spec"]["podSelector"]["matchLabels"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    among, operator = policy["spec"]["ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": own}}]}
    assert [list(peer) for peer in operator["from"]] == [["namespaceSelector", "podSelector"]]
    assert operator["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    assert [port["port"] for port in operator["ports"]] == [8265]
    for pod in pods(document):
        assert own.items() <= pod["metadata"]["labels"].items()
    assert own["app.kubernetes.io/instance"] == document["metadata"]["name"]


def test_versions_are_those_of_this_project():
    *_, cluster = documents(KUBERAY / "raycluster.yaml")
    lock = (ROOT / "requirements" / "cpu.lock").read_text()
    assert f"ray=={cluster['spec']['rayVersion']}\n" in lock
    images = {pod["spec"]["containers"][0]["image"] for pod in pods(cluster)}
    assert images == {f"genrec:{__version__}", f"genrec:{__version__}-gpu"}


def test_the_example_job_is_what_render_writes(tmp_path):
    render(tmp_path / "out")
    assert (tmp_path / "out" / "rayjob.yaml").read_text() == (KUBERAY / "rayjob.yaml").read_text(), (
        "write it again: genrec submit configs/quickstart.yaml --store /shared/store --runs /shared/runs "
        "--render kuberay --out FOLDER"
    )
    assert (tmp_path / "out" / "storage.yaml").read_text() == (KUBERAY / "storage.yaml").read_text()


def test_a_rendered_job_has_the_runs_settings(tmp_path):
    words = ["--name", "Big_Run.1", "--set", "runtime.num_workers=2", "--set", "runtime.min_workers=1"]
    words += ["--set", "runtime.device=cuda", "--set", "runtime.grace_seconds=60", "--image", "registry.example/g:1"]
    settings, _policy, job = found = render(tmp_path / "out", *words)
    for document in found:
        check(document)
    name = kubernetes_name("Big_Run.1")
    assert re.fullmatch(r"big-run-1-[0-9a-f]{6}", name)
    assert {document["metadata"]["name"] for document in found} == {name}
    (tmp_path / "config.yaml").write_text(settings["data"]["config.yaml"])
    config = load_config(tmp_path / "config.yaml")
    assert (config.name, config.runtime.ray_address, config.runtime.num_workers) == ("Big_Run.1", "auto", 2)
    spec = job["spec"]
    assert spec["entrypoint"].startswith("genrec run /etc/genrec/config.yaml --name Big_Run.1 --store /shared/store")
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "75"}}
    assert spec["shutdownAfterJobFinishes"]
    assert spec["backoffLimit"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["ttlSecondsAfterFinished"] > 0
    counts = {
        g["groupName"]: (g["replicas"], g["minReplicas"], g["maxReplicas"])
        for g in spec["rayClusterSpec"]["workerGroupSpecs"]
    }
    assert counts["gpu"] == (1, 1, 2)
    assert counts["cpu"][:2] == (0, 0)
    assert {pod["spec"]["containers"][0]["image"] for pod in pods(job)} == {"registry.example/g:1"}
    head, *others = [pod["spec"] for pod in pods(job)]
    mount = {"name": "config", "mountPath": "/etc/genrec", "readOnly": True}
    assert mount in head["containers"][0]["volumeMounts"]
    assert not [spec for spec in others if mount in spec["containers"][0]["volumeMounts"]]


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--store", "/elsewhere/store"], "--store"),
        (["--runs", "relative"], "--runs"),
        (["--set", "fusion.dims=3"], "fusion.dims"),
        (["--set", "runtime.backend=local"], "runtime.backend"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(tmp_path, words, where):
    command = [
        "submit",
        str(ROOT / "configs" / "quickstart.yaml"),
        "--store",
        "/shared/store",
        "--runs",
        "/shared/runs",
    ]
    done = CliRunner().invoke(app, [*command, "--render", "kuberay", "--out", str(tmp_path / "out"), *words])
    assert done.exit_code == 2
    assert where in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", [".", "notes.txt"], ids=["other files", "no folder"])
def test_what_is_in_the_way_is_left_alone(tmp_path, out):
    (tmp_path / "notes.txt").write_text("mine")
    command = ["submit", str(ROOT / "configs" / "quickstart.yaml"), "--store", "/shared/s", "--runs", "/shared/r"]
    done = CliRunner().invoke(app, [*command, "--render", "kuberay", "--out", str(tmp_path / out)])
    assert done.exit_code == 2
    assert "--out" in done.output
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("notes.txt", "mine")]


@pytest.mark.parametrize("name", ["a", "run-1", "A", "x" * 100, "a.b", "-".join("ab" * 30), "9_"])
def test_kubernetes_names(name):
    made = kubernetes_name(name)
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", made)
    assert len(made) <= 40
    assert (made == name) == bool(re.fullmatch(r"[a-z0-9-]{1,32}", name))
