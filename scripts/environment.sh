# Sourced by the scripts beside it: where the project's environment lives, and how it comes about.
# shellcheck shell=bash
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export CENSUSCHAT_CACHE=${CENSUSCHAT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/censuschat-infra}

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# Python packages: uv in a virtual environment of its own (a pyenv shim would obey .python-version),
# then the locked, hash-checked environment. The name of an environment is the hash of its lock,
# so "is it current" is one test for a file.
environment_ready() {
    local key venv uv
    key=$(sha256sum "$root/requirements/dev.txt" "$root/.python-version" | sha256sum | cut -c1-16)
    venv=$CENSUSCHAT_CACHE/venv-$key
    if [ ! -e "$venv/.complete" ]; then
        command -v python3 >/dev/null || fail "Python 3 is missing; install it with: apt-get install python3 python3-venv"
        mkdir -p "$CENSUSCHAT_CACHE"
        exec 9>"$CENSUSCHAT_CACHE/venv.lock"
        flock 9
    fi
    if [ ! -e "$venv/.complete" ]; then
        uv=$CENSUSCHAT_CACHE/uv/bin/uv
        if [ ! -x "$uv" ]; then
            say "Installing uv into $CENSUSCHAT_CACHE/uv"
            bootstrap_python -m venv "$CENSUSCHAT_CACHE/uv" || fail "python3 cannot make virtual environments; install: apt-get install python3-venv"
            "$CENSUSCHAT_CACHE/uv/bin/pip" install --quiet --disable-pip-version-check uv
        fi
        say "Installing the locked Python environment into $venv (a minute when nothing is cached)"
        rm -rf "$venv"
        # uv reads .python-version of the directory it runs in.
        (cd "$root" && "$uv" venv --quiet "$venv" && "$uv" pip install --quiet --python "$venv/bin/python" --require-hashes -r requirements/dev.txt)
        touch "$venv/.complete"
        # Environments of other locks are superseded.
        find "$CENSUSCHAT_CACHE" -maxdepth 1 -name 'venv-*' ! -name "venv-$key" -mtime +7 -exec rm -rf {} +
    fi
    exec 9>&- || true
    export VIRTUAL_ENV=$venv PATH="$root/scripts/bin:$venv/bin:$PATH"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    export ANSIBLE_CONFIG="$root/ansible.cfg"
}

# The system's own Python where there is one: a pyenv shim fails when .python-version names a version it lacks.
bootstrap_python() {
    if [ -x /usr/bin/python3 ] && /usr/bin/python3 -c 'import ensurepip' 2>/dev/null; then
        /usr/bin/python3 "$@"
    else
        (cd / && python3 "$@")
    fi
}
