#!/usr/bin/env bash
# One slice of a list of sweeps, on a machine that is lent for minutes: runs the next unfinished points, then packs
# what there is into $OUT. The next slice goes on from the packed files, on this machine or a fresh one.
#
#   OUT=/tmp/out experiments/gpu_session.sh experiments/sweeps/schedule.yaml experiments/sweeps/query_projection.yaml
#   OUT=/tmp/out OVERRIDE=my.yaml SLICE=500 FROM=sessions/1 experiments/gpu_session.sh experiments/sweeps/strategies.yaml
#
# SLICE     seconds for everything but the packing (default 480: under nine minutes in all)
# OVERRIDE  a file for `sweep.py --override`
# FROM      a folder with the packed files of the slice before
# PYTHON    default python3; where dit_booth is not installed, it is installed from here, without its dependencies
# ROOT      folder of the sweeps' folders (default runs/sweeps)
# PART      most bytes of one packed file (default 15 MB)
#
# Packed: results.tar.gz has every point without its weights, and all tables; state.tar.gz.* has the stages that
# unfinished points need, checkpoints included. Exit code 0: all sweeps are finished; 3: there is more to do.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?name the folder for the results in OUT}" "${1:?name the sweeps to run}"
SLICE=${SLICE:-480} PYTHON=${PYTHON:-python3} PART=${PART:-15728640} ROOT=${ROOT:-runs/sweeps}
needed='
import json, pathlib, sys
root = pathlib.Path(sys.argv[1])
rows = [(file.parent, json.loads(line)) for file in root.glob("*/sweep.jsonl") for line in file.open()]
stages = {sweep / "stages" / "{name}-{address}".format(**stage)
          for sweep, row in rows if row["status"] != "finished" for stage in row["stages"]}
files = (file for stage in sorted(stages) for file in stage.rglob("*") if file.is_file() and file.suffix != ".part")
print(*(file.relative_to(root) for file in files), sep="\0", end="")
'
begin=$(date +%s)
mkdir -p "$OUT" "$ROOT"
"$PYTHON" -c 'import importlib.metadata as m; m.distribution("dit_booth")' 2>/dev/null ||
    "$PYTHON" -m pip install -q --no-deps --no-build-isolation -e .

if [ -n "${FROM:-}" ]; then # never over newer files: this machine may have gone further
    tar xzf "$FROM/results.tar.gz" -C "$ROOT" --skip-old-files
    if compgen -G "$FROM/state.tar.gz.*" >/dev/null; then cat "$FROM"/state.tar.gz.* | tar xz -C "$ROOT" --skip-old-files; fi
fi

unfinished=0
for sweep in "$@"; do
    left=$((SLICE - $(date +%s) + begin))
    if [ "$left" -lt 30 ]; then unfinished=1; break; fi
    code=0
    "$PYTHON" experiments/sweep.py "$sweep" ${OVERRIDE:+--override "$OVERRIDE"} --seconds "$left" --grace 20 || code=$?
    case $code in
        0) ;;
        1) echo "$sweep: some points failed; the table says which" ;;
        130) unfinished=1 ;;
        *) exit "$code" ;;
    esac
done

tar czf "$OUT/results.tar.gz" --exclude='*.safetensors' --exclude='step*' --exclude='*.part' -C "$ROOT" .
if [ "$unfinished" = 1 ]; then
    "$PYTHON" -c "$needed" "$ROOT" |
        tar cz -C "$ROOT" --null --files-from=- | split -b "$PART" -d - "$OUT/state.tar.gz."
    exit 3
fi
