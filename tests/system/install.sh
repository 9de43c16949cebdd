#!/bin/sh
# Install what the system tests need and is not there: cron, Chromium with its driver, ip, unshare, PgBouncer.
set -eu
missing=""
for pair in /usr/sbin/cron:cron /usr/bin/chromium:chromium /usr/bin/chromedriver:chromium-driver /sbin/ip:iproute2 \
    /usr/bin/unshare:util-linux /usr/sbin/pgbouncer:pgbouncer; do
    [ -x "${pair%%:*}" ] || missing="$missing ${pair##*:}"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -ne 0 ]; then
    echo "As root: apt-get install$missing" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086 (a list of words)
apt-get install -y -qq --no-install-recommends $missing >/dev/null
