{{/* A pod's annotations: what it has from the ConfigMap began with this text; another text, other pods. Files are read again as they change, and are not in it. */}}
{{- define "reco.annotations" -}}
checksum/settings: {{ include "reco.settings" .root | sha256sum }}
{{- with .values.pod.annotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Everything of a pod's spec but its containers. */}}
{{- define "reco.pod" -}}
serviceAccountName: {{ include "reco.account" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .values.pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.pod.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if and .values.pod.spreadOver (not .alone) }}
topologySpreadConstraints:
  {{- range .values.pod.spreadOver }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "reco.selector" (dict "root" $.root "component" $.component) | nindent 8 }}
  {{- end }}
{{- end }}
volumes:
  {{- if eq .component "gateway" }}
  - {name: tmp, emptyDir: {sizeLimit: 256Mi}}
  - {name: conf, emptyDir: {sizeLimit: 8Mi}}
  - {name: templates, configMap: {name: {{ include "reco.fullname" .root }}-gateway}}
  - {name: secrets, secret: {secretName: {{ .values.existingSecret }}, defaultMode: 0440}}
  {{- else }}
  - {name: tmp, emptyDir: {}}
  - {name: state, emptyDir: {}}
  {{- if ne .component "consumer" }}
  - {name: shm, emptyDir: {medium: Memory, sizeLimit: 256Mi}}
  {{- end }}
  {{- if or .root.Values.rules .root.Values.experiments }}
  - {name: files, configMap: {name: {{ include "reco.fullname" .root }}-files}}
  {{- end }}
  {{- if and (eq .component "flows") .root.Values.flows.dataClaim }}
  - {name: raw, persistentVolumeClaim: {claimName: {{ .root.Values.flows.dataClaim }}}}
  {{- end }}
  {{- end }}
  {{- with .values.pod.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "reco.image" -}}
{{- $said := index .root.Values.images .image -}}
image: {{ $said.repository }}{{ if $said.digest }}@{{ $said.digest }}{{ else }}:{{ default .root.Chart.AppVersion $said.tag }}{{ end }}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
{{- end }}

{{- define "reco.locked" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* What a container of ours has beside its command: image, rights, settings, secrets, folders. `env` is its own variables. */}}
{{- define "reco.container" -}}
{{ include "reco.image" . }}
{{ include "reco.locked" . }}
envFrom:
  - configMapRef: {name: {{ include "reco.fullname" .root }}-settings}
env:
  {{- with .env }}
  {{- . | trim | nindent 2 }}
  {{- end }}
  {{- with include "reco.secretEnv" . | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with .values.pod.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: state, mountPath: /var/lib/reco}
  {{- if ne .component "consumer" }}
  - {name: shm, mountPath: /dev/shm}
  {{- end }}
  {{- if or .root.Values.rules .root.Values.experiments }}
  - {name: files, mountPath: /etc/reco, readOnly: true}
  {{- end }}
  {{- if and (eq .component "flows") .root.Values.flows.dataClaim }}
  - {name: raw, mountPath: /var/lib/reco/raw}
  {{- end }}
  {{- with .values.pod.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Waits until a bundle is published, as whoever serves it sees it. */}}
{{- define "reco.wait" -}}
- name: wait
  args: [sh, -c, "until python -m app.bundle list | grep -q '^current: [0-9]'; do echo no bundle is published yet; sleep 10; done"]
  resources:
    requests: {cpu: 50m, memory: 256Mi, ephemeral-storage: 64Mi}
    limits: {memory: 1Gi, ephemeral-storage: 256Mi}
  {{- include "reco.container" . | nindent 2 }}
{{- end }}
