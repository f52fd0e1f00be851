# shellcheck shell=bash
# Sets this checkout up: system packages, and a virtual environment in .venv. Sourced by tools/run and tools/test.
#
# The caller sets `tool` (its name in messages) and `root` (the checkout), then calls
#   setup MODE SET     MODE: install | check     SET: base | demo | test
# which returns at once when SET's stamp in .venv says that nothing changed since it was installed, and otherwise
# installs what is missing (install) or names it and exits 3 (check). Everything printed goes to stderr.
#
# PYTHON names the interpreter to use. Without it: the one .venv was made with, else the first on PATH that fits.

: "${tool:?}"
venv="${root:?}/.venv"
readonly venv

# The CPU build of torch that is asked for by its local version label: an index that has no CPU builds answers at once
# that there is no such version, before anything is downloaded.
readonly torch_cpu="torch==2.13.0+cpu"

say() {
    printf '%s: %s\n' "$tool" "$*" >&2
}

# Prints a command as it could be typed, then runs it quietly: its output is shown only when it fails. Neither stdin nor
# the lock (fd 9) is passed on, so that nothing can wait for input and no started service can hold the lock.
run_shown() {
    local log="$venv/.setup.log" status=0
    printf '%s: + %s\n' "$tool" "$(show_command "$@")" >&2
    mkdir -p "$venv"
    "$@" >"$log" 2>&1 </dev/null 9>&- || status=$?
    if ((status)); then
        say "failed with status $status; the end of its output (all of it is in $log):"
        tail -n 40 "$log" >&2
    fi
    return "$status"
}

show_command() {
    local word line=""
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=+@%,-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
    done
    printf '%s' "${line:1}"
}

# What the environment was made for. A changed line (another interpreter, a moved checkout) means a new environment; the
# pyproject.toml digest is kept apart, since with only that changed pip brings the environment up to date.
environment_key() {
    local version
    # -I -S: start in about 10 ms, and read no site-packages
    version="$("$1" -I -S -c 'import sys; print(sys.implementation.cache_tag, sys.version_info[:3])' 2>/dev/null)" ||
        return 1
    printf '%s in %s' "$version" "$root"
}

requirements_key() {
    # this file too: its package lists are requirements as well
    local sums sum
    sums="$(sha256sum "$root/pyproject.toml" "$root/tools/lib/setup.sh")"
    while read -r sum _; do printf '%s ' "$sum"; done <<<"$sums"
}

stamp_is_current() {
    [[ ! -e "$venv/.installing" ]] && stamp_matches "$1"
}

stamp_matches() {
    local environment
    [[ -r "$venv/.stamp.$1" && -x "$venv/bin/weightfs" ]] || return 1
    environment="$(environment_key "${PYTHON:-$venv/bin/python}")" || return 1
    [[ "$(<"$venv/.stamp.$1")" == "$environment $(requirements_key)" ]] && command -v fusermount3 >/dev/null
}

# --- the interpreter ------------------------------------------------------------------------------------------------

python_fits() {
    "$1" -I -S -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints the path of the interpreter itself, never that of a pyenv shim or of an active virtual environment, which may
# go away. First choice is one that has all that is needed, second the system's, which apt can complete.
find_python() {
    local candidate python first=""
    local -a candidates=("$venv/bin/python" python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        python_fits "$candidate" || continue
        python="$("$candidate" -I -S -c '
import os, sys
base = getattr(sys, "_base_executable", "")
print(base if os.access(base, os.X_OK) else sys.executable)')"
        if python_has "$python" venv && python_has "$python" headers; then
            printf '%s' "$python"
            return
        fi
        if [[ -z $first || $candidate == /usr/bin/python3 ]]; then first="$python"; fi
    done
    printf '%s' "$first"
    [[ -n $first ]]
}

python_has() {
    case $2 in
    venv) "$1" -I -c 'import ensurepip, venv' 2>/dev/null ;;
    headers)
        "$1" -I -c '
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
        ;;
    esac
}

# --- system packages ------------------------------------------------------------------------------------------------

# Fills `needed` (without these nothing works), `wanted` (tests skip, or checks are left out), and `lacking` (what apt
# can't mend). Debian's names; what is already there in any other form (a Python or compiler of one's own) counts.
find_missing_packages() {
    local set="$1" package_python
    needed=() wanted=() lacking=()

    if ! command -v cc >/dev/null; then
        needed+=(gcc libc6-dev)
    elif ! cc -E - >/dev/null 2>&1 <<<'#include <stdio.h>'; then
        needed+=(libc6-dev)
    fi
    if ! command -v pkg-config >/dev/null; then
        needed+=(pkg-config libfuse3-dev)
    elif ! pkg-config --exists fuse3; then
        needed+=(libfuse3-dev)
    fi
    command -v fusermount3 >/dev/null || needed+=(fuse3)

    if ! python="$(find_python)"; then
        if [[ -n ${PYTHON:-} ]]; then
            lacking+=("PYTHON=$PYTHON is not Python 3.11 or newer")
        elif apt_python_fits; then
            needed+=(python3 python3-dev python3-venv)
        else
            lacking+=("Python 3.11 or newer (PYTHON=/path/to/python3 names one)")
        fi
    elif [[ $python == /usr/bin/* || $python == /bin/* ]]; then
        # python3-venv is for the distribution's default version, python3.13-venv for that one
        package_python=python3
        [[ /usr/bin/python3 -ef $python ]] || package_python="$(basename "$python")"
        python_has "$python" venv || needed+=("$package_python-venv")
        python_has "$python" headers || needed+=("$package_python-dev")
    else
        python_has "$python" venv || lacking+=("the modules venv and ensurepip of $python")
        python_has "$python" headers || lacking+=("Python.h of $python")
    fi

    if [[ $set == test ]]; then
        command -v shellcheck >/dev/null || wanted+=(shellcheck)
        command -v fio >/dev/null || wanted+=(fio)
        command -v chromium >/dev/null || command -v google-chrome >/dev/null || wanted+=(chromium)
        command -v setfacl >/dev/null || wanted+=(acl)
        command -v getfattr >/dev/null || wanted+=(attr)
    fi
}

# Whether apt's python3 is new enough. Unknown before the first `apt-get update`: then it's worth a try.
apt_python_fits() {
    local version
    command -v apt-cache >/dev/null || return 1
    version="$(LC_ALL=C apt-cache policy python3 | sed -n 's/^ *Candidate: *\(3\.[0-9]*\).*/\1/p')"
    [[ -z $version || ${version#3.} -ge 11 ]]
}

apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    # A third-party list that can't be read doesn't keep Debian's own packages from being installed.
    run_shown apt-get update || say "going on with the package lists that are there"
    run_shown apt-get -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends "$@"
}

install_system_packages() {
    local mode="$1" set="$2"
    find_missing_packages "$set"
    if ((${#needed[@]} && EUID == 0)) && [[ $mode == install ]] && command -v apt-get >/dev/null; then
        apt_install "${needed[@]}" "${wanted[@]}" || exit 1
        find_missing_packages "$set" # what a new Python makes possible to see
        if ((${#needed[@]})); then apt_install "${needed[@]}" || exit 1; fi
        find_missing_packages "$set"
    elif ((${#wanted[@]} && EUID == 0)) && [[ $mode == install ]] && command -v apt-get >/dev/null; then
        apt_install "${wanted[@]}" || say "going on without ${wanted[*]}"
    elif ((${#wanted[@]})); then
        say "not here, so what needs them is left out: ${wanted[*]} (apt-get install ${wanted[*]})"
    fi
    if ((${#needed[@]} || ${#lacking[@]})); then return 1; fi
}

report_missing_packages() {
    local sudo=""
    ((EUID == 0)) || sudo="sudo "
    if ((${#lacking[@]})); then
        local thing
        for thing in "${lacking[@]}"; do say "missing: $thing"; done
    fi
    if ((${#needed[@]})); then
        if command -v apt-get >/dev/null; then
            say "missing system packages; install them with: ${sudo}apt-get install ${needed[*]}"
        else
            say "missing system packages (Debian's names), to be installed with this system's tool: ${needed[*]}"
        fi
    fi
}

# --- the virtual environment ----------------------------------------------------------------------------------------

# Makes .venv, or empties and remakes it when it was made by another interpreter or for another place.
make_environment() {
    local environment
    environment="$(environment_key "$python")" || exit 1
    if [[ -r "$venv/.environment" && "$(<"$venv/.environment")" == "$environment" ]] &&
        "$venv/bin/python" -I -c 'import pip' 2>/dev/null; then
        return
    fi
    # not `venv --clear`, which would remove the lock that is held on
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
    run_shown "$python" -m venv "$venv" || exit 1
    printf '%s' "$environment" >"$venv/.environment"
}

pip_install() {
    run_shown "$venv/bin/python" -I -m pip --disable-pip-version-check --no-input install "$@"
}

# torch from its own step: what depends on it takes the one that is there, where pip by itself would pick a CUDA build
# of several gigabytes also on a machine without a GPU.
install_torch() {
    if "$venv/bin/python" -I -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'; then
        return
    fi
    if [[ ! -e /dev/nvidiactl ]]; then
        say "no NVIDIA GPU here: looking for a CPU build of torch"
        if has_cpu_torch; then
            pip_install --no-compile "$torch_cpu" || exit 1
            return
        fi
        say "pip knows of no CPU build for this Python; the default one can be several gigabytes to download" \
            "(point pip at an index of CPU builds to avoid that)"
    fi
    pip_install --no-compile "torch>=2.6" || exit 1
}

has_cpu_torch() {
    "$venv/bin/python" -I -m pip --disable-pip-version-check --no-input install --dry-run --no-deps "$torch_cpu" \
        >/dev/null 2>&1 </dev/null 9>&-
}

# --- what tools/run and tools/test call -----------------------------------------------------------------------------

setup() {
    local mode="$1" set="$2"
    local -a needed wanted lacking
    local python=""
    if stamp_is_current "$set"; then return; fi

    if [[ $mode == check ]]; then
        install_system_packages check "$set" || report_missing_packages
        say "the Python packages in .venv are missing or not current; install them with:" \
            "${PYTHON:+PYTHON=${PYTHON@Q} }$(show_command "$root/tools/run" "$([[ $set == demo ]] && echo demo || echo --help)")"
        exit 3
    fi

    mkdir -p "$venv"
    exec 9>"$venv/.lock"
    flock -n 9 || {
        say "another call is setting this checkout up: waiting for it"
        flock 9
    }
    if ! stamp_is_current "$set"; then
        if ! install_system_packages install "$set"; then
            report_missing_packages
            exit 3
        fi
        install_python_packages "$set"
        say "set up in $SECONDS s"
    fi
    exec 9>&-
}

install_python_packages() {
    local set="$1" stamp
    # Left behind by an interrupted call: nothing that was stamped before it is known to be whole.
    if [[ -e "$venv/.installing" ]]; then rm -f "$venv"/.stamp.*; fi
    make_environment
    : >"$venv/.installing"
    # Only the base is compiled: of torch and transformers, first use compiles the little that it imports.
    if ! stamp_matches base; then
        say "it compiles pyfuse3: a minute, or five on a busy machine (tail -f $venv/.setup.log shows how far it is)"
        pip_install --editable "$root" || exit 1
    fi
    if [[ $set != base ]]; then
        install_torch
        pip_install --no-compile --editable "${root}[$(extras_of "$set")]" || exit 1
    fi
    for stamp in base "$set"; do
        printf '%s' "$(environment_key "$venv/bin/python") $(requirements_key)" >"$venv/.stamp.$stamp"
    done
    rm "$venv/.installing"
}

extras_of() {
    case $1 in
    demo) echo demo ;;
    test) echo dev,loaders ;;
    esac
}
