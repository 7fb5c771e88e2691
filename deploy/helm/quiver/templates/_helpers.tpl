{{- define "quiver.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "quiver.fullname" -}}
{{- $name := include "quiver.name" . }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $full .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "quiver.selector" -}}
app.kubernetes.io/name: {{ include "quiver.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "quiver.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "quiver.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "quiver.serviceAccountName" -}}
{{- default (ternary (include "quiver.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name }}
{{- end }}

{{- define "quiver.claim" -}}
{{- default (include "quiver.fullname" .) .Values.persistence.existingClaim }}
{{- end }}

{{- /* One value as a variable holds it: a list with commas, and 16777216 not as 1.6777216e+07. */}}
{{- define "quiver.text" -}}
{{- if kindIs "slice" . }}
  {{- $parts := list }}
  {{- range . }}{{ $parts = append $parts (include "quiver.text" .) }}{{ end }}
  {{- join "," $parts }}
{{- else if kindIs "float64" . }}
  {{- ternary (printf "%.0f" .) (toString .) (eq . (floor .)) }}
{{- else }}
  {{- toString . }}
{{- end }}
{{- end }}

{{- /* Settings as variables, by their own names. */}}
{{- define "quiver.variables" -}}
{{- range $name, $value := . }}
{{- if not (kindIs "invalid" $value) }}
QUIVER_{{ upper $name }}: {{ include "quiver.text" $value | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What one volume cannot do: be written by pods of several nodes that it is not made for. */}}
{{- define "quiver.checkVolume" -}}
{{- $several := or .Values.autoscaling.enabled (gt (int .Values.replicaCount) 1) }}
{{- if and .Values.persistence.enabled $several (not (has "ReadWriteMany" .Values.persistence.accessModes)) }}
{{- fail "several pods cannot share a volume of persistence.accessModes: use ReadWriteMany, or switch persistence off and keep accounts in PostgreSQL (secrets.database_url)" }}
{{- end }}
{{- end }}
