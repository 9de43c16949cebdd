#!/bin/sh
# What somebody does in the first hour, in an empty folder. BIN is the bin folder of the virtual environment, PORT that
# of luigid. Each step prints its command and what it said; `says` fails the script unless the step said that.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
BIN=${BIN:-$ROOT/.venv/bin}
PORT=${PORT:-8082}
LUIGID=""
finish() {
    code=$?
    [ -z "$LUIGID" ] || kill "$LUIGID"
    "$BIN/python" -m pipeline down || true
    exit $code
}
trap finish EXIT
step() {
    printf '\n$ %s\n' "$*"
    "$@" >said.txt 2>&1 || { code=$?; cat said.txt; echo "exit code $code"; exit 1; }
    cat said.txt
}
pipeline() {
    "$BIN/python" -m pipeline "$@"
}
says() {
    grep -q -e "$1" said.txt || { echo "It did not say: $1"; exit 1; }
}
change_a_receipt() {
    "$BIN/python" - "$1" <<'PYTHON'
import json, pathlib, sys
path = min(pathlib.Path(sys.argv[1]).rglob("*_correct_dishes.json"))
lines = json.loads(path.read_text(encoding="utf-8-sig"))
lines[0]["Count"] += 1
path.write_text(json.dumps(lines, ensure_ascii=False), encoding="utf-8")
print(path)
PYTHON
}

step env BIN="$BIN" RECOGNITIONS=200 REPORT="$PWD/demo.html" sh "$ROOT/docs/demo.sh"
says "The report is $PWD/demo.html"
says "plants trays that are broken"
says "nothing was loaded"
says "pipeline load --source dataset --batch-id first"

step pipeline --version
step pipeline up
step pipeline sample dataset --recognitions 12
step pipeline init --non-interactive --source dataset
says "written .*/crontab"
says " 0 problems"
step pipeline load --source dataset --batch-id first
says "Batch first is done: 12 recognitions"
says "Performance Metrics:"
step pipeline load --source dataset --batch-id first
says "Batch first is done already, since"
step change_a_receipt dataset
step pipeline load --source dataset --dry-run
says "12 already loaded"
step pipeline load --source dataset
says "1 recognition changed since it was loaded: load --changed"
step pipeline load --source dataset --changed --batch-id changed
says "Batch changed is done: 1 recognition"
step pipeline load-qwen --file dataset/qwen_annotations.json --batch-id boxes
says "Batch boxes is done"
step pipeline status
says "  first .* done"
step pipeline report --batch-id first
says "report-first.html"
step pipeline verify --quiet
says "26 equal, 0 missing"

"$BIN/luigid" --address 127.0.0.1 --port "$PORT" >luigid.log 2>&1 &
LUIGID=$!
until "$BIN/python" -c "import socket; socket.create_connection(('127.0.0.1', $PORT))" 2>/dev/null; do
    kill -0 "$LUIGID"
    sleep 0.2
done
step "$BIN/luigi" --module pipeline LoadBatch --source dataset --force --batch-id second \
    --scheduler-url "http://127.0.0.1:$PORT/"
says "Batch second is done: 12 recognitions"
step pipeline reset --batch-id second --confirm
says "Batch second is reset"
step pipeline reset --batch-id changed --confirm
step pipeline verify --quiet
says "24 equal, 0 missing"
echo "All steps did what they say."
