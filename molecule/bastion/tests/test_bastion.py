"""A bastion: a jumper gets to the other nodes' sshd and to nothing else; the operator is as before."""

from __future__ import annotations

from testinfra.host import Host

JUMPER = "sshd -T -C user=ada,host=jump.example.com,addr=10.77.0.2"
OPERATOR = "sshd -T -C user=ops,host=jump.example.com,addr=10.77.0.2"


def settings(host: Host, command: str) -> dict[str, str]:
    pairs = (line.partition(" ") for line in host.check_output(command).splitlines())
    return {name: value for name, _space, value in pairs}


def test_a_jumper_has_no_session_and_the_other_nodes_only(host: Host) -> None:
    found = settings(host, JUMPER)
    assert found["maxsessions"] == "0"
    assert found["permittty"] == "no"
    assert found["allowtcpforwarding"] == "local"
    targets = found["permitopen"].split()
    assert "edge-12:22" in targets and "10.77.9.17:22" in targets
    own = host.check_output("hostname -I").split()[0]
    assert f"{own}:22" not in targets
    assert all(target.endswith(":22") for target in targets)


def test_the_operator_keeps_his_sessions(host: Host) -> None:
    found = settings(host, OPERATOR)
    assert int(found["maxsessions"]) > 0
    assert found["forcecommand"] == "none"


def test_a_jumpers_key_is_roots_file_and_the_only_one(host: Host) -> None:
    keys = host.file("/etc/ssh/censuschat-bastion")
    assert keys.listdir() == ["ada"]
    key = host.file("/etc/ssh/censuschat-bastion/ada")
    assert (key.user, key.mode & 0o022) == ("root", 0)
    assert key.content_string.startswith('restrict,port-forwarding,from="10.77.0.0/24" ssh-ed25519 ')
    assert host.user("ada").shell == "/usr/sbin/nologin"


def test_the_table_that_limits_and_logs_is_loaded(host: Host) -> None:
    assert host.service("censuschat-bastion-table.service").is_running
    assert "censuschat-bastion jump" in host.check_output("nft list table inet censuschat_bastion")


def test_a_jump_to_another_node_is_possible_and_a_command_is_not(host: Host) -> None:
    """With a key made here, as the node itself would let its jumper in: the proof is sshd's, not a file's."""
    script = """set -eu
place=$(mktemp -d); trap 'rm -rf "$place"; mv "$place.kept" /etc/ssh/censuschat-bastion/ada' EXIT
cp -p /etc/ssh/censuschat-bastion/ada "$place.kept"
ssh-keygen -q -t ed25519 -N '' -f "$place/key"
printf 'restrict,port-forwarding %s\\n' "$(cat "$place/key.pub")" > /etc/ssh/censuschat-bastion/ada
options="-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -i $place/key"
timeout 20 ssh $options -W 10.77.9.17:22 ada@127.0.0.1 < /dev/null | head -c 7; echo
timeout 20 ssh $options ada@127.0.0.1 id && echo "a command ran" || echo refused
timeout 20 ssh $options -W 10.77.0.2:3142 ada@127.0.0.1 < /dev/null > "$place/out" 2>&1 && echo astray || echo refused
"""
    done = host.run("sh -c %s", script)
    assert done.stdout.splitlines() == ["SSH-2.0", "refused", "refused"], done.stderr
