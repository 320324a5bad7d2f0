{{/* Labels of an object; the argument is a list of the context and the component. */}}
{{- define "raceway.labels" -}}
{{- $ := index . 0 -}}
{{ include "raceway.selector" . }}
app.kubernetes.io/part-of: raceway
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $.Release.Service }}
helm.sh/chart: {{ $.Chart.Name }}-{{ $.Chart.Version }}
{{- end }}

{{/* Labels that select pods: they cannot change in an upgrade. */}}
{{- define "raceway.selector" -}}
app.kubernetes.io/name: raceway
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Labels of a pod: no version, which would differ where nothing does. */}}
{{- define "raceway.podLabels" -}}
{{ include "raceway.selector" . }}
app.kubernetes.io/part-of: raceway
{{- end }}

{{- define "raceway.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Whether the chart's own CA is in use: "true" or nothing. */}}
{{- define "raceway.ownCA" -}}
{{- if not .Values.ca.external.address }}true{{ end -}}
{{- end }}

{{/* User name of one of the chart's service accounts; the argument is a list of the context and the account. */}}
{{- define "raceway.username" -}}
system:serviceaccount:{{ (index . 0).Release.Namespace }}:{{ index . 1 }}
{{- end }}
