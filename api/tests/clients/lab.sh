#!/bin/sh
# The API against a machine that runs, in the lab: boots a guest by requests, lets it flood its
# console, and opens three thousand invalid connections meanwhile.
#
#     api/tests/clients/lab.sh [VENV]
#
# VENV is a Python environment with the packages of requirements.txt in it, such as `cargo xtask
# test --quick` leaves in target/cache/clients: then firecracker-python configures and starts the
# machine, and portcullis ctl does otherwise.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../../.."
target=$(rustc -vV | sed -n 's/^host: //p')
share=target/api-lab
rm -rf "$share"
mkdir -p "$share"

RUSTFLAGS="-C target-feature=+crt-static" \
    cargo build --quiet --target "$target" -p api --example hostile
cp "target/$target/debug/examples/hostile" "$here/lab_job.sh" "$share/"

# An interpreter with its own libraries: the lab has other ones, or none.
if [ $# -gt 0 ]; then
    python=$("$1/bin/python" -c 'import sys; print(sys.base_prefix + "/bin/python3")')
    version=$("$1/bin/python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    standard=$("$1/bin/python" -c 'import os; print(os.path.dirname(os.__file__))')
    mkdir -p "$share/python/bin" "$share/python/lib/$version" "$share/python/libraries"
    cp -L "$python" "$share/python/bin/python3"
    tar -C "$standard" --exclude=site-packages --exclude=test --exclude=__pycache__ \
        --exclude=idlelib --exclude=tkinter --exclude=ensurepip --exclude='config-*' -c . |
        tar -C "$share/python/lib/$version" -x
    tar -C "$1/lib/$version" --exclude=__pycache__ -c site-packages |
        tar -C "$share/python/lib/$version" -x
    find "$share/python" -type f '(' -name '*.so*' -o -name python3 ')' -exec ldd {} + 2>/dev/null |
        sed -n 's|.*=> \(/[^ ]*\) .*|\1|p; s|^[[:space:]]*\(/[^ ]*ld-linux[^ ]*\) .*|\1|p' | sort -u |
        while read -r library; do cp -L "$library" "$share/python/libraries/"; done
    cp "$here/firecracker_client.py" "$share/"
fi

exec cargo xtask lab --timeout 1500 --share "$share" -- sh lab_job.sh
