#!/usr/bin/env bash
# Starts an image as the platform does: deploy/docker/smoke.sh app reco/app:0.1.0. Its root file system is read-only, it has no capability, and
# what it writes goes to /tmp and /var/lib/reco.
set -euo pipefail
name=${1:?endpoint, app or flows} image=${2:?an image}
lean=(--read-only --cap-drop ALL --security-opt no-new-privileges --shm-size 256m --tmpfs /tmp:mode=1777 --tmpfs /var/lib/reco:uid=10001,gid=10001)
run() { docker run --rm "${lean[@]}" "$image" sh -euc "$1"; }
run '[ "$(id -u):$(id -g)" = 10001:10001 ]; ! touch /srv/reco/x 2> /dev/null; touch /tmp/x /var/lib/reco/x'
case $name in
    endpoint) run 'python -m app.cluster > /dev/null; python -m app.consumer --help > /dev/null' ;; # Ray imports the application and reads its parts
    flows) run 'for flow in ingest train promote upkeep; do python "flows/$flow.py" show > /dev/null; done; mlflow --version > /dev/null; python -m app.bootstrap --help > /dev/null' ;;
    app)
        id=$(docker run --detach "${lean[@]}" "$image")
        trap 'docker rm --force "$id" > /dev/null' EXIT
        until docker exec "$id" python -m app.alive http://127.0.0.1:8501/app/_stcore/health 2> /dev/null; do
            [ "$SECONDS" -lt 120 ] || { docker logs "$id"; echo "$image is not healthy after 120 s" >&2; exit 1; }
            sleep 2
        done ;;
    *) echo "unknown image $name: endpoint, app or flows" >&2; exit 1 ;;
esac
echo "$image starts"
