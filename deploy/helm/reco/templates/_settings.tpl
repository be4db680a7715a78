{{/* Folders of a pod that can be written to; what lies in them ends with the pod. */}}
{{- define "reco.places" -}}
RECO_BUNDLES_CACHE: /var/lib/reco/bundle_cache
RECO_DATA_PATH: /var/lib/reco/raw
RECO_DATA_SCRATCH: /var/lib/reco/scratch
RECO_ONLINE_FOLDER: /var/lib/reco/online
RECO_SEARCH_FILE: /var/lib/reco/search.db
RECO_SEARCH_OUT: /var/lib/reco/best.ini
RECO_TRACKING_FOLDER: /var/lib/reco/mlflow
METAFLOW_DATASTORE_SYSROOT_LOCAL: /var/lib/reco
METAFLOW_CARD_LOCALROOT: /var/lib/reco/.metaflow/mf.cards
METAFLOW_TEMPDIR: /var/lib/reco
METAFLOW_ARTIFACT_LOCALROOT: /var/lib/reco
{{- end }}

{{/* The ConfigMap's data: the places, the files, then what values say. A number is written as JSON does: Go would make 1e+06 of a million. */}}
{{- define "reco.settings" -}}
{{ include "reco.places" . }}
{{- if .Values.rules }}
RECO_RULES_FILE: /etc/reco/rules.toml
{{- end }}
{{- if .Values.experiments }}
RECO_EXPERIMENTS_FILE: /etc/reco/experiments.toml
{{- end }}
{{- range $section, $keys := .Values.settings }}
{{- range $key, $value := $keys }}
{{ printf "RECO_%s_%s" $section $key | upper }}: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Which secrets a component needs, and no other gets. */}}
{{- define "reco.secretsOf" -}}
endpoint: [RECO_LAKE_ACCESS_KEY, RECO_LAKE_SECRET_KEY, RECO_ONLINE_URL, RECO_STREAM_BUS, RECO_STREAM_KAFKA, RECO_STREAM_REGISTRY, RECO_SERVING_CLIENT_KEYS, RECO_SERVING_ADMIN_KEYS, RECO_ALERTS_WEBHOOK]
consumer: [RECO_LAKE_ACCESS_KEY, RECO_LAKE_SECRET_KEY, RECO_ONLINE_URL, RECO_STREAM_BUS, RECO_STREAM_KAFKA, RECO_STREAM_REGISTRY]
app: [RECO_LAKE_ACCESS_KEY, RECO_LAKE_SECRET_KEY, RECO_APP_KEY, RECO_TRACKING_URI]
flows: [RECO_LAKE_ACCESS_KEY, RECO_LAKE_SECRET_KEY, RECO_ONLINE_URL, RECO_POSTGRES_URL, RECO_TRACKING_URI, RECO_SEARCH_STORAGE, RECO_ALERTS_WEBHOOK]
gateway: []
test: [RECO_SERVING_CLIENT_KEYS]
{{- end }}

{{/* The variables of a component that come from Secrets and are set, as a list in JSON. */}}
{{- define "reco.secretsUsed" -}}
{{- $used := list -}}
{{- range index (include "reco.secretsOf" . | fromYaml) .component }}{{ if index $.root.Values.secrets.keys . }}{{ $used = append $used . }}{{ end }}{{ end -}}
{{ toJson $used }}
{{- end }}

{{- define "reco.secretEnv" -}}
{{- range include "reco.secretsUsed" . | fromJsonArray }}
- name: {{ . }}
  valueFrom:
    secretKeyRef:
      {{- include "reco.secretKey" (dict "root" $.root "key" (index $.root.Values.secrets.keys .)) | nindent 6 }}
{{- end }}
{{- end }}
