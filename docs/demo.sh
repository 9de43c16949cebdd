#!/bin/sh
# Start services, write a sample dataset, load it, print the status. BIN is the bin folder of the virtual environment.
set -eu
cd "$(dirname "$0")/.."
BIN=$(cd "${BIN:-.venv/bin}" && pwd)
DEMO=$(mktemp -d "${TMPDIR:-/tmp}/pipeline-demo.XXXXXX")
# For root, the server runs as another user, who has to reach its data in this folder.
chmod 711 "$DEMO"
export PIPELINE_HOME="$DEMO/home"
# The demo uses its own services, in a folder without .env files; the shell's settings do not apply.
unset NEXT_PUBLIC_SUPABASE_URL SUPABASE_SERVICE_ROLE_KEY DATABASE_URL STORAGE_BUCKET DATASET_DIR QWEN_ANNOTATIONS
LUIGI_CONFIG_PATH="$PWD/luigi.cfg"
export LUIGI_CONFIG_PATH
cd "$DEMO"
finish() {
    code=$?
    "$BIN/python" -m pipeline down || true
    cd /
    rm -rf "$DEMO"
    exit $code
}
trap finish EXIT
trap 'exit 130' INT TERM
say() {
    printf '\n$ python -m pipeline %s\n' "$*"
    "$BIN/python" -m pipeline "$@"
}
say up
say sample dataset --recognitions "${RECOGNITIONS:-400}" --broken
printf '\n%s\n' "--broken planted broken and unusual input of every kind; the rejects and notices below are about that."
say load --source dataset --batch-id demo --workers 2
say load --source dataset --batch-id demo
say load-qwen --file dataset/qwen_annotations.json --batch-id demo-qwen
say load-qwen --file dataset/qwen_annotations.jsonl.gz --batch-id demo-lines
say verify --quiet
say status
