# Sourced by the scripts beside it: where the project's environment lives, and how it comes about.
# shellcheck shell=bash
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export CENSUSCHAT_CACHE=${CENSUSCHAT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/censuschat-infra}

say() { printf '==> %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# Installs the Debian packages that are missing, or says plainly what to do where it may not.
machine_has() {
    local package missing=()
    command -v dpkg-query >/dev/null && command -v apt-get >/dev/null ||
        fail "this needs a Debian machine (apt and dpkg were not found); on another system run it in a Debian 12 or 13 virtual machine"
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    [ "$(id -u)" = 0 ] || fail "these Debian packages are missing and only root may install them: sudo apt-get install ${missing[*]}"
    say "Installing Debian packages: ${missing[*]}"
    apt-get update -qq || say "apt-get update failed; trying with the package lists that are here"
    # RUNLEVEL=1: packages that bring a daemon do not start it on this machine.
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
}

# The lab starts nodes as privileged containers and makes network namespaces: root only.
lab_machine_ready() {
    [ "$(id -u)" = 0 ] || fail "the lab needs root (it makes network namespaces and privileged nodes): run this with sudo -E"
    machine_has apt-cacher-ng ca-certificates conmon debootstrap iproute2 netavark nftables openssh-client podman runc
}

# Python packages: uv in a virtual environment of its own (a pyenv shim would obey .python-version),
# then the locked, hash-checked environment. The name of an environment is the hash of its lock,
# so "is it current" is one test for a file.
environment_ready() {
    local key venv uv
    key=$(cat "$root/requirements/dev.txt" "$root/.python-version" | sha256sum | cut -c1-16)
    venv=$CENSUSCHAT_CACHE/venv-$key
    uv=$CENSUSCHAT_CACHE/uv/bin/uv
    if [ ! -e "$venv/.complete" ]; then
        mkdir -p "$CENSUSCHAT_CACHE"
        # One of several simultaneous starts prepares, the others wait.
        exec 9>"$CENSUSCHAT_CACHE/venv.lock"
        flock 9
    fi
    if [ ! -e "$venv/.complete" ]; then
        if [ ! -x "$uv" ]; then
            bootstrap_python -c 'import ensurepip' 2>/dev/null || machine_has python3-venv
            say "Installing uv into $CENSUSCHAT_CACHE/uv"
            bootstrap_python -m venv "$CENSUSCHAT_CACHE/uv"
            "$CENSUSCHAT_CACHE/uv/bin/pip" install --quiet --disable-pip-version-check uv
        fi
        say "Installing the locked Python environment into $venv (a minute when nothing is cached)"
        rm -rf "$venv"
        # uv reads .python-version of the directory it runs in.
        (cd "$root" && "$uv" venv --quiet "$venv" && "$uv" pip install --quiet --python "$venv/bin/python" --require-hashes -r requirements/dev.txt)
        touch "$venv/.complete"
        # Environments of superseded locks.
        find "$CENSUSCHAT_CACHE" -maxdepth 1 -name 'venv-*' -type d ! -path "$venv" -mtime +7 -exec rm -rf {} +
    fi
    exec 9>&-
    export VIRTUAL_ENV=$venv PATH="$root/scripts/bin:$venv/bin:$PATH"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    export ANSIBLE_CONFIG="$root/ansible.cfg"
    # Every step of a runbook is a process of its own: without kept bytecode each compiles what it imports anew. In the
    # cache, so that the checkout stays clean.
    export PYTHONPYCACHEPREFIX=$CENSUSCHAT_CACHE/bytecode
    unset PYTHONDONTWRITEBYTECODE
}

# The system's own Python where it can make environments: a pyenv shim fails when .python-version names one it lacks.
bootstrap_python() {
    if /usr/bin/python3 -c 'import ensurepip' 2>/dev/null || ! command -v python3 >/dev/null; then
        /usr/bin/python3 "$@"
    else
        (cd / && python3 "$@")
    fi
}
