#!/usr/bin/env bash
# Trains a model on photos of cats and dogs, adds horses from a second folder, and evaluates both steps.
#
#   examples/story.sh VOC [WORK [PETS HORSES [EPOCHS CROP]]]
#
# VOC: a data set in the VOC layout (docs/datasets.md); WORK: a new folder (default runs/story); PETS, HORSES: numbers of
# training photos (400 and 150); EPOCHS: by default chosen by `starseg learn`; CROP: crop size (144, small for two cores).
# The output is a transcript of all commands, run in WORK, and of what they print.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
voc=$(cd "$1" && pwd) work=${2:-runs/story} pets=${3:-400} horses=${4:-150} epochs=${5:-} crop=${6:-144}
PATH=$(dirname "$examples")/.venv/bin:$PATH

say() { printf '\n## %s\n' "$*"; }
run() { printf '\n$ %s\n' "$*"; "$@"; }

[ ! -e "$work" ] || { echo "$work: is there already; give a new folder" >&2; exit 2; }
mkdir -p "$work"
cd "$work"
ln -s "$examples" examples

say "Three folders: cats and dogs, horses, and photos of all three that no model learns from"
run python examples/story_data.py "$voc" . --pets "$pets" --horses "$horses" --held-out "$horses"

say "The first step: cats and dogs"
run starseg learn --new --images pets/images --masks pets/masks --classes pets/classes.txt --out cats-dogs \
    --backbone tf_efficientnet_lite0 --crop "$crop" ${epochs:+--epochs "$epochs"}

say "Later: horses. The cats and dogs are gone; what step 0 keeps of them"
run ls -l cats-dogs/step_0
horse=(starseg learn cats-dogs/step_0 --images horses/images --masks horses/masks --classes horse --out with-horses)
run "${horse[@]}" ${epochs:+--epochs "$epochs"} --dry-run
run "${horse[@]}" ${epochs:+--epochs "$epochs"}

say "Before and after, on photos of cats, dogs and horses that neither step has seen"
run starseg predict cats-dogs/step_0 held-out/images --out before --overlays
run starseg predict with-horses/step_1 held-out/images --out after --overlays --json after.json
run python examples/story_table.py held-out before after

say "The model as ONNX, compared with torch on the same photos, and used without starseg"
run starseg export with-horses/step_1 --out horses.onnx --images held-out/images
mkdir onnx
cp "$(find held-out/images -type f | sort | head -n 1)" onnx/photo.jpg
run python examples/onnx_predict.py horses.onnx onnx/photo.jpg

say "A page with curves, forgetting and pictures"
run starseg report cats-dogs with-horses --out report.html

say "To look at, in $PWD"
cat <<EOF
before/overlays, after/overlays    what each model sees in the same photos
report.html                        open it in a browser
starseg app with-horses/step_1     drop photos, move through the steps
EOF
