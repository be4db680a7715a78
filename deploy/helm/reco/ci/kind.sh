#!/usr/bin/env bash
# Installs the chart on the cluster of the current kubeconfig, which should be kind's, waits until it answers, asks it for a list, upgrades and asks again.
# The images reco/endpoint, reco/app and reco/flows have to be loaded: kind load docker-image reco/endpoint:0.1.0 reco/app:0.1.0 reco/flows:0.1.0
set -euo pipefail
cd "$(dirname "$0")/.."
random() { openssl rand -hex 20; }

kubectl create namespace reco
redis=$(random) s3=$(random) client=$(random) admin=$(random) app=$(random)
kubectl -n reco create secret generic reco-servers --from-literal=REDIS_PASSWORD="$redis" --from-literal=MINIO_ROOT_USER=reco --from-literal=MINIO_ROOT_PASSWORD="$s3"
kubectl -n reco create secret generic reco --from-literal=RECO_ONLINE_URL="redis://:$redis@redis:6379/0" \
    --from-literal=RECO_LAKE_ACCESS_KEY=reco --from-literal=RECO_LAKE_SECRET_KEY="$s3" --from-literal=RECO_SERVING_CLIENT_KEYS="$client" \
    --from-literal=RECO_SERVING_ADMIN_KEYS="$admin $app" --from-literal=RECO_APP_KEY="$app"
kubectl -n reco create secret generic reco-gateway --from-literal=people="ci:{PLAIN}$(random)" \
    --from-literal=keys.map="$(printf '"%s" client;\n"%s" admin;\n"%s" admin;\n' "$client" "$admin" "$app")"
kubectl -n reco apply -f ci/servers.yaml
kubectl -n reco rollout status deployment/redis deployment/minio --timeout=3m

trap 'kubectl -n reco get pods; kubectl -n reco get events --sort-by=.lastTimestamp | tail -40; kubectl -n reco logs job/reco-bootstrap-1 --tail=60' ERR
helm install reco . --namespace reco --values ci/kind-values.yaml --wait --timeout 25m
helm test reco --namespace reco --logs
helm upgrade reco . --namespace reco --values ci/kind-values.yaml --set endpoint.drainSeconds=5 --wait --timeout 10m
helm test reco --namespace reco --logs
helm rollback reco 1 --namespace reco --wait --timeout 10m
helm uninstall reco --namespace reco --wait
