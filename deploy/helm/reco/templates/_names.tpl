{{- define "reco.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{/* Name of a Service: the component comes first. Kubernetes gives every pod of the namespace variables named after Services, and RECO_ENDPOINT_PORT would
be a setting that the platform does not know: our pods ask for none (enableServiceLinks), but those that Argo makes cannot be told. */}}
{{- define "reco.service" -}}
{{ printf "%s-%s" .component (include "reco.fullname" .root) }}
{{- end }}

{{/* What a component's pods are known by; it never changes, for selectors must not. */}}
{{- define "reco.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{- define "reco.labels" -}}
{{ include "reco.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "reco.metadata" -}}
name: {{ .name | default (printf "%s-%s" (include "reco.fullname" .root) .component) }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "reco.labels" . | nindent 2 }}
{{- end }}

{{- define "reco.account" -}}
{{- $said := index .root.Values.serviceAccounts .component -}}
{{- if $said.create }}{{ default (printf "%s-%s" (include "reco.fullname" .root) .component) $said.name }}{{ else }}{{ default "default" $said.name }}{{ end }}
{{- end }}

{{/* Where a Secret's key is: KEY of secrets.existingSecret, or SECRET/KEY. */}}
{{- define "reco.secretKey" -}}
{{- $parts := splitList "/" .key -}}
name: {{ if eq (len $parts) 2 }}{{ first $parts }}{{ else }}{{ .root.Values.secrets.existingSecret }}{{ end }}
key: {{ last $parts }}
{{- end }}
