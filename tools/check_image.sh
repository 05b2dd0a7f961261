#!/bin/bash
# Build the image without a registry and run it as a cluster would: read-only, not root, no capabilities.
#
#   PIP_CONF=pip.conf VOLUMES="/wheels" tools/check_image.sh
#
# PIP_CONF: settings for pip in the build; VOLUMES: folders of this machine that they name. Needs root, buildah, runc and
# mmdebstrap; the base stays in $CACHE for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."
CACHE=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/baton-image}
PYTHON=${PYTHON:-.venv/bin/python}
PORT=${PORT:-18200}
for tool in buildah runc mmdebstrap; do
  command -v $tool > /dev/null || { echo "$tool is missing; install it with the system's packages" >&2; exit 1; }
done
mkdir -p "$CACHE"
work=$(mktemp -d)
store() { buildah --root "$CACHE/root" --runroot "$work/runroot" --storage-driver vfs "$@"; }
container=
finish() {
  runc --root "$work/runc" delete -f baton-check 2> /dev/null || true
  [ -z "$container" ] || { store umount "$container"; store rm "$container"; } > /dev/null
  rm -rf "$work"
}
trap finish EXIT

if ! store inspect --type image localhost/base:bookworm > /dev/null 2>&1; then
  mmdebstrap --quiet --variant=minbase --include=python3-minimal,python3-venv,ca-certificates bookworm "$CACHE/base.tar"
  base=$(store from scratch)
  store add --quiet "$base" "$CACHE/base.tar" /
  store commit --quiet --rm "$base" localhost/base:bookworm
  rm "$CACHE/base.tar"
fi
# The last stage of both variants, with a stand-in for the packages: those of CUDA are gigabytes.
stand_in="$work/stand-in"
mkdir -p "$stand_in/opt/baton/bin"
last_stage() {  # tag base variant
  store bud --quiet --isolation chroot --pull-never --format docker --build-context "build=$stand_in" \
    --build-arg "BASE=$2" --build-arg "VARIANT=$3" -f deploy/docker/Dockerfile -t "localhost/baton:$1" . > "$work/$1.log" 2>&1
}
last_stage cpu localhost/base:bookworm cpu || { cat "$work/cpu.log" >&2; exit 1; }
! last_stage tpu localhost/base:bookworm tpu || { echo "VARIANT=tpu was built" >&2; exit 1; }
grep -q "VARIANT is tpu; it may be cpu or cuda" "$work/tpu.log"
! last_stage bare localhost/base:bookworm cuda || { echo "CUDA was built without Python.h" >&2; exit 1; }
grep -q "Python.h, which the CUDA variant needs" "$work/bare.log"
touch "$work/Python.h"
base=$(store from --pull-never localhost/base:bookworm)
store add --quiet "$base" "$work/Python.h" /usr/include/python3.11/Python.h > /dev/null
store commit --quiet --rm "$base" localhost/base:headers > /dev/null
last_stage cuda localhost/base:headers cuda || { cat "$work/cuda.log" >&2; exit 1; }
container=$(store from --pull-never localhost/baton:cuda)
root=$(store mount "$container")
[ -e "$root/usr/bin/gcc" ] && [ "$(store inspect --format '{{index .OCIv1.Config.Labels "baton.variant"}}' "$container")" = cuda ] ||
  { echo "the CUDA variant has no compiler, or another label" >&2; exit 1; }
store umount "$container" > /dev/null
store rm "$container" > /dev/null
container=
echo "both variants build; the packages of CUDA stood in"

volumes=()
for folder in ${VOLUMES:-}; do volumes+=(-v "$folder:$folder:ro"); done
PIP_CONF=${PIP_CONF:-/dev/null}
[ -s "$PIP_CONF" ] || { PIP_CONF=$work/pip.conf; printf '[global]\n' > "$PIP_CONF"; }
store bud --quiet --isolation chroot --pull-never --format docker --secret "id=pip_conf,src=$PIP_CONF" \
  "${volumes[@]}" --build-arg BASE=localhost/base:bookworm -f deploy/docker/Dockerfile -t localhost/baton:check .

container=$(store from --pull-never localhost/baton:check)
root=$(store mount "$container")
for tool in gcc g++ make git; do
  [ ! -e "$root/usr/bin/$tool" ] || { echo "the image holds $tool" >&2; exit 1; }
done
PYTHONPATH=tests/support $PYTHON -c '
import sys; from pathlib import Path; from tiny_llama import write_checkpoint, write_pair_tokenizer
write_pair_tokenizer(write_checkpoint(Path(sys.argv[1])))' "$work/model"
chmod -R a+rX "$work"
mkdir "$work/bundle"
(cd "$work/bundle" && runc spec)
$PYTHON - "$work" "$root" "$PORT" << 'END'
import json, sys
work, root, port = sys.argv[1:]
file = f"{work}/bundle/config.json"
spec = json.load(open(file))
process = spec["process"]
process.update(
    terminal=False, cwd="/tmp", user={"uid": 10001, "gid": 10001}, noNewPrivileges=True,
    capabilities={kind: [] for kind in process["capabilities"]},
    rlimits=[{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
    args=["baton", "serve", "--no-ray", "--http-port", port, "--grpc-port", str(int(port) + 1),
          "--model", "/models/tiny", "--dtype", "float32", "--run-dir", "/tmp/baton"],
    env=["PATH=/opt/baton/bin:/usr/bin:/bin", "HOME=/tmp", "XDG_CACHE_HOME=/cache",
         "PYTHONUNBUFFERED=1"],
)
spec["root"] = {"path": root, "readonly": True}
spec["mounts"] = [m for m in spec["mounts"] if not m["destination"].startswith(("/sys", "/dev/shm"))]
spec["mounts"] += [
    {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777", "size=2g"]}
    for path in ("/tmp", "/cache", "/dev/shm")
]
spec["mounts"].append({"destination": "/models/tiny", "type": "bind", "source": f"{work}/model",
                       "options": ["ro", "bind"]})
linux = spec["linux"]
linux["namespaces"] = [n for n in linux["namespaces"] if n["type"] not in ("network", "cgroup")]
linux.pop("resources", None)
json.dump(spec, open(file, "w"))
END
inside() { runc --root "$work/runc" exec baton-check "$@"; }
(cd "$work/bundle" && timeout 120 runc --root "$work/runc" run baton-check > "$work/log" 2>&1) &
for _ in $(seq 90); do grep -q "^ready in" "$work/log" && break; sleep 1; done
grep "^ready in" "$work/log" || { cat "$work/log" >&2; exit 1; }
inside baton probe router live --url "http://127.0.0.1:$PORT"
inside baton probe router ready --url "http://127.0.0.1:$PORT"
inside bash -lc 'command -v ray > /dev/null && command -v baton > /dev/null'
inside python -c 'import baton.telemetry.otlp' || { echo "the image cannot send traces" >&2; exit 1; }
! inside touch /etc/x /opt/baton/x 2> /dev/null || { echo "the root file system can be written" >&2; exit 1; }
inside python - "$PORT" << 'END'
import json, sys, urllib.request
body = {"model": "tiny", "prompt": list(range(1, 20)), "max_tokens": 5}
request = urllib.request.Request(
    f"http://127.0.0.1:{sys.argv[1]}/v1/completions", json.dumps(body).encode(),
    {"Content-Type": "application/json"},
)
print(json.load(urllib.request.urlopen(request, timeout=60))["usage"])
END
runc --root "$work/runc" kill baton-check TERM
wait
du -sh "$root" | cut -f1
echo "the image serves, read-only and without privileges"
