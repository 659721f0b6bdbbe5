"""`scripts/bench apply`: a set of objects applied by `kubectl apply --server-side`, kubernetes.core.k8s and k8s_apply.

Each applies the same mixture of objects (ConfigMaps, Deployments, Secrets, ServiceAccounts, Roles) to namespaces of its
own in one fresh API server on loopback, first and again unchanged. kubectl is timed bare, as a process. A module is
timed as a task of a play, from its start to its result (the callback profile_tasks), so with all that Ansible adds to
each task. The second line has the whole ansible-playbook: what starting a play costs, however many tasks it has.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lab.paths import REPO
from tests.local_cluster import LocalCluster

BIN = Path(sys.executable).parent
NAMESPACE_OBJECTS = 500
"""Objects in one namespace."""


def objects(count: int, prefix: str) -> list[dict[str, Any]]:
    """`count` objects, their namespaces among them."""
    namespaces = [f"{prefix}-{index}" for index in range(max(1, count // NAMESPACE_OBJECTS))]
    found: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in namespaces
    ]
    for index in range(count - len(found)):
        labels = {"app.kubernetes.io/name": f"service-{index}", "app.kubernetes.io/part-of": "benchmark"}
        metadata = {"name": f"service-{index}", "namespace": namespaces[index % len(namespaces)], "labels": labels}
        found.append({**_body(index, labels), "metadata": metadata})
    return found


def _body(index: int, labels: dict[str, str]) -> dict[str, Any]:
    match index % 5:
        case 0:
            return {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "data": {"config.yml": "setting: value\n" * 20, "number": str(index)},
            }
        case 1:
            container = {
                "name": "main",
                "image": "registry.example.com/service:1",
                "ports": [{"name": "http", "containerPort": 8080}],
                "env": [{"name": "LEVEL", "value": "info"}, {"name": "NUMBER", "value": str(index)}],
                "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}},
                "readinessProbe": {"httpGet": {"path": "/readyz", "port": "http"}, "periodSeconds": 5},
            }
            template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
            spec = {"replicas": 2, "selector": {"matchLabels": labels}, "template": template}
            return {"apiVersion": "apps/v1", "kind": "Deployment", "spec": spec}
        case 2:
            return {"apiVersion": "v1", "kind": "Secret", "data": {"password": "aHVudGVyMg=="}}
        case 3:
            return {"apiVersion": "v1", "kind": "ServiceAccount", "automountServiceAccountToken": False}
        case _:
            rules = [{"apiGroups": [""], "resources": ["pods", "services"], "verbs": ["get", "list", "watch"]}]
            return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "rules": rules}


@dataclass
class Times:
    """Seconds of one contestant, of all repetitions; task: of its Ansible task alone."""

    whole: list[float] = field(default_factory=list)
    task: list[float] = field(default_factory=list)
    said: str = ""

    @property
    def whole_s(self) -> float:
        return statistics.median(self.whole)

    @property
    def task_s(self) -> float:
        return statistics.median(self.task)


class Bench:
    """One API server and what is timed against it."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.environment = {
            **os.environ,
            "ANSIBLE_CALLBACKS_ENABLED": "ansible.posix.profile_tasks",
            "ANSIBLE_NOCOLOR": "1",
            "COLUMNS": "200",
        }

    def kubectl(self, manifest: Path, times: Times) -> None:
        begun = time.monotonic()
        self.cluster.kubectl("apply", "--server-side", "-f", str(manifest))
        times.whole.append(time.monotonic() - begun)

    def ours(self, manifest: Path, times: Times) -> None:
        task = {
            "name": "Apply",
            "censuschat.infra.k8s_apply": {"kubeconfig": str(self.cluster.kubeconfig), "src": [str(manifest)]},
            "register": "applied",
        }
        said = {
            "name": "Tell",
            "ansible.builtin.debug": {
                "msg": "requests={{ applied.requests }} rss_mib={{ (applied.max_rss_kib / 1024) | round(1) }} "
                "module_s={{ applied.seconds.values() | sum | round(2) }}"
            },
        }
        text = self._play(manifest, "ours", [task, said], times)
        found = re.search(r"requests=.*module_s=[0-9.]+", text)
        times.said = found.group(0) if found else ""

    def k8s_module(self, manifest: Path, times: Times) -> None:
        task = {
            "name": "Apply",
            "kubernetes.core.k8s": {
                "kubeconfig": str(self.cluster.kubeconfig),
                "src": str(manifest),
                "apply": True,
                "server_side_apply": {"field_manager": "k8s-module"},
            },
        }
        self._play(manifest, "k8s-module", [task], times)

    def _play(self, manifest: Path, name: str, tasks: list[dict[str, Any]], times: Times) -> str:
        playbook = manifest.with_suffix(f".{name}.play")
        playbook.write_text(
            yaml.safe_dump([{"name": "Benchmark", "hosts": "localhost", "gather_facts": False, "tasks": tasks}])
        )
        begun = time.monotonic()
        done = subprocess.run(
            [
                str(BIN / "ansible-playbook"),
                "-i",
                "localhost,",
                "-c",
                "local",
                "-e",
                f"ansible_python_interpreter={sys.executable}",
                str(playbook),
            ],
            env=self.environment,
            cwd=REPO,
            capture_output=True,
            text=True,
        )
        times.whole.append(time.monotonic() - begun)
        if done.returncode:
            raise SystemExit(f"{name} failed: {done.stdout[-3000:]}{done.stderr[-1000:]}")
        found = re.search(r"^Apply -+ ([0-9.]+)s$", done.stdout, re.MULTILINE)
        if not found:
            raise SystemExit(f"profile_tasks did not tell the time of the task: {done.stdout[-3000:]}")
        times.task.append(float(found.group(1)))
        return done.stdout


def compare(bench: Bench, directory: Path, count: int, runs: int) -> None:
    """Times all three `runs` times with `count` objects and prints the medians."""
    contestants = {"kubectl": bench.kubectl, "k8s-module": bench.k8s_module, "ours": bench.ours}
    times = {(name, run): Times() for name in contestants for run in ("first", "noop")}
    for repetition in range(runs):
        for name, contestant in contestants.items():
            manifest = directory / f"{name}-{count}-{repetition}.yaml"
            bodies = objects(count, f"{name}-{count}-{repetition}")
            manifest.write_text(yaml.dump_all(bodies, Dumper=yaml.CSafeDumper))
            for run in ("first", "noop"):
                contestant(manifest, times[name, run])
    for run in ("first", "noop"):
        ours, kubectl, module = (times[name, run] for name in ("ours", "kubectl", "k8s-module"))
        print(
            f"bench apply: objects={count} run={run} ours_s={ours.task_s:.2f} kubectl_s={kubectl.whole_s:.2f} "
            f"k8s_module_s={module.task_s:.2f} ratio={ours.task_s / kubectl.whole_s:.2f}"
        )
        print(
            f"  whole ansible-playbook: ours={ours.whole_s:.2f} s k8s_module={module.whole_s:.2f} s; "
            f"within our module: {ours.said}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench apply", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--objects", type=int, nargs="+", default=[50, 500, 5000], help="sizes of the sets")
    parser.add_argument("--runs", type=int, default=3, help="repetitions of sets of up to 500 objects; larger: one")
    arguments = parser.parse_args()
    with LocalCluster() as cluster:
        bench = Bench(cluster)
        for count in arguments.objects:
            compare(bench, cluster.directory, count, arguments.runs if count <= 500 else 1)


if __name__ == "__main__":
    main()
