# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
"""The host side of PAM: read the stacks, write profiles, have pam-auth-update make the stacks anew."""

from __future__ import annotations

from collections.abc import Sequence

from ansible_collections.censuschat.infra.plugins.module_utils.node import plan_pam
from ansible_collections.censuschat.infra.plugins.module_utils.node.plan_pam import (
    SERVICES,
    STACKS,
    Profile,
    ServiceLine,
)
from ansible_collections.censuschat.infra.plugins.module_utils.node.state_model import Action
from ansible_collections.censuschat.infra.plugins.module_utils.node.system import (
    Commands,
    NodeError,
    observe_path,
    write_atomically,
)


def observe(profiles: Sequence[Profile], lines: Sequence[ServiceLine]) -> dict[str, str | None]:
    """The texts of the profiles, the stacks and the services' files; None for a file that is not there."""
    paths = [*(p.path for p in profiles), *(line.path for line in lines)]
    paths += [f"{SERVICES}/{name}" for names in STACKS.values() for name in names] if profiles else []
    return {path: observe_path(path, read=True).content for path in dict.fromkeys(paths)}


def update(actions: Sequence[Action], commands: Commands) -> None:
    """Write the profiles and enable or disable them, all in one pam-auth-update."""
    for action in actions:
        if action.kind == "pam_profile":
            write_atomically(action.target, action.payload.content, "root", "root", 0o644)
    enable = [a.payload.name for a in actions if a.kind == "pam_enable"]
    disable = [a.payload.name for a in actions if a.kind == "pam_disable"]
    if not enable and not disable:
        return
    argv = ["pam-auth-update", "--package"]
    argv += ["--enable", *enable] if enable else []
    argv += ["--disable", *disable] if disable else []
    done = commands.run(argv, env={"DEBIAN_FRONTEND": "noninteractive"})
    said = done.tail(4)
    if done.code != 0 or "Local modifications" in said:
        raise NodeError(
            f"pam-auth-update did not take {', '.join([*enable, *disable])}: {said}; files of {SERVICES} were changed "
            "by hand: bring those changes into a profile, then run `pam-auth-update --force` once"
        )


def write_lines(actions: Sequence[Action]) -> None:
    """Change the services' files, one line after the other."""
    for action in actions:
        want: ServiceLine = action.payload
        now = observe_path(want.path, read=True)
        text = now.content or ""
        after = plan_pam.with_arguments(text, want) if want.module else plan_pam.with_line(text, want)
        write_atomically(want.path, after, now.owner, now.group, now.mode)
