"""`genrec submit --render`: a run as files for a cluster manager instead of a submitted job.

Reads the files of cluster/, which work by themselves; writes copies in which the run's configuration, folders and
number of workers stand. Nothing is sent, and no secret is written: the token is named as a Secret or a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import sysconfig
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from genrec_dist import __version__
from genrec_dist.artifacts.files import write_atomic
from genrec_dist.artifacts.places import CACHE_VARIABLE, folder_only, is_url
from genrec_dist.config import Config, RuntimeConfig, dump_config
from genrec_dist.errors import ConfigError
from launcher.submit import STOP_MARGIN_SECONDS, command_of

MOUNTED_CONFIG = "/etc/genrec/config.yaml"
IMAGE = f"genrec:{__version__}"
SHARED = PurePosixPath("/shared")
"""Where the pods mount the shared volume."""
RETRIES, DEADLINE_SECONDS, KEEP_SECONDS = 2, 7 * 24 * 3600, 600
"""Of a RayJob: new clusters after a failure, its longest life, and how long its pods stay after the end."""


def render_files(
    kind: str, config: Config, *, store: str, runs: str, folder: Path | None, image: str | None, console: Console
) -> None:
    """Write the files of one kind ('kuberay', 'slurm' or 'ray-up') and say what to do with them.

    Raises:
        ConfigError: the folder holds other files, or a setting does not go with the kind.
    """
    folder = folder or Path(f"{config.name}-{kind}")
    if image is not None and kind != "kuberay":
        raise ConfigError("an image goes with --render kuberay only", where="--image", got=image)
    files, steps = {
        "kuberay": lambda: kuberay(config, store, runs, folder, image),
        "slurm": lambda: slurm(config, store, runs, folder),
        "ray-up": lambda: ray_up(config, store, runs, folder),
    }[kind]()
    if folder.exists() and not folder.is_dir():
        raise ConfigError("not a folder", where="--out", got=folder, fix="name the folder that gets the files")
    others = sorted(path.name for path in folder.iterdir() if path.name not in files) if folder.is_dir() else []
    if others:
        raise ConfigError("the folder holds other files", where="--out", got=f"{folder}: {', '.join(others[:5])}")
    for name, text in files.items():
        write_atomic(folder / name, text.encode())
    console.print(escape(f"{folder}: {', '.join(files)}"), soft_wrap=True)
    if config.runtime.device == "auto":
        console.print("note: runtime.device=auto: no GPU is asked for; --set runtime.device=cuda does", soft_wrap=True)
    for step in steps:
        console.print(escape(f"  {step}"), soft_wrap=True)


def template(name: str) -> str:
    """Text of a file of cluster/: beside the sources, or where an installed package keeps its data."""
    places = [Path(__file__).resolve().parents[1], Path(sysconfig.get_path("data")) / "share" / "genrec_dist"]
    for place in places:
        if (place / "cluster" / name).is_file():
            return (place / "cluster" / name).read_text(encoding="utf-8")
    raise ConfigError(
        "the files of cluster/ are missing",
        where=name,
        expected=f"in one of {[str(place / 'cluster') for place in places]}",
        fix="install genrec_dist again, or work in its source folder",
    )


def workers(runtime: RuntimeConfig) -> tuple[int, int]:
    """Fewest and most nodes that the run has a use for, one worker each."""
    least = runtime.min_workers or runtime.num_workers
    return least, max(runtime.num_workers, runtime.num_embed_workers)


def kuberay(config: Config, store: str, runs: str, folder: Path, image: str | None) -> tuple[dict[str, str], list[str]]:
    """A RayJob with a cluster of its own: the pods of kuberay/raycluster.yaml.

    Raises:
        ConfigError: a folder that is not on the volume that the pods mount.
    """
    for option, value in (("--store", store), ("--runs", runs)):
        if not is_url(value) and not PurePosixPath(value).is_relative_to(SHARED):
            raise ConfigError(
                "the pods see no such folder",
                where=option,
                got=value,
                expected=f"a folder below {SHARED}, where the volume is mounted, or s3://BUCKET/PREFIX",
            )
    name = kubernetes_name(config.name)
    policy, cluster = _documents("kuberay/raycluster.yaml")
    spec = cluster["spec"]
    head, groups = spec["headGroupSpec"], spec["workerGroupSpecs"]
    on_gpu = config.runtime.device == "cuda"
    least, most = workers(config.runtime)
    for group in groups:
        if group["groupName"] == ("gpu" if on_gpu else "cpu"):
            group |= {"replicas": least, "minReplicas": least, "maxReplicas": most}
        else:
            group |= {"replicas": 0, "minReplicas": 0}
    templates = [head["template"], *(group["template"] for group in groups)]
    for pod in templates:
        container = pod["spec"]["containers"][0]
        container["image"] = image or (f"{IMAGE}-gpu" if on_gpu else container["image"])
    head["template"]["spec"]["containers"][0]["volumeMounts"].append(
        {"name": "config", "mountPath": str(PurePosixPath(MOUNTED_CONFIG).parent), "readOnly": True}
    )
    head["template"]["spec"]["volumes"].append({"name": "config", "configMap": {"name": name}})
    submitter = {
        "metadata": {"labels": dict(head["template"]["metadata"]["labels"])},
        "spec": _submitter(head["template"]["spec"]),
    }
    stop_seconds = str(math.ceil(config.runtime.grace_seconds) + STOP_MARGIN_SECONDS)
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": {}},
        "spec": {
            "entrypoint": shlex.join(["genrec", *command_of(config, store, runs, MOUNTED_CONFIG)]),
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": stop_seconds}}),
            "backoffLimit": RETRIES,
            "activeDeadlineSeconds": DEADLINE_SECONDS,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEEP_SECONDS,
            "submitterPodTemplate": submitter,
            "rayClusterSpec": spec,
        },
    }
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": {}},
        "data": {PurePosixPath(MOUNTED_CONFIG).name: dump_config(config)},
    }
    policy["metadata"]["name"] = name
    selectors = [policy["spec"]["podSelector"]["matchLabels"]]
    selectors.append(policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"])
    labels = [one["metadata"]["labels"] for one in (policy, job, settings, submitter, *templates)]
    for one in labels + selectors:
        one |= {"app.kubernetes.io/part-of": "genrec", "app.kubernetes.io/instance": name}
    text = "# Written by `genrec submit --render kuberay`; the pods are those of cluster/kuberay/raycluster.yaml.\n"
    text += yaml.dump_all([settings, policy, job], Dumper=_NoAliases, sort_keys=False, width=120)
    files = {"storage.yaml": template("kuberay/storage.yaml"), "rayjob.yaml": text}
    steps = [
        f"once:  kubectl apply -f {folder / 'storage.yaml'}",
        "once:  kubectl create secret generic genrec-ray-token --from-file=auth_token=TOKEN_FILE",
        f"run:   kubectl apply -f {folder / 'rayjob.yaml'}",
        f"watch: kubectl get rayjob {name}",
        f"stop, or before the next time: kubectl delete -f {folder / 'rayjob.yaml'}; the same file again resumes",
    ]
    return files, steps


def _documents(name: str) -> list[Any]:
    """The documents of a YAML template, nothing shared between them that YAML's anchors join."""
    return json.loads(json.dumps(list(yaml.safe_load_all(template(name)))))


def _submitter(head: dict[str, Any]) -> dict[str, Any]:
    """The pod that runs `ray job submit`: the head's image and rights, nothing mounted but scratch."""
    first = head["containers"][0]
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": head["securityContext"],
        "containers": [
            {
                "name": "ray-job-submitter",
                "image": first["image"],
                "env": [{"name": "HOME", "value": "/tmp"}],
                "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
                "securityContext": first["securityContext"],
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
            }
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }


def kubernetes_name(name: str) -> str:
    """A run's name as a name of Kubernetes objects; what is lost is made up for by a hash."""
    plain = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:32].strip("-")
    if plain == name:
        return name
    return f"{plain or 'run'}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def slurm(config: Config, store: str, runs: str, folder: Path) -> tuple[dict[str, str], list[str]]:
    """The script of cluster/slurm with the run's settings; the script itself sets the address of its Ray.

    Raises:
        ConfigError: the runs are in a bucket; the job keeps Ray's token in their folder.
    """
    runtime = config.runtime
    folder_only(runs, "--runs")
    text = template("slurm/genrec.sbatch")
    for start, value in {
        "#SBATCH --job-name=": config.name,
        "#SBATCH --nodes=": str(workers(runtime)[1]),
        "#SBATCH --gpus-per-node=": "1" if runtime.device == "cuda" else "0",
        "config=": shlex.quote(str(folder.resolve() / "config.yaml")),
        "name=": shlex.quote(config.name),
        "store=": shlex.quote(store),
        "runs=": shlex.quote(runs),
    }.items():
        text, found = re.subn(rf"(?m)^{re.escape(start)}.*$", lambda _: start + value, text)  # noqa: B023
        assert found == 1, start
    files = {"genrec.sbatch": text, "config.yaml": dump_config(config)}
    steps = [
        f"note: all nodes have to see {folder.resolve()}",
        "set partition, account, time and cores at the top of the script, then, with the environment active:",
        f"run:   sbatch {folder / 'genrec.sbatch'}",
        "stop:  scancel --batch --signal=TERM JOB saves a checkpoint and queues the job again; then: scancel JOB",
    ]
    return files, steps


def ray_up(config: Config, store: str, runs: str, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Cluster files for `ray up`, and the configuration to submit to what comes up."""
    least, most = workers(config.runtime)
    files = {"config.yaml": dump_config(config)}
    for name in ("on-premise.yaml", "aws.yaml"):
        text = template(f"ray-up/{name}")
        if name == "aws.yaml":
            group = "gpu" if config.runtime.device == "cuda" else "cpu"
            text, found = re.subn(
                rf"(?m)(^  {group}:\n)    min_workers: \d+\n    max_workers: \d+\n",
                rf"\1    min_workers: {least}" + "\n" + f"    max_workers: {most}\n",
                text,
            )
            assert found == 1, group
            text, found = re.subn(r"(?m)^max_workers: \d+$", f"max_workers: {most}", text)
            assert found == 1
        files[name] = text
    submit = ["genrec", "submit", str(folder / "config.yaml"), "--store", store, "--runs", runs]
    steps = [
        "replace the words in capital letters in on-premise.yaml or aws.yaml (here CLUSTER), then",
        "once:  ray get-auth-token --generate",
        "start: ray up CLUSTER",
        "open:  ray dashboard CLUSTER    (forwards port 8265 while it runs)",
        f"run:   {shlex.join(submit)} --address http://127.0.0.1:8265",
        "end:   ray down CLUSTER",
    ]
    if is_url(store) or is_url(runs):
        steps.insert(0, f"note: {CACHE_VARIABLE} has to name a folder that all nodes share, in the files' commands")
    return files, steps


class _NoAliases(yaml.SafeDumper):
    """YAML that is read by people: what is said twice is written twice, and text of several lines stays so."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_NoAliases.add_representer(str, _text)
