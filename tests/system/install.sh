#!/bin/sh
# Install what the system tests need and is not there: cron, systemd-analyze, Chromium with its driver, ip, unshare,
# PgBouncer, npm, and the Supabase CLI and promtool in the folder that is named.
set -eu
# 3.1.0: a newer one may ask and print otherwise.
cli=supabase@3.1.0
missing=""
for pair in /usr/sbin/cron:cron /usr/bin/chromium:chromium /usr/bin/chromedriver:chromium-driver /sbin/ip:iproute2 \
    /usr/bin/unshare:util-linux /usr/sbin/pgbouncer:pgbouncer /usr/bin/systemd-analyze:systemd; do
    [ -x "${pair%%:*}" ] || missing="$missing ${pair##*:}"
done
for pair in node:nodejs npm:npm; do
    command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair##*:}"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "As root: apt-get install$missing" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086 (a list of words)
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
# The package of promtool brings a server, which is not to be started.
if [ ! -x "$1/promtool" ]; then
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
    (cd "$folder" && apt-get download -qq prometheus 2>/dev/null || { apt-get update -qq && apt-get download -qq prometheus; })
    dpkg-deb --fsys-tarfile "$folder"/prometheus_*.deb | tar -xO ./usr/bin/promtool >"$folder/promtool.new"
    chmod +x "$folder/promtool.new"
    mv "$folder/promtool.new" "$folder/promtool"
    rm "$folder"/prometheus_*.deb
fi
# A package of npm has the program for its platform as an optional dependency.
[ -x "$1/node_modules/.bin/supabase" ] || npm install --silent --no-audit --no-fund --prefix "$1" "$cli"
