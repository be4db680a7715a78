#!/usr/bin/env bash
# Waits until a gateway gives a shopper a list: deploy/ask.sh http://127.0.0.1:8080. The first start trains, which takes minutes (WAIT_S, 2400).
set -euo pipefail
address=${1:?the address of the gateway}
wait_s=${WAIT_S:-2400}
keys=$(dirname "$0")/secrets/keys.map
key=${RECO_KEY:-$(sed -n 's/^"\(.*\)" client;$/\1/p' "$keys" | head -n 1)}
[ -n "$key" ] || { echo "no client's key in $keys: run make env, or set RECO_KEY" >&2; exit 1; }
body=$(mktemp)
trap 'rm -f "$body"' EXIT
until status=$(curl --silent --output "$body" --write-out '%{http_code}' --max-time 10 --header @- "$address/recommendations/v1/nobody-yet?k=5" <<< "X-API-Key: $key") \
    && [ "$status" = 200 ] && grep -q '"item_id"' "$body"; do
    [ "$SECONDS" -lt "$wait_s" ] || { echo "no list from $address after $wait_s s; the last answer: $status $(head -c 300 "$body")" >&2; exit 1; }
    sleep 5
done
echo "a list after $SECONDS s: $(head -c 300 "$body")"
