# Sourced by the scripts: goes to the project's root and offers `setup [EXTRAS]`, which makes .venv where it is missing or outdated.
# Needs bash and python3 (3.11 or newer) alone. PYTHON names another interpreter.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONDONTWRITEBYTECODE # else each of the many commands that the tests start would compile the program anew

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed. Fix: install it, or name it with PYTHON=/path/to/python3 $0" >&2
    return 1
}

# What the environment depends on: the two files and the place where it stands.
fingerprint() {
    "$1" - "$PWD" <<'PYTHON'
import hashlib, pathlib, sys
parts = [pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join([*parts, sys.argv[1].encode()])).hexdigest())
PYTHON
}

# True where .venv was made here by a Python that is new enough: a virtual environment does not survive a move.
usable() {
    grep -qF "$PWD/.venv" .venv/bin/activate 2>/dev/null &&
        .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# setup [EXTRAS]: EXTRAS as pip takes them, "dev,parity". Where all is in place it costs a few milliseconds.
setup() {
    local extras="${1:-}" python want stamp
    python="$(find_python)" || exit 1
    want="$(fingerprint "$python")"
    for stamp in .venv/tetrad-${extras:-*}.stamp; do
        if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
            return
        fi
    done
    usable || "$python" -m venv --clear .venv || exit 1
    echo "setting up .venv${extras:+ with $extras}: once, torch is large" >&2
    # Of the packages only what the program loads is compiled, not all of torch: half of the time.
    .venv/bin/python -m pip install -q --no-compile -c constraints.txt -e ".${extras:+[$extras]}" || exit 1
    .venv/bin/python -c "import tetrad.cli.score, tetrad.train.ppo, tetrad.datacheck.check" || exit 1
    echo "$want" >".venv/tetrad-${extras:-base}.stamp"
}
