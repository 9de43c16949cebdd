#!/bin/sh
# Start services, load a sample dataset twice, annotate and verify it, and write a report. BIN is the bin folder of the
# virtual environment, RECOGNITIONS the size of the sample, REPORT the file of the report.
set -eu
cd "$(dirname "$0")/.."
ROOT=$PWD
REPORT=${REPORT:-$ROOT/report-demo.html}
BIN=$(cd "${BIN:-.venv/bin}" && pwd)
DEMO=$(mktemp -d "${TMPDIR:-/tmp}/pipeline-demo.XXXXXX")
# For root, the server runs as another user, who has to reach its data in this folder.
chmod 711 "$DEMO"
export PIPELINE_HOME="$DEMO/home" XDG_CACHE_HOME="$DEMO/cache"
# The demo uses its own services, in a folder without .env files; the shell's settings do not apply.
unset NEXT_PUBLIC_SUPABASE_URL SUPABASE_SERVICE_ROLE_KEY DATABASE_URL STORAGE_BUCKET DATASET_DIR QWEN_ANNOTATIONS
LUIGI_CONFIG_PATH="$ROOT/luigi.cfg"
export LUIGI_CONFIG_PATH
cd "$DEMO"
finish() {
    code=$?
    "$BIN/python" -m pipeline down >/dev/null 2>&1 || true
    cd /
    rm -rf "$DEMO"
    exit $code
}
trap finish EXIT
trap 'exit 130' INT TERM
run() {
    printf '\n$ python -m pipeline %s\n' "$*"
    "$BIN/python" -m pipeline "$@"
}
explain() {
    printf '\n# %s\n' "$*"
}
explain "Start PostgreSQL and a Storage server in a temporary folder."
run up
explain "Write a sample dataset. --broken plants trays that are broken or unusual, one of every kind."
run sample dataset --recognitions "${RECOGNITIONS:-400}" --broken
explain "Load it. The planted trays are rejected or noticed, the others are loaded."
run load --source dataset --batch-id demo --workers 2
explain "Load it again. The batch is done, so this run does nothing."
run load --source dataset --batch-id demo
explain "Load the detections of a vision model, and compare the bucket with the tables."
run load-qwen --file dataset/qwen_annotations.json --batch-id demo-qwen
run verify --quiet
run status
explain "Write a page about the load, then stop the services."
run report --batch-id demo --sample 4 --out "$REPORT"
run down
cat <<END

The report is $REPORT. The demo's services and data are removed.
Try it yourself, in $ROOT:

    $BIN/python -m pipeline up
    $BIN/python -m pipeline sample dataset --recognitions 200
    $BIN/python -m pipeline load --source dataset --batch-id first
END
