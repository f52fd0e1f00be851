# shellcheck shell=bash
# Puts what tools/gpu/prepare packed in place on the GPU machine. Sourced by tools/gpu/run, which sets `root`.
#
# Everything goes below /opt/weightfs, save one line for the linker. Debian packages are never unpacked over /: that
# replaces the links /bin and /lib and breaks the machine. Needs root. Leaves PYTHONPATH, PATH and CRIU set.

: "${root:?}"
packed="$root/.gpu"
placed=/opt/weightfs/placed

if [[ ! -r $packed/stamp ]]; then
    echo "tools/gpu: no $packed: run tools/gpu/prepare where there is a network, and carry .gpu along" >&2
    exit 3
fi

if [[ ! -r $placed || "$(<"$placed")" != "$(<"$packed/stamp")" ]]; then
    mkdir -p /opt/weightfs/lib /opt/weightfs/bin
    cp -f "$packed"/lib/* /opt/weightfs/lib/
    echo /opt/weightfs/lib >/etc/ld.so.conf.d/weightfs.conf
    ldconfig
    tar -C / -xzf "$packed/criu.tar.gz"
    # CRIU probes the kernel anew at every call unless it may keep what it found in a tmpfs.
    mkdir -p /run
    [[ "$(stat -f -c %T /run)" == tmpfs ]] || mount -t tmpfs tmpfs /run
    rm -rf /opt/weightfs/site
    python3 -m pip --disable-pip-version-check install -qq --no-index --no-deps --no-compile --no-cache-dir \
        --target /opt/weightfs/site "$packed"/wheels/*.whl
    printf '%s\n' '#!/usr/bin/env python3' 'from weightfs.cli.main import main' 'main()' >/opt/weightfs/bin/weightfs
    chmod 755 /opt/weightfs/bin/weightfs
    cp "$packed/stamp" "$placed"
fi

export PYTHONPATH="$root:/opt/weightfs/site${PYTHONPATH:+:$PYTHONPATH}"
export PATH="/opt/weightfs/bin:$PATH"
export PYTHONUNBUFFERED=1
# As for a user, whose modules are compiled once.
unset PYTHONDONTWRITEBYTECODE
export CRIU=/opt/weightfs/criu/usr/sbin/criu
