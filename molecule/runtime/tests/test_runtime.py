"""A node on which a kubelet can run: containerd serves with its pinned settings, the kubelet waits for a cluster."""

from __future__ import annotations

from testinfra.host import Host


def test_containerd_serves_and_has_its_image(host: Host) -> None:
    assert host.service("containerd.service").is_running
    assert host.service("containerd.service").is_enabled
    assert host.run("ctr version").rc == 0
    assert "registry.k8s.io/pause:" in host.check_output("ctr --namespace k8s.io images list --quiet")


def test_containerd_runs_with_the_settings_of_its_file(host: Host) -> None:
    dump = host.check_output("containerd config dump")
    assert "restrict_oom_score_adj = true" in dump
    assert "SystemdCgroup = true" not in dump


def test_the_programs_are_those_of_one_version(host: Host) -> None:
    kubelet = host.check_output("kubelet --version").split()[-1]
    assert kubelet in host.check_output("kubeadm version -o short")
    assert host.file("/usr/local/bin/kubelet").linked_to == f"/opt/kubernetes/{kubelet}/bin/kubelet"


def test_the_kubelet_is_enabled_and_waits(host: Host) -> None:
    assert host.service("kubelet.service").is_enabled
    settings = host.file("/etc/kubernetes/kubelet.conf.d/10-censuschat.conf")
    assert settings.mode == 0o600
    assert "anonymous:" in settings.content_string


def test_packets_are_forwarded(host: Host) -> None:
    assert host.sysctl("net.ipv4.ip_forward") == 1


def test_swap_stays_off_and_crictl_finds_the_runtime(host: Host) -> None:
    assert host.service("censuschat-no-swap.service").is_enabled
    assert "unix:///run/containerd/containerd.sock" in host.file("/etc/crictl.yaml").content_string
    assert host.file("/etc/modules-load.d/censuschat-kubernetes.conf").contains("br_netfilter")
