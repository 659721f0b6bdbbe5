# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The pure part of an sshd change: rendering, the plan, and the judgement whether a login survives it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action, UnitState
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import NodeError, PathState, shown

MAIN = "/etc/ssh/sshd_config"
DROP_IN_DIRECTORY = "/etc/ssh/sshd_config.d"
# sshd takes the first value it reads, so our file has to sort before the others.
DROP_IN = f"{DROP_IN_DIRECTORY}/00-censuschat.conf"
INCLUDE = f"Include {DROP_IN_DIRECTORY}/*.conf"
HEADER = "# Managed by censuschat.infra.sshd_config; local changes are overwritten.\n"
# The same settings at the top of the main file, for programs that judge an sshd by that file alone.
BLOCK_BEGIN = "# BEGIN censuschat.infra.sshd_config"
BLOCK_END = "# END censuschat.infra.sshd_config"
_ASLEEP = "# censuschat.infra.sshd_config: "
# Where sshd is started by its socket, systemd listens, not sshd: its ports are the socket's.
SOCKET_DROP_IN = "/etc/systemd/system/ssh.socket.d/00-censuschat.conf"

# Of SetEnv, PermitOpen and PermitListen sshd takes the first line only (tried with 9.2), so these are not among them.
_REPEATED = {"port", "listenaddress", "hostkey", "acceptenv", "subsystem"}
_COMMAS = {
    "casignaturealgorithms",
    "ciphers",
    "hostbasedacceptedalgorithms",
    "hostkeyalgorithms",
    "kexalgorithms",
    "macs",
    "pubkeyacceptedalgorithms",
}
_STRUCTURE = {"match", "include"}
_CRITERIA = {"user", "group", "host", "localaddress", "localport", "rdomain", "address"}
# What ssh.socket and the rest of the node go by stands in the one drop-in of all of it.
_SHARED = {"port", "listenaddress"}
# Who may log in stands in one file only, so that nobody has to look in two.
_WHO = {"allowusers", "allowgroups", "denyusers", "denygroups"}


@dataclasses.dataclass(frozen=True)
class Login:
    """The login that has to survive: who, from where, to which address and port, with which key types."""

    user: str
    groups: tuple[str, ...] = ()
    client: str = ""
    server: str = ""
    port: int = 0
    key_types: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Match:
    """Settings for the connections that `criteria` (sshd_config(5), without the word Match) select."""

    criteria: str
    settings: Mapping[str, Any]

    def lines(self) -> list[str]:
        """The block; NodeError when its criteria select everybody or nothing that sshd knows."""
        words = self.criteria.split()
        names = [word.lower() for word in words[::2]]
        if "\n" in self.criteria or len(words) % 2 or not words or not set(names) <= _CRITERIA:
            raise NodeError(
                f"sshd matches: {self.criteria!r} is not a list of criteria with a pattern each, as in 'Group jumpers' "
                "or 'User backup Address 10.0.0.0/8'"
            )
        if not self.settings:
            raise NodeError(f"sshd matches: {self.criteria} has no settings")
        return [f"Match {self.criteria}", *(f"    {line}" for line in _lines(self.settings))]


@dataclasses.dataclass(frozen=True)
class SshdObserved:
    """sshd's configuration and its running state. `newest` is the configuration file changed last."""

    drop_in: PathState
    main: PathState
    service: UnitState
    socket: UnitState
    newest: PathState
    socket_drop_in: PathState = dataclasses.field(default_factory=lambda: PathState(SOCKET_DROP_IN))

    @property
    def by_socket(self) -> bool:
        """Whether each connection gets a new sshd, which reads the configuration by itself."""
        return self.socket.running and not self.service.running


def value_text(value: Any) -> str:
    """A setting's value as sshd_config writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def lines_of(key: str, value: Any) -> list[str]:
    """The sshd_config lines of one setting; a list is repeated, joined by commas or by spaces as the key needs."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*", key):
        raise NodeError(f"sshd settings: {key!r} is not a keyword of sshd_config")
    if key.lower() in _STRUCTURE:
        raise NodeError(f"sshd settings: {key} blocks are not settings; this module manages global keywords only")
    if not isinstance(value, (list, tuple)):
        values = [value_text(value)]
    elif key.lower() in _REPEATED:
        values = [value_text(v) for v in value]
    else:
        values = [("," if key.lower() in _COMMAS else " ").join(value_text(v) for v in value)]
    for text in values:
        if not text.strip() or "\n" in text:
            raise NodeError(f"sshd settings: {key} needs a value on one line, not {text!r}")
    return [f"{key} {text}" for text in values]


def drop_in_of(name: str) -> str:
    """The path of the drop-in called `name`; "" is the one that holds the node's own settings."""
    if not name:
        return DROP_IN
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise NodeError(f"sshd: {name!r} cannot name a drop-in: use lower-case letters, digits and hyphens")
    return f"{DROP_IN_DIRECTORY}/00-censuschat-{name}.conf"


def _lines(settings: Mapping[str, Any]) -> list[str]:
    """The lines of `settings`, sorted; keys that differ only in case are refused."""
    lowered = [key.lower() for key in settings]
    twice = sorted({key for key in lowered if lowered.count(key) > 1})
    if twice:
        raise NodeError(f"sshd settings: {', '.join(twice)} is given more than once")
    return [line for key in sorted(settings, key=str.lower) for line in lines_of(key, settings[key])]


def render(settings: Mapping[str, Any], matches: Sequence[Match] = ()) -> str:
    """The whole drop-in for `settings`, with the blocks of `matches` after them."""
    lines = [*_lines(settings), *(line for match in matches for line in match.lines())]
    return HEADER + "".join(f"{line}\n" for line in lines)


def includes_drop_ins(main_text: str) -> bool:
    """Whether the main configuration reads the drop-in directory outside a Match block."""
    for line in main_text.splitlines():
        words = line.split()
        if words and words[0].lower() == "match":
            return False
        ours = [w for w in words[1:] if w.strip('"') in (f"{DROP_IN_DIRECTORY}/*.conf", "sshd_config.d/*.conf")]
        if ours and words[0].lower() == "include":
            return True
    return False


def without_block(text: str) -> str:
    """The main file's text without our block, and with the lines that it had put to sleep awake again."""
    kept = []
    inside = False
    for line in text.splitlines(keepends=True):
        if line.startswith((BLOCK_BEGIN, BLOCK_END)):
            inside = line.startswith(BLOCK_BEGIN)
        elif not inside:
            kept.append(line.removeprefix(_ASLEEP))
    return "".join(kept)


def with_block(text: str, settings: Mapping[str, Any]) -> str:
    """The main file's text with `settings` in a block at its top; other global lines of the same keywords sleep.

    Keywords that add up when they are repeated, and those that say who may log in, stay in the drop-in only.
    """
    chosen = {k: v for k, v in settings.items() if k.lower() not in _REPEATED | _WHO}
    rest = []
    everyone = True
    for line in without_block(text).splitlines(keepends=True):
        word = line.split()[0].lower() if line.split() else ""
        everyone = everyone and word != "match"
        rest.append(f"{_ASLEEP}{line}" if everyone and word in {key.lower() for key in chosen} else line)
    lines = [f"{line}\n" for key in sorted(chosen, key=str.lower) for line in lines_of(key, chosen[key])]
    block = f"{BLOCK_BEGIN}\n{''.join(lines)}{BLOCK_END}\n" if lines else ""
    return block + "".join(rest)


def socket_text(settings: Mapping[str, Any]) -> str:
    """The drop-in of ssh.socket for the ports and addresses of `settings`; "" when they speak of none."""
    lowered = {key.lower(): value for key, value in settings.items()}
    ports = _many(lowered.get("port", 22))
    addresses = _many(lowered.get("listenaddress", []))
    if not addresses and "port" not in lowered:
        return ""
    entries = []
    for address in addresses:
        # An address that names its own port keeps it; an IPv6 address has colons without naming one.
        own = re.fullmatch(r"(\[[^]]+\]|[^:]+):[0-9]+", address)
        bare = f"[{address}]" if ":" in address and not address.startswith("[") else address
        entries += [address] if own else [f"{bare}:{port}" for port in ports]
    lines = [f"ListenStream={entry}\n" for entry in (entries or ports)]
    return f"{HEADER}[Socket]\nListenStream=\n{''.join(lines)}"


def _many(value: Any) -> list[str]:
    return [value_text(one) for one in (value if isinstance(value, (list, tuple)) else [value])]


def plan(
    settings: Mapping[str, Any], observed: SshdObserved, *, in_main: bool = False, matches: Sequence[Match] = ()
) -> list[Action]:
    """What to write, and whether the running sshd has to read its configuration again.

    `in_main` has the settings stand at the top of the main file too; a block that is there is always kept up.
    A drop-in with a name of its own (`observed.drop_in.path`) leaves that block and the socket to the nameless one.
    """
    actions = []
    wanted = render(settings, matches)
    target = observed.drop_in.path
    if observed.drop_in.content != wanted:
        actions.append(Action("sshd_file", target, "content", wanted, shown(observed.drop_in.content), wanted))
    if target == DROP_IN:
        actions += _plan_main(settings, observed, in_main)
        actions += _plan_socket(settings, observed)
    else:
        shared = [key for key in settings if key.lower() in _SHARED]
        if in_main or shared:
            what = ", ".join(shared) or "in_main"
            raise NodeError(f"sshd settings: {what} belongs to the drop-in without a name")
        if not includes_drop_ins(without_block(observed.main.content or "")):
            raise NodeError(f"{MAIN} does not read {DROP_IN_DIRECTORY}: add `{INCLUDE}` as its first line")
    if observed.service.running:
        if actions:
            actions.append(Action("sshd_reload", "ssh.service", "its configuration changes"))
        elif observed.newest.ctime > max(observed.service.changed_at, observed.service.active_since):
            actions.append(
                Action("sshd_reload", "ssh.service", f"{observed.newest.path} is newer than what sshd last read")
            )
    return actions


def _plan_main(settings: Mapping[str, Any], observed: SshdObserved, in_main: bool) -> list[Action]:
    main = observed.main.content or ""
    after = without_block(main)
    detail = "read the drop-ins first"
    if not includes_drop_ins(after):
        after = f"{INCLUDE}\n{after}"
    elif in_main or BLOCK_BEGIN in main:
        detail = "the settings at its top"
    if in_main or BLOCK_BEGIN in main:
        after = with_block(after, settings)
    return [Action("sshd_file", MAIN, detail, after, shown(main), shown(after))] if after != main else []


def _plan_socket(settings: Mapping[str, Any], observed: SshdObserved) -> list[Action]:
    wanted = socket_text(settings)
    now = observed.socket_drop_in.content or ""
    if not observed.socket.running or wanted == now:
        return []
    payload = wanted or None
    return [
        Action("sshd_file", SOCKET_DROP_IN, "its ports", payload, shown(now), wanted or "absent\n"),
        Action("sshd_socket", "ssh.socket", "listens elsewhere"),
    ]


def stale_keys(settings: Mapping[str, Any], observed: SshdObserved, *, in_main: bool = False) -> list[str]:
    """The settings that the present drop-in, or our block in the main file, does not hold as wanted."""
    now = (observed.drop_in.content or "").splitlines()
    main = observed.main.content or ""
    block = main[: main.find(BLOCK_END)].splitlines() if BLOCK_BEGIN in main else []
    found = []
    for key, value in settings.items():
        alone = key.lower() in _REPEATED | _WHO or not (in_main or block)
        if any(line not in now or not (alone or line in block) for line in lines_of(key, value)):
            found.append(key)
    return found


def parse_effective(text: str) -> dict[str, list[str]]:
    """`sshd -T`: lower-case keyword to its values, one per line."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _separator, value = line.partition(" ")
        found.setdefault(key.lower(), []).append(value.strip())
    return found


def overruled(
    settings: Mapping[str, Any], alone: Mapping[str, Sequence[str]], whole: Mapping[str, Sequence[str]]
) -> list[str]:
    """Settings that some other part of the configuration decides otherwise.

    `alone` is what sshd makes of our file by itself, `whole` of the complete configuration: comparing
    the two needs no table of how sshd spells its values.
    """
    found = []
    for key in settings:
        mine, all_of_it = alone.get(key.lower(), []), whole.get(key.lower(), [])
        if sorted(mine) != sorted(all_of_it):
            found.append(f"{key} would stay {' '.join(all_of_it) or 'unset'} although {' '.join(mine)} is wanted")
    return found


def login_problem(effective: Mapping[str, Sequence[str]], login: Login) -> str:
    """Why `login` would not get in under `effective` (as `sshd -T -C` printed it); "" when it would."""

    def one(key: str, default: str) -> str:
        return (effective.get(key) or [default])[0]

    for pattern in effective.get("denyusers", []):
        if _user_matches(pattern, login):
            return f"DenyUsers {pattern} shuts out {login.user}"
    allowed = effective.get("allowusers", [])
    if allowed and not any(_user_matches(p, login) for p in allowed):
        return f"AllowUsers {' '.join(allowed)} does not let {login.user} in"
    for pattern in effective.get("denygroups", []):
        if any(_matches(pattern, g) for g in login.groups):
            return f"DenyGroups {pattern} shuts out {login.user} by its groups"
    groups = effective.get("allowgroups", [])
    if groups and not any(_matches(p, g) for p in groups for g in login.groups):
        return f"AllowGroups {' '.join(groups)} holds none of {login.user}'s groups"
    if login.user == "root" and one("permitrootlogin", "yes") in ("no", "forced-commands-only"):
        return f"PermitRootLogin {one('permitrootlogin', 'yes')} shuts out root, who is the login of this run"
    if one("pubkeyauthentication", "yes") != "yes":
        return f"PubkeyAuthentication no leaves {login.user} without its key"
    methods = one("authenticationmethods", "any").split()
    if "any" not in methods and "publickey" not in methods:
        return f"AuthenticationMethods {' '.join(methods)} asks {login.user} for more than its key"
    if one("maxsessions", "10") == "0":
        return f"MaxSessions 0 leaves {login.user} without a session"
    if one("forcecommand", "none") != "none":
        return f"ForceCommand {one('forcecommand', 'none')} replaces the commands of {login.user}"
    if one("chrootdirectory", "none") != "none":
        return f"ChrootDirectory {one('chrootdirectory', 'none')} locks {login.user} into a part of the node"
    if one("authorizedkeyscommand", "none") == "none":
        accepted = one("pubkeyacceptedalgorithms", "").split(",")
        if not login.key_types:
            return f"none of AuthorizedKeysFile {one('authorizedkeysfile', '')} holds a key of {login.user}"
        if accepted != [""] and not any(a in accepted for t in login.key_types for a in algorithms(t)):
            return f"PubkeyAcceptedAlgorithms takes none of {login.user}'s keys ({', '.join(login.key_types)})"
    listening = effective.get("listenaddress", [])
    if login.port and listening and not any(_listens(entry, login) for entry in listening):
        return (
            f"sshd would listen on {', '.join(listening)} only, and this run came in at {login.server}:{login.port}: "
            "first listen on the old and the new port (Port as a list), then point ansible_port at the new one, "
            "then drop the old one"
        )
    return ""


def algorithms(key_type: str) -> tuple[str, ...]:
    """The signature algorithms a key of this type can be used with."""
    if key_type == "ssh-rsa":
        return ("rsa-sha2-512", "rsa-sha2-256", "ssh-rsa")
    return (key_type,)


def _listens(entry: str, login: Login) -> bool:
    address, _colon, port = entry.rpartition(":")
    address = address.strip("[]")
    anywhere = address == ("0.0.0.0" if "." in login.server else "::")  # noqa: S104 (read from sshd, not bound to)
    return port == str(login.port) and (anywhere or address == login.server)


def _matches(pattern: str, text: str) -> bool:
    expression = "".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in pattern)
    return re.fullmatch(expression, text) is not None


def _user_matches(pattern: str, login: Login) -> bool:
    user, at, host = pattern.partition("@")
    if not _matches(user, login.user):
        return False
    # A network in CIDR form is left to the live proof: only sshd knows how it sees the client.
    return not at or "/" in host or _matches(host, login.client)
